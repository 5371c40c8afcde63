"""Trains a released model further, on texts, completions or chats.

    python examples/finetune.py [--release DIR] [--texts PATH...] [--out tuned]
        [--resume] [--lora 8] [--train-layers 3 4] [--steps 20]
        [--mesh expert=2,tensor=2] [--fsdp] [--batch 4] [--accumulate 1] [--length 64]
        [--learning-rate 3e-4] ...

A line of a `.jsonl` file with `prompt` and `completion` trains the completion alone.
By default the tiny release that the tests use learns the text of this package's
license. All weights are trained in float32, or those of some layers; `tuned/model` is
then a checkpoint like the release. With `--lora` the weights stay packed as they are,
and low-rank adapters alone are trained; `tuned/adapter` has them in PEFT's files.
"""

import pathlib

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

ROOT = pathlib.Path(__file__).parent.parent
TINY_RELEASE = ROOT / "tests" / "data" / "nano-release"
WARMUP = 0.1  # part of all steps; the rest falls


def options():
    """What was asked for on the command line."""
    defaults = dict(texts=[ROOT / "LICENSE"], out=pathlib.Path("tuned"), steps=20)
    defaults |= dict(batch=4, length=64, learning_rate=3e-4)
    parser = parser_of("Trains a released model further.", **defaults)
    parser.add_argument("--release", default=str(TINY_RELEASE), help="or a hub's name")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--bytes", action="store_true", help="a token for each byte")
    parser.add_argument("--end-id", type=int, help="token that ends a document")
    parser.add_argument("--lora", type=int, help="rank of adapters, trained alone")
    targets, what = dsv4.DEFAULT_TARGETS, "what has adapters: parts of paths"
    parser.add_argument("--targets", nargs="+", default=targets, help=what)
    parser.add_argument("--train-layers", type=int, nargs="+", help="these alone")
    parser.add_argument("--mtp-weight", type=float, default=0.1, help="0: not trained")
    return parser.parse_args()


def read(asked, vocab_size):
    """The documents, and what tokenised them."""
    tokenizer = dsv4.ByteTokenizer()
    if not asked.bytes and asked.release != str(TINY_RELEASE):
        tokenizer = dsv4.load_tokenizer(asked.release, revision=asked.revision)
    documents = dsv4.read_documents(
        asked.texts,
        tokenizer,
        end_id=asked.end_id,
        vocab_size=vocab_size,
        encode_messages=None,  # what turns chat messages into tokens is given here
    )
    return documents, tokenizer


def make_losses(mtp_weight):
    """The loss, and what `accumulated` needs beside it."""

    def losses(trained, rest, batch):
        model = eqx.combine(trained, rest)
        loss, parts = dsv4.next_token_loss(
            model, *batch, mtp_weight=mtp_weight, remat=True
        )
        return loss, (parts.num_targets, seen_of(parts), ())

    return losses


def make_step(asked, model, transformation, marks, mtp_weight):
    """The function that does one step of the optimizer."""
    losses = make_losses(mtp_weight)
    moved = None
    if asked.train_layers is not None:
        moved = dsv4.layer_mask(model, asked.train_layers)

    def step(model, state, batch):
        trained, rest = eqx.partition(model, marks)
        gradients, seen, _ = accumulated(losses, trained, rest, batch)
        if moved is not None:  # a stacked array has other layers, too
            gradients = dsv4.apply_mask(moved, gradients)
        updates, state = transformation.update(gradients, state, trained)
        if moved is not None:  # they would be decayed
            updates = dsv4.apply_mask(moved, updates)
        model = eqx.combine(eqx.apply_updates(trained, updates), rest)
        return model, state, seen

    return jax.jit(step, donate_argnums=(0, 1))


def main():
    """Loads a release, trains it and saves it."""
    asked = options()
    validate(asked)
    mesh = open_mesh(asked.mesh)
    model = dsv4.from_pretrained(
        asked.release,
        dtype="float32",
        keep_quantized=asked.lora is not None,
        mesh=mesh,
        fsdp=asked.fsdp,
        revision=asked.revision,
    )
    documents, tokenizer = read(asked, model.config.vocab_size)
    is_whole = asked.lora is None and asked.train_layers is None
    mtp_weight = asked.mtp_weight if model.num_mtp > 0 and is_whole else 0.0
    if asked.lora is None:
        marks = dsv4.trainable(model, mtp=mtp_weight > 0, layers=asked.train_layers)
    else:
        key, targets = jax.random.key(asked.seed), asked.targets
        model = dsv4.lora(model, targets=targets, rank=asked.lora, key=key)
        marks = dsv4.lora_mask(model)
    trained = eqx.filter(model, marks)
    warmup, rate = int(WARMUP * asked.steps), asked.learning_rate
    schedule = dsv4.schedule(rate, 0.0, warmup, 0, asked.steps - warmup)
    transformation = dsv4.optimizer(trained, schedule)
    step = make_step(asked, model, transformation, marks, mtp_weight)
    state = transformation.init(trained)
    model = train(asked, documents, model, state, step, schedule, marks)
    if model is not None and asked.lora is None:
        save_model(asked, model, tokenizer)
    elif model is not None:
        dsv4.save_lora(model, asked.out / "adapter", overwrite=True)
        print(f"the adapters are in {asked.out / 'adapter'}")


if __name__ == "__main__":
    run(main)
