"""One layer of Flash compiled for a device that is not there: launches and memory.

    python benchmarks/compiled.py h100            # needs pip install 'dsv4-eqx[cuda13]'
    python benchmarks/compiled.py v5p:2x2x1       # needs pip install 'dsv4-eqx[tpu]'

For each kind of layer, bfloat16: forward, forward and backward, of one row of 4,096
tokens, and a decoded token of 8 rows after 8,192. On a GPU it counts the kernels that
the program launches and the loops whose rounds only the device knows; on a TPU, XLA
says what moves through memory, where it counts a loop once. Beside it stands the least
time that the device's rates allow: its products, or reading weights and caches and
writing gradients once. The table is printed and written to benchmarks/results/.
"""

import argparse
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from gpu_cases import layer_bytes, layer_flops, num_bytes
from tqdm import tqdm

import dsv4_eqx as dsv4
from dsv4_eqx.plan.absent import absent_devices, launches
from dsv4_eqx.plan.machines import Machine, is_gpu, machine

RESULTS: Final = pathlib.Path(__file__).parent / "results"
TOKENS: Final = 4096
ROWS, CONTEXT = 8, 8192
# The first layers of each kind that route by scores; sliding ones route by token.
LAYERS: Final = {"sliding": 0, "CSA": 4, "HCA": 3}
PASSES: Final = ("forward", "forward + backward", "decoding")


def block_of(kind: str) -> tuple[Any, Any]:
    """A layer's arrays as shapes, and what else it is made of."""
    config = dsv4.Config.flash()

    def make(key):
        return dsv4.Block(config, LAYERS[kind], key=key, dtype=jnp.bfloat16)

    block = eqx.filter_eval_shape(make, jax.random.key(0))
    return eqx.partition(block, lambda x: isinstance(x, jax.ShapeDtypeStruct))


def program(kind: str, what: str, tokens: int) -> tuple[Callable[..., Any], tuple]:
    """A function and the shapes of its arguments."""
    arrays, rest = block_of(kind)
    dim = dsv4.Config.flash().hidden_size

    def forward(arrays, streams, ids, positions):
        return eqx.combine(arrays, rest)(streams, ids, positions)

    def backward(arrays, streams, ids, positions):
        floats, others = eqx.partition(
            arrays, lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        )

        def loss(floats, streams):
            out = forward(eqx.combine(floats, others), streams, ids, positions)
            return jnp.sum(out.astype(jnp.float32) * streams)

        return jax.grad(loss, (0, 1))(floats, streams)

    def decode(arrays, streams, ids, cache, start):
        block = eqx.combine(arrays, rest)
        lengths = jnp.ones_like(start)
        out, cache = block.extend(streams, ids, cache, start, lengths)
        return out, cache.keep(lengths)

    batch, seq = (ROWS, 1) if what == "decoding" else (1, tokens)
    streams = jax.ShapeDtypeStruct((batch, seq, 4, dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    if what != "decoding":
        run = forward if what == "forward" else backward
        return run, (arrays, streams, ids, ids)
    cache = eqx.filter_eval_shape(
        lambda arrays: eqx.combine(arrays, rest).attention.init_cache(
            ROWS, CONTEXT, jnp.bfloat16
        ),
        arrays,
    )
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return decode, (arrays, streams, ids, cache, start)


def least_ms(on: Machine, kind: str, what: str, tokens: int, shapes: tuple) -> str:
    """What the products take, and reading and writing once: the longer of the two."""
    if on.products is None or on.bandwidth is None:
        return "unknown"
    config, (arrays, streams, _, *rest) = dsv4.Config.flash(), shapes
    if what == "decoding":
        # A matrix is read for each expert that a token chooses.
        routed = num_bytes(arrays.moe.experts)
        chosen = ROWS * config.num_experts_per_tok / config.n_routed_experts
        moved = num_bytes(arrays) - routed * (1 - min(1.0, chosen)) + num_bytes(rest)
        return f"{moved / on.bandwidth * 1e3:.2f}"
    index = PASSES.index(what)
    moved = layer_bytes(num_bytes(arrays), num_bytes(streams))[index]
    products = layer_flops(config, kind, tokens)[index]
    return f"{max(moved / on.bandwidth, products / on.products) * 1e3:.2f}"


def compile_for(device: Any, function: Callable[..., Any], *shapes: Any) -> Any:
    """A function compiled for one absent device; its arguments are given as shapes."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def on_device(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.jit(function).lower(*jax.tree.map(on_device, shapes)).compile()


def measure(device: Any, target: str, kind: str, what: str, tokens: int) -> dict:
    """One row of the table."""
    began = time.perf_counter()
    function, shapes = program(kind, what, tokens)
    compiled = compile_for(device, function, *shapes)
    row = {"layer": kind, "pass": what}
    memory = compiled.memory_analysis()
    if is_gpu(target):
        found = launches(compiled.as_text())
        row |= {
            "launches": found.kernels,
            "loops of unknown trips": len(found.unknown_loops),
        }
    else:
        moved = compiled.cost_analysis()["bytes accessed"]
        row |= {"bytes moved, GB": f"{moved / 1e9:.1f}"}
    return row | {
        "temporaries, GB": f"{memory.temp_size_in_bytes / 1e9:.2f}",
        "arguments, GB": f"{memory.argument_size_in_bytes / 1e9:.2f}",
        "at least, ms": least_ms(machine(target), kind, what, tokens, shapes),
        "compiled in, s": round(time.perf_counter() - began),
    }


def table(rows: list[dict]) -> str:
    """Markdown."""

    def lines() -> Iterator[list]:
        yield list(rows[0])
        yield ["---"] * len(rows[0])
        yield from (list(row.values()) for row in rows)

    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines())


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches and memory, compiled only.")
    parser.add_argument("target", help="h100, h200, b200, v5p:2x2x1, or a description")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--form", help="of the kernels, if not the device's own")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    device = absent_devices(options.target)[0]
    cases = [
        (kind, what)
        for kind in options.layers.split(",")
        for what in options.passes.split(",")
    ]
    form = options.form or machine(options.target).form
    with dsv4.use_kernels(form):
        rows = [
            measure(device, options.target, kind, what, options.tokens)
            for kind, what in tqdm(cases)
        ]
    title = (
        f"# Compiled for {options.target}, jax {jax.__version__}, kernels {form!r}\n\n"
        f"One layer of Flash, bfloat16: one row of {options.tokens:,} tokens, and "
        f"decoding {ROWS} rows after {CONTEXT:,}.\n\n"
    )
    text = title + table(rows) + "\n"
    print(text)
    options.output.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "_", pathlib.Path(options.target).stem)
    name += "" if options.form is None else f"_{form.replace('-', '_')}"
    name += "" if options.tokens == TOKENS else f"_{options.tokens}"
    (options.output / f"compiled_{name}.md").write_text(text)


if __name__ == "__main__":
    main()
