"""What a compiled program sends between devices, read from the program itself."""

import math
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

_INSTRUCTION: Final = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|"
    r"reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all)"
    r"(?P<start>-start)?\("
)
_ARRAY: Final = re.compile(r"([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
# Groups of devices are listed, {{0,1},{2,3}} or {} for all in one, as are pairs; or
# counted, [2,2]<=[4] for the rows of a reshaped and perhaps transposed arange(4); or
# axes of a mesh that XLA made up, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}.
_LISTED: Final = re.compile(
    r"(?:replica_groups|source_target_pairs)=\{(?:\}|(\{.*?\})\})"
)
_COUNTED: Final = re.compile(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_NAMED: Final = re.compile(
    r"replica_groups=mesh\[(?P<sizes>['\w=,]+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(?P<axes>['\w,]+)\}"
)


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str  # as in HLO: "all-reduce", "all-to-all", ...
    axes: tuple[str, ...]  # the mesh axes along which its devices lie
    num_bytes: int  # of its result on one device


def collectives(program: jax.stages.Compiled | str, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled program; one in a loop counts once."""
    text = program if isinstance(program, str) else program.as_text() or ""
    found = []
    for line in text.splitlines():
        match = _INSTRUCTION.search(line)
        if match:
            arrays = _ARRAY.findall(match["shape"])
            if match["start"] and match["kind"] != "all-reduce":
                arrays = _results(arrays)
            axes = _axes(_groups(line, mesh), mesh)
            found.append(Collective(match["kind"], axes, _num_bytes(arrays)))
    return found


def _results(arrays: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of what an instruction that runs beside others holds: operands, results, and
    perhaps counters. An all-reduce holds its results alone."""
    arrays = [(name, dims) for name, dims in arrays if (name, dims) != ("u32", "")]
    return arrays[len(arrays) // 2 :]


def _num_bytes(arrays: list[tuple[str, str]]) -> int:
    total = 0
    for name, dims in arrays:
        bits = 8 if name == "pred" else int(re.findall(r"\d+", name)[0])
        total += math.prod(_ints(dims)) * bits // 8
    return total


def _groups(line: str, mesh: Mesh) -> Iterable[list[int]]:
    """The devices that take part together, by their place in the mesh."""
    listed, counted, named = (form.search(line) for form in (_LISTED, _COUNTED, _NAMED))
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1] or "")
        return [_ints(group) for group in groups] or [list(range(mesh.size))]
    if counted:
        shape, dims, permutation = counted.groups()
        return _places(dims, permutation).reshape(_ints(shape)).tolist()
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named["sizes"]))
        places = _places(named[2] or ",".join(sizes.values()), named[3])
        places = places.reshape([int(size) for size in sizes.values()])
        chosen = [list(sizes).index(axis) for axis in re.findall(r"\w+", named["axes"])]
        last = np.moveaxis(places, chosen, range(-len(chosen), 0))
        return last.reshape(-1, math.prod(last.shape[-len(chosen) :])).tolist()
    raise ValueError(f"collectives: which devices take part in {line.strip()!r}?")


def _places(dims: str, permutation: str | None) -> np.ndarray:
    places = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return places.transpose(_ints(permutation)) if permutation else places


def _axes(groups: Iterable[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which devices of one group differ."""
    sizes = tuple(mesh.shape.values())
    differing = np.zeros(len(sizes), bool)
    for group in groups:
        differing |= np.ptp(np.unravel_index(group, sizes), axis=1) > 0
    return tuple(axis for axis, differs in zip(mesh.axis_names, differing) if differs)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
