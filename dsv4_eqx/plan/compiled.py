"""The planned steps, compiled by the compiler of devices that are not there.

What XLA itself says of them stands beside the plan's estimates: bytes on each device,
the collectives of the real program, for a GPU the kernels that it launches.
"""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_eqx.config.config import Config
from dsv4_eqx.kernels.form import use_kernels
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.plan.absent import Launches, absent_devices, launches
from dsv4_eqx.plan.collectives import Collective, collectives
from dsv4_eqx.plan.costs import flops_per_token
from dsv4_eqx.plan.machines import is_gpu, machine
from dsv4_eqx.plan.programs import decoding_step, training_step
from dsv4_eqx.sharding.mesh import make_mesh
from dsv4_eqx.sharding.shard import shard


class CompiledStep(NamedTuple):
    """What XLA says of one program on each device; collectives in a loop count once."""

    arguments: int  # bytes
    temporaries: int  # bytes
    results: int  # bytes, without those that take an argument's place
    flops: float  # of the model's mathematics, without what is computed again
    moved: float | None  # bytes through memory, where XLA counts them
    launches: Launches | None  # of a GPU
    collectives: list[Collective]


def compile_steps(
    target: str,
    config: Config,
    sizes: Mapping[str, int],
    *,
    batch: int,
    seq: int,
    fsdp: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
) -> dict[str, CompiledStep]:
    """A step of training and one of decoding, compiled: Flash takes minutes."""
    devices = absent_devices(target, math.prod(sizes.values()))
    mesh = make_mesh(**sizes, devices=devices)
    model = shard(abstract_model(config, dtype), mesh, fsdp=fsdp)
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    newest = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    with use_kernels(machine(target).form):
        training = jax.jit(training_step).lower(model, tokens, tokens).compile()
        # A cache takes the place of the last.
        step = jax.jit(decoding_step, donate_argnums=2)
        decoding = step.lower(model, newest, model.init_cache(batch, seq)).compile()
    # A backward pass has two products for each of the forward pass. The last token of a
    # row costs what a sequence costs more than one without it.
    row = seq * flops_per_token(config, seq)
    shorter = (seq - 1) * flops_per_token(config, seq - 1) if seq > 1 else 0.0
    share = batch / math.prod(sizes.values())
    return {
        "training": _said(training, mesh, target, 3 * row * share),
        "decoding": _said(decoding, mesh, target, (row - shorter) * share),
    }


def _said(
    program: jax.stages.Compiled, mesh: Any, target: str, flops: float
) -> CompiledStep:
    memory, text = program.memory_analysis(), program.as_text() or ""
    assert memory is not None
    cost = None if is_gpu(target) else program.cost_analysis()
    return CompiledStep(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops,
        cost["bytes accessed"] if cost else None,
        launches(text) if is_gpu(target) else None,
        collectives(text, mesh),
    )


def compiled_report(target: str, steps: Mapping[str, CompiledStep]) -> Iterator[str]:
    """Lines of text."""
    yield f"{'compiled for ' + target + ', bytes on each device':52}" + "".join(
        f"{name:>18}" for name in steps
    )
    for name in ("arguments", "temporaries", "results"):
        numbers = (getattr(step, name) for step in steps.values())
        yield f"  {name:50}" + "".join(f"{x:>18,}" for x in numbers)
    for name, step in steps.items():
        yield from _allowed_time(target, name, step)
        if step.moved is not None:
            yield f"a step of {name} moves {step.moved:,.0f} bytes; loops count once"
        if step.launches is not None:
            unknown = len(step.launches.unknown_loops)
            yield (
                f"a step of {name} launches {step.launches.kernels:,} kernels, and has "
                f"{unknown} loops whose rounds only the device knows"
            )
        totals: dict[tuple, list[int]] = collections.defaultdict(list)
        for item in step.collectives:
            totals[item.kind, item.axes].append(item.num_bytes)
        for (kind, axes), sizes in totals.items():
            over = " x ".join(axes)
            yield f"  {kind:20}{over:22}{len(sizes):>7,} times{sum(sizes):>20,} bytes"


def _allowed_time(target: str, name: str, step: CompiledStep) -> Iterator[str]:
    """The least time of a step, by the rates that the device's maker states."""
    _, products, bandwidth, _ = machine(target)
    if products is not None:
        yield (
            f"a step of {name} takes at least {step.flops / products * 1e3:,.2f} ms to "
            f"multiply, at {products / 1e12:,.0f} TFLOP/s"
        )
    if bandwidth is not None:
        once = (step.arguments + step.results) / bandwidth
        yield (
            f"a step of {name} takes at least {once * 1e3:,.2f} ms to read its "
            f"arguments and write its results, at {bandwidth / 1e12:,.2f} TB/s"
        )
