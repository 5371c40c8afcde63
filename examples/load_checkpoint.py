"""Loads a checkpoint and says what it expects to come after a text.

    python examples/load_checkpoint.py [CHECKPOINT] [--text TEXT] [--mesh expert=2,...]
        [--bytes] [--dtype bfloat16] [--keep-quantized] [--revision REVISION]

The checkpoint is a directory, or a name on the Hugging Face hub; by default the tiny
release that the tests use, whose weights are random. Text becomes tokens by the
checkpoint's `tokenizer.json`, or byte by byte with `--bytes` and in that tiny release.
"""

import argparse
import math
import pathlib
import sys
import time

import jax
import numpy as np

import dsv4_eqx as dsv4
from dsv4_eqx.model.inputs import validate_token_ids
from dsv4_eqx.sharding.mesh import mesh_sizes

TINY_RELEASE = pathlib.Path(__file__).parent.parent / "tests" / "data" / "nano-release"
TEXT = "The window slides over the last tokens"
NUM_SHOWN = 5


def options():
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description="Loads a checkpoint and predicts.")
    parser.add_argument("checkpoint", nargs="?", default=str(TINY_RELEASE))
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--mesh", help="axes and sizes, as data=2,expert=4")
    parser.add_argument("--bytes", action="store_true", help="a token for each byte")
    parser.add_argument("--dtype", help="of the weights; the embedding's by default")
    parser.add_argument("--keep-quantized", action="store_true")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    return parser.parse_args()


def mesh_of(text):
    """The mesh, over as many of the devices as it needs; CPU devices if need be."""
    if text is None:
        return None
    sizes = mesh_sizes(text)
    needed = math.prod(sizes.values())
    jax.config.update("jax_num_cpu_devices", needed)
    return dsv4.make_mesh(**sizes, devices=jax.devices()[:needed])


def main():
    """Loads, predicts and prints."""
    asked = options()
    mesh = mesh_of(asked.mesh)
    start = time.perf_counter()
    model = dsv4.from_pretrained(
        asked.checkpoint,
        dtype=asked.dtype,
        mesh=mesh,
        keep_quantized=asked.keep_quantized,
        revision=asked.revision,
    )
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(model)
    here = sum(x.addressable_data(0).nbytes for x in leaves)
    inner = model.model if isinstance(model, dsv4.ShardedModel) else model
    print(f"{inner.num_params():,} parameters in {seconds:.1f} s")
    print(f"{here:,} bytes on each of {len(leaves[0].devices())} devices")
    if asked.bytes or asked.checkpoint == str(TINY_RELEASE):
        tokenizer = dsv4.ByteTokenizer()
    else:
        tokenizer = dsv4.load_tokenizer(asked.checkpoint, revision=asked.revision)
    tokens = tokenizer.encode(asked.text)[None]
    # Under jit they are not known.
    validate_token_ids("load_checkpoint", tokens, model.config.vocab_size)
    if mesh is not None:  # a row for each device that rows are split over
        rows = mesh.shape["data"] * mesh.shape["expert"]
        tokens = tokens.repeat(rows, axis=0)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    probabilities = np.asarray(jax.nn.softmax(logits[0, -1]))
    print(f"after {asked.text!r}:")
    for token in np.argsort(-probabilities)[:NUM_SHOWN]:
        print(f"  {probabilities[token]:6.1%}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{pathlib.Path(__file__).name}: {error}")
