"""Continues a text with a checkpoint, token by token as they come.

    python examples/generate.py [CHECKPOINT] [--prompt TEXT] [--max-new-tokens 64]
        [--temperature 0.8] [--top-k K] [--top-p 0.95] [--min-p P] [--seed 0]
        [--eos-id ID] [--speculative] [--bytes]
        [--dtype bfloat16] [--keep-quantized] [--revision REVISION]

The checkpoint is a directory, or a name on the Hugging Face hub; without one, a tiny
model with random weights, which speaks in bytes and makes no sense. At the end it tells
the tokens per second, with and without the first ones, which wait for the compiler.
With `--speculative` the model's prediction block drafts tokens, and it tells what part
of them stayed.
"""

import argparse
import sys
import time

import jax
import numpy as np

import dsv4_eqx as dsv4

PROMPT = "The window slides over the last tokens"


def options():
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description="Continues a text.")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--eos-id", type=int, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculative", action="store_true", help="draft tokens")
    parser.add_argument("--bytes", action="store_true", help="a token for each byte")
    parser.add_argument("--dtype", help="of the weights; the embedding's by default")
    parser.add_argument("--keep-quantized", action="store_true")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    asked = parser.parse_args()
    if asked.checkpoint is None and (
        asked.dtype or asked.keep_quantized or asked.revision
    ):
        parser.error("--dtype, --keep-quantized and --revision are for a checkpoint")
    return asked


def load(asked):
    """A model and what turns text into its tokens."""
    if asked.checkpoint is None:
        key = jax.random.key(asked.seed)
        return dsv4.DeepSeekV4(dsv4.Config.tiny(), key=key), dsv4.ByteTokenizer()
    model = dsv4.from_pretrained(
        asked.checkpoint,
        dtype=asked.dtype,
        keep_quantized=asked.keep_quantized,
        revision=asked.revision,
    )
    if asked.bytes:
        return model, dsv4.ByteTokenizer()
    return model, dsv4.load_tokenizer(asked.checkpoint, revision=asked.revision)


def main():
    """Loads, continues and prints."""
    asked = options()
    model, tokenizer = load(asked)
    tokens = tokenizer.encode(asked.prompt)[None]
    stream = dsv4.generate_stream(
        model,
        tokens,
        max_new_tokens=asked.max_new_tokens,
        sampling=dsv4.Sampling(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
        ),
        eos_id=asked.eos_id,
        key=jax.random.key(asked.seed),
        speculative=asked.speculative,
    )
    print(asked.prompt, end="", flush=True)
    new, shown, times = [], "", [time.perf_counter()]
    for (token,) in stream:
        new.append(int(token))
        times.append(time.perf_counter())
        # A character may need several tokens: what is whole is shown.
        text = tokenizer.decode(np.array(new))
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(np.array(new))[len(shown) :])
    print(f"{len(new)} tokens, {len(new) / (times[-1] - times[0]):.1f} a second")
    # Two steps wait for the compiler; the second one may give two tokens.
    skipped = 3 if asked.speculative else 2
    if len(new) > skipped:
        rate = (len(new) - skipped) / (times[-1] - times[skipped])
        print(f"{rate:.1f} a second after the first {skipped}")
    if asked.speculative:
        drafted, accepted = stream.num_drafted.sum(), stream.num_accepted.sum()
        print(
            f"{accepted} of {drafted} drafts stayed, {accepted / max(drafted, 1):.0%}"
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError, OverflowError) as error:
        sys.exit(f"generate.py: {error}")
