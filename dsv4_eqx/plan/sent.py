"""What a traced program sends between devices, with how often and from which layer.

Bytes are those of a collective's result on one device, as in `sharding.collectives`,
so that plan and compiled program can be compared.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

# As in HLO.
_KINDS: Final = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
}
# These name mesh axes and send nothing.
_LOCAL: Final = {"axis_index", "pvary", "pcast", "pbroadcast", "shard_map"}
_SCOPE: Final = re.compile(r"layers\.\w+\.\d+")
OUTSIDE: Final = "outside of layers"


class Sent(NamedTuple):
    """One collective of a program."""

    place: str  # "layers.first.0", or `OUTSIDE`
    kind: str  # as in HLO: "all-reduce", "all-to-all", ...
    axes: tuple[str, ...]  # the mesh axes that it runs over
    num_bytes: int  # of its result on one device
    times: int  # that it runs in a step
    most: int  # the same if experts are chosen in the most uneven way


def sent(program: Jaxpr, sizes: Mapping[str, int]) -> list[Sent]:
    """Every collective of a traced program.

    A branch counts in `Sent.most` alone, as where experts exchange tokens: a loop has
    further rounds enough for any routing, of which a balanced one needs none.
    """
    return list(_walk(program, sizes, OUTSIDE, 1, 1))


def on_the_wire(item: Sent, sizes: Mapping[str, int]) -> float:
    """Bytes that leave a device in a step, by ring algorithms."""
    devices = math.prod(sizes[axis] for axis in item.axes)
    others = (devices - 1) / devices
    share = {
        "all-reduce": 2 * others,
        "reduce-scatter": devices - 1,
        "collective-permute": 1,
    }.get(item.kind, others)
    return share * item.num_bytes * item.times


def bytes_of(variable: Any) -> int:
    """Bytes of a value in a program."""
    shape = getattr(variable.aval, "shape", ())
    dtype = getattr(variable.aval, "dtype", None)
    return 0 if dtype is None else math.prod(shape) * dtype.itemsize


def inner_programs(equation: Any) -> list[Jaxpr]:
    """The bodies, branches and called functions of an equation."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found


def _walk(
    program: Jaxpr, sizes: Mapping[str, int], place: str, times: int, most: int
) -> Iterator[Sent]:
    """The collectives of a program that runs `times`, or at most `most` times."""
    for equation in program.eqns:
        scope = _SCOPE.search(str(equation.source_info.name_stack))
        here = scope[0] if scope else place
        name = equation.primitive.name
        axes = tuple(axis for axis in _axes(equation) if sizes.get(axis, 1) > 1)
        if name in _KINDS and axes:
            num_bytes = sum(map(bytes_of, equation.outvars))
            yield Sent(here, _KINDS[name], axes, num_bytes, times, most)
        inner = inner_programs(equation)
        # A collective that is not known here must not go unseen.
        assert name in _KINDS or name in _LOCAL or inner or not axes, name
        rounds = equation.params["length"] if name == "scan" else 1
        at_least = 0 if name == "cond" else rounds
        for body in inner:
            yield from _walk(body, sizes, here, times * at_least, most * rounds)


def _axes(equation: Any) -> tuple[str, ...]:
    params = equation.params
    axes = params.get("axes", params.get("axis_name", ()))
    axes = (axes,) if isinstance(axes, str) else axes
    named = isinstance(axes, tuple | list | frozenset | set)
    return tuple(axis for axis in axes if isinstance(axis, str)) if named else ()
