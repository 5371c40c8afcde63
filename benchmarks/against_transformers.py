"""Time and memory of a small DeepSeek-V4 here and in transformers, side by side.

    python benchmarks/against_transformers.py --lengths 512 2048 --backward

Each measurement is a process of its own, ours and theirs in turn, with the same weights
and tokens in float32 and as many threads as there are processors. Memory is the
process's peak, weights and compiler included. `--plot FILE` draws a picture.

It fails where the two do not compute the same logits and gradient. Among thousands of
tokens a few choose between entries or experts whose scores are equal up to rounding;
from the first of them on the two may part, and only what lies before is compared.

It needs what the extra `benchmark` installs.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from dsv4_eqx import Config, YarnScaling, flops_per_token
from dsv4_eqx.config.kinds import CSA, HCA, SLIDING, TOPK_MOE

CONFIG: Final = Config(
    vocab_size=2048,
    hidden_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=16,
    head_dim=128,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_groups=4,
    o_lora_rank=64,
    n_routed_experts=32,
    num_experts_per_tok=4,
    routed_scaling_factor=1.5,
    sliding_window=128,
    layer_types=(SLIDING, CSA, HCA, CSA),
    compress_ratios=(0, 4, 128, 4),
    mlp_layer_types=(TOPK_MOE,) * 4,
    index_n_heads=16,
    index_head_dim=64,
    index_topk=128,
    rope_scaling=YarnScaling(16.0, 4096),
    max_position_embeddings=65536,
)
SIDES: Final = ("ours", "theirs")
LARGEST_DIFFERENCE: Final = {"logits": 5e-5, "gradient": 5e-4}
CLOSE: Final = 1e-6  # scores that rounding may put in another order


def tokens(length: int) -> np.ndarray:
    generator = np.random.default_rng(length)
    return generator.integers(0, CONFIG.vocab_size, (1, length)).astype(np.int32)


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds after one run that does not count, and the last result."""
    result, seconds = run(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def ours(weights: pathlib.Path, length: int, backward: bool, repeats: int):
    """Seconds, results, temporary bytes of the compiled program, matmul rate."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import dsv4_eqx

    model = dsv4_eqx.from_state_dict(CONFIG, np.load(weights))
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    ids = jnp.asarray(tokens(length))

    def loss(floats):
        scores = jax.nn.log_softmax(eqx.combine(floats, rest)(ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    def forward(floats):
        return eqx.combine(floats, rest)(ids)

    compiled = jax.jit(jax.grad(loss) if backward else forward).lower(floats).compile()
    seconds, out = timed(lambda: jax.block_until_ready(compiled(floats)), repeats)
    results = dict(logits=jax.jit(forward)(floats) if backward else out)
    if backward:
        results["gradient"] = out.embedding
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    square = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.matmul)
    product, _ = timed(lambda: multiply(square, square).block_until_ready(), 15)
    return seconds, results, temporaries, 2 * 2048**3 / product


def theirs(weights: pathlib.Path, length: int, backward: bool, repeats: int):
    """The same of transformers, eager, which says nothing of its temporaries."""
    import torch
    import torch.nn.functional as F

    model = their_model(weights)
    ids = torch.tensor(tokens(length)).long()

    def forward():
        with torch.no_grad():
            return model(ids, use_cache=False).logits.numpy()

    def forward_and_backward():
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        return logits.detach().numpy()

    seconds, logits = timed(forward_and_backward if backward else forward, repeats)
    results = dict(logits=logits, compared=first_close_choice(model, ids))
    if backward:
        results["gradient"] = model.get_input_embeddings().weight.grad.numpy()
    return seconds, results, None, None


def first_close_choice(model, ids) -> int:
    """The first token that chooses between scores equal up to rounding, or the end."""
    import torch

    length, firsts, handles = ids.shape[1], [ids.shape[1]], []

    def record(scores, count):
        if scores.shape[-1] > count:
            best = scores.topk(count + 1).values
            close = best[:, -2] - best[:, -1] < CLOSE
            firsts.extend(close.nonzero()[:1, 0].tolist())

    def of_router(module, inputs, outputs):
        scores = torch.nn.functional.softplus(outputs[0].reshape(length, -1)).sqrt()
        record(scores + module.e_score_correction_bias, CONFIG.num_experts_per_tok)

    def of_indexer(module, inputs, scores):
        seen = (torch.arange(length)[:, None] + 1) // 4
        hidden = torch.arange(scores.shape[-1]) >= seen
        record(scores[0].masked_fill(hidden, -torch.inf), CONFIG.index_topk)

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "indexer.scorer")):
            hook = of_router if name.endswith("gate") else of_indexer
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert handles
    for handle in handles:
        handle.remove()
    return min(firsts)


def save_weights(weights: pathlib.Path, config: Config = CONFIG) -> None:
    """Initial weights of transformers' model, for both sides."""
    state = reference_model(config).state_dict()
    np.savez(weights, **{name: value.numpy() for name, value in state.items()})


def their_model(weights: pathlib.Path, config: Config = CONFIG):
    """transformers' model with these weights, on all processors."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, arrays = reference_model(config), np.load(weights)
    model.load_state_dict({name: torch.tensor(arrays[name]) for name in arrays})
    return model


def reference_model(config: Config):
    """transformers' model of the same configuration, with its own initial weights."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    import torch
    from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

    from tests.reference import reference_config

    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(reference_config(config)).float().eval()


def measure(args: argparse.Namespace) -> None:
    """One measurement, in the child process; prints JSON."""
    repeats = 5 if args.length <= 2048 or args.side == "ours" else 1
    function = ours if args.side == "ours" else theirs
    seconds, results, temporaries, rate = function(
        args.folder / "weights.npz", args.length, args.backward, repeats
    )
    np.savez(args.folder / f"{args.side}.npz", **results)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(seconds=seconds, peak=peak, temp=temporaries, rate=rate)))


def compare(
    folder: pathlib.Path, length: int, backward: bool, sides: tuple[str, ...]
) -> dict[str, Any]:
    """The sides in turn, one process each, and whether they agree."""
    row = dict[str, Any](length=length)
    for side in sides:
        command = [sys.executable, __file__, "--side", side, "--length", str(length)]
        command += ["--folder", str(folder)] + ["--backward"] * backward
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row[side] = json.loads(done.stdout.splitlines()[-1])
    if sides == SIDES:
        row |= differences(*(np.load(folder / f"{side}.npz") for side in sides))
    return row


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict:
    """How far the results are apart; exits where it is too far."""
    compared = int(expected["compared"])
    errors = np.abs(found["logits"] - expected["logits"]).max(axis=-1)[0]
    row = dict(compared=compared, logits=float(errors[:compared].max()))
    if "gradient" in found and compared == len(errors):
        size = np.linalg.norm(expected["gradient"])
        error = np.linalg.norm(found["gradient"] - expected["gradient"]) / size
        row["gradient"] = float(error)
    for name in LARGEST_DIFFERENCE.keys() & row.keys():
        if not row[name] <= LARGEST_DIFFERENCE[name]:
            sys.exit(f"{len(errors)} tokens: the {name} differ by {row[name]:.1e}")
    return row


def print_row(row: dict[str, Any], backward: bool) -> None:
    nothing = dict(seconds=math.nan, peak=math.nan)
    mine, other = row["ours"], row.get("theirs", nothing)
    useful = flops_per_token(CONFIG, row["length"]) * row["length"]
    share = useful * (3 if backward else 1) / mine["seconds"] / mine["rate"]
    print(
        f"{row['length']:>7} {mine['seconds']:9.3f} {other['seconds']:9.3f} "
        f"{other['seconds'] / mine['seconds']:7.1f} {mine['temp'] / 1e6:9.0f} "
        f"{mine['peak'] / 1e6:9.0f} {other['peak'] / 1e6:9.0f} {share:7.0%} "
        f"{row.get('logits', math.nan):10.1e} {row.get('compared', 0):9}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time and memory against the length, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "peak"), ("seconds", "peak bytes")):
        for side, name in zip(SIDES, ("dsv4_eqx", "transformers")):
            run = [row for row in rows if side in row]
            lengths = [row["length"] for row in run]
            axis.loglog(lengths, [row[side][key] for row in run], "o-", label=name)
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    lengths = [512, 2048, 4096, 8192, 16384]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    help_ = "longest that transformers runs; beyond, its memory runs out"
    parser.add_argument("--theirs-up-to", type=int, default=8192, help=help_)
    parser.add_argument("--backward", action="store_true", help="cross-entropy's too")
    parser.add_argument("--plot", type=pathlib.Path, help="a picture, as this file")
    for name, kind in (("--side", str), ("--length", int), ("--folder", pathlib.Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return measure(args)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'dsv4-eqx[benchmark]'")
    threads = f"{len(os.sched_getaffinity(0))} threads"
    print("forward + backward" if args.backward else "forward", "float32", threads)
    print(
        " tokens   ours, s theirs, s   ratio  temp, MB  peak, MB    theirs  of matmul"
        " difference  compared"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_weights(folder / "weights.npz")
        rows = []
        for length in args.lengths:
            sides = SIDES if length <= args.theirs_up_to else SIDES[:1]
            rows.append(compare(folder, length, args.backward, sides))
            print_row(rows[-1], args.backward)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
