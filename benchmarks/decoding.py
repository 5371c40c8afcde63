"""Tokens per second of greedy decoding here and in transformers, side by side.

    python benchmarks/decoding.py --batches 1 8

The model is that of `against_transformers.py`, or with `--units N` as wide and of N
times a layer of CSA and one of HCA, which are scanned. It is in float32, with as many
threads as there are processors. Each measurement is a process of its own, ours and
theirs in turn, with the same weights and prompts. The time of a step is that of
generating many tokens less that of generating one, over the difference; the median of
several.

The last column is what reading each weight that a token needs once from memory would
take, at the rate of one large matrix-vector product, over the time that a step takes.
It fails where the two do not choose the same tokens.

It needs what the extra `benchmark` installs.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Final

import jax
import numpy as np
from against_transformers import CONFIG, SIDES, save_weights, their_model, timed

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HCA, TOPK_MOE
from dsv4_eqx.model.model import abstract_model

_REPEATS: Final = 5


def model_config(units: int) -> dsv4.Config:
    """As many repeated units, or the configuration of the other benchmarks for 0."""
    if units == 0:
        return CONFIG
    return dataclasses.replace(
        CONFIG,
        num_hidden_layers=2 * units,
        layer_types=(CSA, HCA) * units,
        compress_ratios=(4, 128) * units,
        mlp_layer_types=(TOPK_MOE,) * (2 * units),
    )


def prompts(batch: int, length: int) -> np.ndarray:
    generator = np.random.default_rng(batch)
    return generator.integers(1, CONFIG.vocab_size, (batch, length)).astype(np.int32)


def seconds_per_step(generate: Callable[[int], np.ndarray], new: int):
    """Median seconds of a step, and the tokens."""
    for count in (1, new):  # compiles
        generate(count)
    steps = []
    for _ in range(_REPEATS):
        times = []
        for count in (1, new):
            start = time.perf_counter()
            tokens = generate(count)
            times.append(time.perf_counter() - start)
        steps.append((times[1] - times[0]) / (new - 1))
    return statistics.median(steps), tokens


def ours(config: dsv4.Config, weights: pathlib.Path, ids: np.ndarray, new: int):
    """Seconds of a step, the tokens, and the bytes per second of reading memory."""
    import jax
    import jax.numpy as jnp

    model = dsv4.from_state_dict(config, np.load(weights))

    def generate(count: int) -> np.ndarray:
        return np.asarray(dsv4.generate(model, ids, max_new_tokens=count).tokens)

    seconds, tokens = seconds_per_step(generate, new)
    matrix, vector = jnp.ones((16384, 8192)), jnp.ones(8192)
    multiply = jax.jit(jnp.matmul)
    product, _ = timed(lambda: multiply(matrix, vector).block_until_ready(), 9)
    return seconds, tokens, matrix.nbytes / product


def theirs(config: dsv4.Config, weights: pathlib.Path, ids: np.ndarray, new: int):
    """The same of transformers, eager."""
    import torch

    model = their_model(weights, config)
    given = torch.tensor(ids).long()

    def generate(count: int) -> np.ndarray:
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].numpy()

    return *seconds_per_step(generate, new), None


def measure(args: argparse.Namespace) -> None:
    """One measurement, in the child process; prints JSON."""
    function = ours if args.side == "ours" else theirs
    ids = prompts(args.batches[0], args.prompt)
    seconds, tokens, rate = function(
        model_config(args.units), args.folder / "weights.npz", ids, args.new_tokens
    )
    np.save(args.folder / f"{args.side}.npy", tokens)
    print(json.dumps(dict(seconds=seconds, rate=rate)))


def compare(folder: pathlib.Path, batch: int, args: argparse.Namespace) -> None:
    """Both sides in turn, one process each; prints a row."""
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, "--batches", str(batch)]
        command += ["--folder", str(folder), "--prompt", str(args.prompt)]
        command += ["--new-tokens", str(args.new_tokens), "--units", str(args.units)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    tokens = [np.load(folder / f"{side}.npy") for side in SIDES]
    if not np.array_equal(*tokens):
        sys.exit(f"batch {batch}: the tokens differ: {tokens}")
    mine, other = found["ours"]["seconds"], found["theirs"]["seconds"]
    config = model_config(args.units)
    read = params_read(config)
    needed = 4 * read / found["ours"]["rate"]
    share = f"{needed / mine:8.0%}" if batch == 1 else ""
    print(
        f"{batch:>6} {batch / mine:10.0f} {batch / other:10.0f} {other / mine:7.1f} "
        f"{found['ours']['rate'] / 1e9:9.1f} {share}",
        flush=True,
    )


def params_read(config: dsv4.Config) -> int:
    """By a token: all but other experts, tables, the embedding, prediction blocks."""
    total = 0
    model = abstract_model(config, np.dtype(np.float32))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name == "embedding" or name.startswith("mtp.") or name.endswith(".table"):
            continue
        is_routed = ".moe.experts." in name
        part = config.num_experts_per_tok if is_routed else config.n_routed_experts
        total += leaf.size * part // config.n_routed_experts
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--units", type=int, default=0, help="layers of CSA and HCA")
    for name, kind in (("--side", str), ("--folder", pathlib.Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return measure(args)
    print(f"greedy, float32, {len(os.sched_getaffinity(0))} threads, tokens/s")
    print(" batch       ours     theirs   ratio mem, GB/s of memory's")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_weights(folder / "weights.npz", model_config(args.units))
        for batch in args.batches:
            compare(folder, batch, args)


if __name__ == "__main__":
    main()
