"""Trains a model from its beginning, by the paper's recipe.

    python examples/pretrain.py [--texts PATH...] [--out run] [--resume] [--steps 600]
        [--config config.json] [--layers 6] [--mesh data=2,expert=2] [--fsdp]
        [--batch 8] [--accumulate 1] [--length 128] [--learning-rate 4e-3] ...

Without texts the tiny model learns the sources of Python's standard library, byte by
byte. Muon and AdamW train it on the next token, and the prediction block on the one
after; the balance loss and the routers' biases keep the experts' loads equal, and the
indexers learn from attention. `run` has checkpoints, a log, a picture and, at the end,
the model:

    python examples/generate.py run/model --bytes --speculative
"""

import pathlib
import sysconfig

import equinox as eqx
import jax
from training_run import (
    accumulated,
    open_mesh,
    parser_of,
    run,
    save_model,
    seen_of,
    train,
    validate,
)

import dsv4_eqx as dsv4

MTP_WEIGHT = 0.3  # 0.1 in the paper once the learning rate falls
BALANCE = 1e-4
BIAS_SPEED = 1e-3
WARMUP, DECAY = 0.05, 0.5  # parts of all steps


def options():
    """What was asked for on the command line."""
    defaults = dict(out=pathlib.Path("run"), steps=600, batch=8, length=128)
    parser = parser_of("Trains a model.", **defaults, learning_rate=4e-3)
    parser.add_argument("--config", help="config.json; the tiny one by default")
    parser.add_argument("--layers", type=int, help="the first ones alone")
    parser.add_argument("--tokenizer", help="directory; bytes are tokens by default")
    parser.add_argument("--end-id", type=int, help="token that ends a document")
    return parser.parse_args()


def read(asked, config):
    """The documents, and what tokenised them."""
    tokenizer = dsv4.ByteTokenizer()
    if asked.tokenizer is not None:
        tokenizer = dsv4.load_tokenizer(asked.tokenizer)
    options = dict(end_id=asked.end_id, vocab_size=config.vocab_size)
    if asked.texts is not None:
        return dsv4.read_documents(asked.texts, tokenizer, **options), tokenizer
    library = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return dsv4.read_documents(library, tokenizer, **options), tokenizer


def losses(trained, rest, batch):
    """The loss, and what `accumulated` and the routers' biases need beside it."""
    model = eqx.combine(trained, rest)
    tokens, segment_ids, mask = batch
    streams, layers = model.observe_streams(tokens, segment_ids, remat=True)
    weight = MTP_WEIGHT if model.num_mtp else 0.0
    loss, parts = dsv4.next_token_loss(
        model, tokens, segment_ids, mask, streams=streams, mtp_weight=weight
    )
    seen = seen_of(parts)
    routings = dsv4.scored_routings(model, layers)
    if routings:
        balance, loads = dsv4.balance_loss(routings, segment_ids, alpha=BALANCE)
        seen |= dict(balance=balance, largest_load=loads.largest_load.mean())
        loss = loss + balance
    if any(layer.attention.divergence is not None for layer in layers):
        indexer, captured = dsv4.indexer_loss(layers, segment_ids)
        seen |= dict(indexer=indexer, captured=captured.captured.mean())
        loss = loss + indexer
    counts = [layer.routing.counts for layer in layers]
    return loss, (parts.num_targets, seen, counts)


def make_step(transformation, marks):
    """The function that does one step of the optimizer."""

    def step(model, state, batch):
        trained, rest = eqx.partition(model, marks)
        gradients, seen, counts = accumulated(losses, trained, rest, batch)
        updates, state = transformation.update(gradients, state, trained)
        model = eqx.combine(eqx.apply_updates(trained, updates), rest)
        model = dsv4.update_router_bias(model, counts, speed=BIAS_SPEED)
        return model, state, seen

    return jax.jit(step, donate_argnums=(0, 1))


def main():
    """Makes a model, trains it and saves it."""
    asked = options()
    validate(asked)
    mesh = open_mesh(asked.mesh)
    source = asked.config or dsv4.Config.tiny().to_hf()
    config = dsv4.Config.from_hf(source, num_hidden_layers=asked.layers)
    if asked.length > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"--length {asked.length}: the model has {most} positions")
    documents, tokenizer = read(asked, config)

    def make():
        return dsv4.DeepSeekV4(config, key=jax.random.key(asked.seed))

    model = make() if mesh is None else dsv4.shard(make, mesh, fsdp=asked.fsdp)
    marks = dsv4.trainable(model, mtp=model.num_mtp > 0, indexers=True)
    trained = eqx.filter(model, marks)
    warmup, decay = (int(part * asked.steps) for part in (WARMUP, DECAY))
    rate, constant = asked.learning_rate, asked.steps - warmup - decay
    schedule = dsv4.schedule(rate, rate / 10, warmup, constant, decay)
    transformation = dsv4.optimizer(trained, schedule)
    step = make_step(transformation, marks)
    state = transformation.init(trained)
    model = train(asked, documents, model, state, step, schedule)
    if model is not None:
        save_model(asked, model, tokenizer)


if __name__ == "__main__":
    run(main)
