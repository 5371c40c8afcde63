"""`python -m dsv4_eqx.plan`: bytes that a mesh would hold and send, without devices."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from dsv4_eqx.config.config import Config
from dsv4_eqx.numerics.validation import validate_dtype
from dsv4_eqx.plan.compiled import compile_steps, compiled_report
from dsv4_eqx.plan.picture import plot_mesh
from dsv4_eqx.plan.plan import make_plan
from dsv4_eqx.plan.report import report
from dsv4_eqx.sharding.mesh import mesh_sizes

_CONFIGS = {"flash": Config.flash, "pro": Config.pro, "tiny": Config.tiny}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 1 if something does not divide or fit."""
    options = _parser().parse_args(arguments)
    try:
        sizes = mesh_sizes(options.mesh)
        if options.memory is not None and not 0 < options.memory < math.inf:
            raise ValueError(
                f"plan: --memory {options.memory}: must be above 0, in GB."
            )
        if options.plot is not None:
            plot_mesh(sizes, options.plot)
        config = _config(options.model)
        rows = sizes["data"] * sizes["expert"]
        longest = min(4096, config.max_position_embeddings)
        given: dict[str, Any] = dict(
            batch=rows if options.batch is None else options.batch,
            seq=longest if options.seq is None else options.seq,
            fsdp=options.fsdp,
            dtype=validate_dtype("plan", options.dtype),
        )
        moments = validate_dtype("plan --optimizer-dtype", options.optimizer_dtype)
        plan = make_plan(config, sizes, optimizer_dtype=moments, **given)
        steps = {}
        if options.compile is not None:
            steps = compile_steps(options.compile, config, sizes, **given)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text, fits = report(plan, options.memory)
    print(text)
    if options.compile is not None:
        print("", *compiled_report(options.compile, steps), sep="\n")
    return 0 if fits else 1


def _config(model: str) -> Config:
    if model in _CONFIGS:
        return _CONFIGS[model]()
    if not os.path.exists(model):
        raise ValueError(
            f"plan: {model!r} is none of {', '.join(_CONFIGS)} and no directory with a "
            "config.json."
        )
    return Config.from_hf(model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dsv4_eqx.plan",
        description="Bytes on each device of a mesh, and bytes sent between devices, "
        "read from traced programs; no device is needed.",
    )
    parser.add_argument(
        "model", help="flash, pro, tiny, or a directory with a config.json"
    )
    parser.add_argument("--mesh", required=True, help="data=8,expert=64,tensor=2")
    parser.add_argument("--seq", type=int, help="tokens of a row, and of its cache")
    parser.add_argument(
        "--batch", type=int, help="rows over the whole mesh; data x expert by default"
    )
    parser.add_argument("--fsdp", action="store_true", help="split weights over data")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument(
        "--optimizer-dtype", default="float32", help="of Adam's two moments"
    )
    parser.add_argument("--memory", type=float, help="of a device, in GB of 10**9")
    parser.add_argument(
        "--compile",
        metavar="TARGET",
        help="compile both steps for h100, h200, b200, a TPU such as v5p:4x4x4, or the "
        "file of a GPU's description, and tell what XLA says of them",
    )
    parser.add_argument("--plot", help="a file for a picture of the mesh")
    return parser


if __name__ == "__main__":
    sys.exit(main())
