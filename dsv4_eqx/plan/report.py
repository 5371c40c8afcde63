"""A plan in words and numbers."""

import collections
import math
import re
from collections.abc import Iterator

from dsv4_eqx.plan.plan import Plan, StepPlan
from dsv4_eqx.plan.sent import OUTSIDE, Sent, on_the_wire

_WORDS = {
    "optimizer state": "optimizer state (Adam's two moments)",
    "cache": "cache (each step's takes the place of the last)",
    "activations": "activations (an estimate)",
}
GB = 10**9


def report(plan: Plan, memory: float | None = None) -> tuple[str, bool]:
    """The tables, and whether a device with `memory` GB of 10**9 bytes has enough."""
    mesh = plan.model.mesh
    shown = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    dtype = plan.model.model.embedding.dtype
    lines = [
        f"{math.prod(mesh.shape.values()):,} devices: {shown}; {dtype} weights"
        + (", split over data too" if plan.model.fsdp else ""),
        f"training {plan.batch:,} rows of {plan.seq:,} tokens; decoding one token of "
        f"{plan.batch:,} rows with caches of {plan.seq:,}",
        "",
    ]
    lines += [*_held_table(plan), ""]
    verdicts, fits = _verdicts(plan, memory)
    lines += [*verdicts, ""] if verdicts else []
    lines += _sent_table("a training step", plan, plan.training)
    lines += ["", *_sent_table("a decoding step", plan, plan.decoding)]
    return "\n".join(lines), fits


def _held_table(plan: Plan) -> Iterator[str]:
    yield f"{'bytes on each device':52}{'training':>18}{'decoding':>18}"
    steps = plan.training.held, plan.decoding.held
    for name in dict.fromkeys([*steps[0], *steps[1]]):
        numbers = (f"{held[name]:,}" if name in held else "" for held in steps)
        yield f"  {_WORDS.get(name, name):50}" + "".join(f"{x:>18}" for x in numbers)
    totals = (f"{sum(held.values()):,}" for held in steps)
    yield f"  {'total':50}" + "".join(f"{x:>18}" for x in totals)


def _verdicts(plan: Plan, memory: float | None) -> tuple[list[str], bool]:
    if memory is None:
        return [], True
    lines, all_fit = [], True
    for name, step in (("training", plan.training), ("decoding", plan.decoding)):
        needed = sum(step.held.values()) / GB
        fits = needed <= memory
        verdict = "fits" if fits else "does not fit"
        lines.append(f"{name} {verdict}: {needed:,.1f} of {memory:,.1f} GB")
        all_fit = all_fit and fits
    return lines, all_fit


def _sent_table(title: str, plan: Plan, step: StepPlan) -> Iterator[str]:
    """Bytes by layer, collective and axes."""
    sizes = plan.model.mesh.shape
    yield (
        f"sent in {title}: bytes of the results on one device, and those that a ring "
        "sends from it"
    )
    yield f"  {'where':22}{'collective':20}{'over':22}{'times':>7}" + (
        f"{'result bytes':>20}{'sent bytes':>20}"
    )
    groups: dict[tuple, list[Sent]] = collections.defaultdict(list)
    for item in step.sent:
        groups[_layers(plan, item.place), item.kind, item.axes].append(item)
    for item in step.sent:
        groups["all", item.kind, item.axes].append(item)
    for (where, kind, axes), items in groups.items():
        times = sum(item.times for item in items)
        results = sum(item.num_bytes * item.times for item in items)
        wire = sum(on_the_wire(item, sizes) for item in items)
        yield f"  {where:22}{kind:20}{' x '.join(axes):22}{times:>7,}" + (
            f"{results:>20,}{wire:>20,.0f}"
        )
    if not step.sent:
        yield "  nothing"
    uneven = sum(x.num_bytes * (x.most - x.times) for x in step.sent)
    if uneven:
        yield (
            f"  and at most {uneven:,} bytes of results more, if all tokens choose "
            "experts of the same device"
        )


def _layers(plan: Plan, place: str) -> str:
    """The layers that a scope of `Layers` stands for."""
    match = re.fullmatch(r"layers\.(\w+)\.(\d+)", place)
    if match is None:
        return OUTSIDE
    layers, place_in = plan.model.model.layers, int(match[2])
    start, unit = len(layers.first), len(layers.repeated)
    if match[1] == "first":
        return f"layer {place_in}"
    if match[1] == "last":
        return f"layer {start + unit * layers.num_repeats + place_in}"
    return f"layers {start + place_in}, +{unit}, x {layers.num_repeats}"
