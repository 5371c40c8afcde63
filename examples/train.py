"""Trains a tiny model on text, prediction block too, then decodes with speculation.

    python examples/train.py [--text FILE] [--steps 300] [--batch 4] [--length 128]
        [--learning-rate 3e-3] [--new-tokens 256] [--temperatures 0 1] [--layers 6]
        [--plot LOSS.png]

Without a file it learns this package's own source, byte by byte. The prediction block
learns the token after next; then it drafts tokens, and what part of them stays and how
much faster that makes decoding is told for text that was not trained on.

It needs optax, which the extra `train` installs; `--plot` needs matplotlib.
"""

import argparse
import pathlib
import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsv4_eqx as dsv4

MTP_WEIGHT = 0.3  # of the prediction block's loss, as in DeepSeek-V3
HELD_OUT = 0.1  # of the text


def options():
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description="Trains a tiny model on text.")
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    layers = dsv4.Config.tiny().num_hidden_layers
    parser.add_argument("--layers", type=int, default=layers, help="the first ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=pathlib.Path)
    return parser.parse_args()


def read_text(path):
    """Bytes to train on, and others to try."""
    if path is None:
        files = sorted(pathlib.Path(dsv4.__file__).parent.rglob("*.py"))
        text = "\n".join(file.read_text() for file in files)
    else:
        text = path.read_text()
    tokens = dsv4.ByteTokenizer().encode(text)
    cut = int(len(tokens) * (1 - HELD_OUT))
    return tokens[:cut], tokens[cut:]


def loss(trained, rest, tokens):
    """Cross-entropies of the next token, and with MTP of the one after it."""
    model = eqx.combine(trained, rest)
    logits, ahead = model.multi_token_logits(tokens)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    now = cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()
    after = cross_entropy(ahead[:, :-1], tokens[:, 2:]).mean()
    return now + MTP_WEIGHT * after, (now, after)


def train(model, tokens, asked):
    """The trained model and the two losses of each step, in nats a byte."""
    trained, rest = eqx.partition(model, dsv4.trainable(model, mtp=True))
    schedule = optax.cosine_decay_schedule(asked.learning_rate, asked.steps)
    adamw = optax.adamw(schedule, mask=dsv4.decay_mask)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    @jax.jit
    def step(trained, state, tokens):
        (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(
            trained, rest, tokens
        )
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, jnp.stack(losses)

    state = optimizer.init(trained)
    generator, curve = np.random.default_rng(asked.seed), []
    for count in range(asked.steps):
        first = generator.integers(0, len(tokens) - asked.length, asked.batch)
        rows = tokens[first[:, None] + np.arange(asked.length)]
        trained, state, losses = step(trained, state, rows)
        curve.append(np.asarray(losses))
        if count % 20 == 0 or count == asked.steps - 1:
            now, after = curve[-1]
            print(f"step {count:4}: next {now:.2f}, after next {after:.2f} nats a byte")
    return eqx.combine(trained, rest), np.array(curve)


def seconds(call):
    """The median of three runs, after one that compiles, and what they give."""
    out, taken = call(), []
    for _ in range(3):
        start = time.perf_counter()
        out = jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), out


def speculate(model, tokens, asked):
    """Continues unseen text with and without drafts, and tells what they bring."""
    prompt, decode = tokens[: asked.length][None], dsv4.ByteTokenizer().decode
    print(f"\n{decode(prompt[0])}")
    for temperature in asked.temperatures:
        name = "likeliest" if temperature == 0 else "drawn"

        def run(speculative):
            return dsv4.generate(
                model,
                prompt,
                max_new_tokens=asked.new_tokens,
                sampling=dsv4.Sampling(temperature=temperature),
                key=jax.random.key(asked.seed),
                speculative=speculative,
            )

        plain, out = seconds(lambda: run(False))
        faster, drafted = seconds(lambda: run(True))
        print(f"--- goes on, the {name} tokens:\n{decode(np.asarray(out.tokens[0]))}")
        accepted = int(drafted.num_accepted[0]) / max(int(drafted.num_drafted[0]), 1)
        print(
            f"--- {accepted:.0%} of the drafts stayed; tokens a second: "
            f"{asked.new_tokens / plain:.0f} without drafts, "
            f"{asked.new_tokens / faster:.0f} with them, {plain / faster:.2f} x"
        )
        if temperature == 0 and not np.array_equal(out.tokens, drafted.tokens):
            raise ValueError("with drafts the likeliest tokens are others")


def plot(curve, path):
    """The losses against the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for losses, name in zip(curve.T, ("next token", "token after next")):
        axes.plot(losses, label=name)
    axes.set(xlabel="step", ylabel="cross-entropy, nats a byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    """Trains, then decodes."""
    asked = options()
    tokens, unseen = read_text(asked.text)
    if min(len(tokens), len(unseen)) <= asked.length:
        raise ValueError(
            f"{len(tokens)} bytes to train on and {len(unseen)} to try are too few for "
            f"--length {asked.length}: give a longer text"
        )
    config = dsv4.Config.tiny().to_hf()
    config = dsv4.Config.from_hf(config, num_hidden_layers=asked.layers)
    longest = asked.length + asked.new_tokens
    if asked.length < 3 or asked.new_tokens < 1:
        raise ValueError("--length must be at least 3, --new-tokens at least 1")
    if longest > config.max_position_embeddings:
        raise ValueError(f"--length and --new-tokens make {longest} tokens: too many")
    model = dsv4.DeepSeekV4(config, key=jax.random.key(asked.seed))
    model, curve = train(model, tokens, asked)
    if asked.plot:
        plot(curve, asked.plot)
    speculate(model, unseen, asked)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, OverflowError) as error:
        sys.exit(f"train.py: {error}")
