"""What a compiled program sends between devices, read from the program itself."""

import itertools
import math
import re
from typing import Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

_INSTRUCTION: Final = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|"
    r"reduce-scatter|collective-permute|ragged-all-to-all)(?:-start)?\("
)
_ARRAY: Final = re.compile(r"([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_GROUPS: Final = re.compile(
    r"replica_groups=(?P<listed>\{\{.*?\}\}|\{\})|"
    r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<perm>[\d,]+)\))?"
)
_PAIRS: Final = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str  # as in HLO: "all-reduce", "all-to-all", ...
    axes: tuple[str, ...]  # the mesh axes whose devices take part together
    num_bytes: int  # of its result on one device


def collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled program; one in a loop counts once.

    **Arguments:**

    - `compiled`: from `jax.jit(f).lower(...).compile()`.
    - `mesh`: the mesh that it runs on.
    """
    found = []
    for line in (compiled.as_text() or "").splitlines():
        match = _INSTRUCTION.search(line)
        if match:
            axes = _axes(_replica_groups(line), mesh)
            found.append(Collective(match["kind"], axes, _num_bytes(match["shape"])))
    return found


def _num_bytes(shape: str) -> int:
    total = 0
    for name, dims in _ARRAY.findall(shape):
        bits = 8 if name == "pred" else int(re.findall(r"\d+", name)[0])
        sizes = [int(size) for size in dims.split(",") if size]
        total += math.prod(sizes) * bits // 8
    return total


def _replica_groups(line: str) -> list[frozenset[int]]:
    pairs = _PAIRS.search(line)
    if pairs:
        return _linked(re.findall(r"(\d+),(\d+)", pairs[1]))
    match = _GROUPS.search(line)
    if match is None:
        return []
    if match["shape"]:
        ids = np.arange(math.prod(_ints(match["dims"]))).reshape(_ints(match["dims"]))
        ids = ids.transpose(_ints(match["perm"])) if match["perm"] else ids
        return [frozenset(row) for row in ids.reshape(_ints(match["shape"])).tolist()]
    groups = re.findall(r"\{([\d,]+)\}", match["listed"])
    return [frozenset(_ints(group)) for group in groups]


def _linked(pairs: list[tuple[str, str]]) -> list[frozenset[int]]:
    """Devices that a permutation connects."""
    groups: list[frozenset[int]] = []
    for source, target in pairs:
        group = frozenset((int(source), int(target)))
        touching = [other for other in groups if other & group]
        groups = [other for other in groups if not other & group]
        groups.append(group.union(*touching))
    return groups


def _axes(groups: list[frozenset[int]], mesh: Mesh) -> tuple[str, ...]:
    """The smallest set of mesh axes whose groups of devices these are."""
    wanted = {group for group in groups if len(group) > 1}
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    names = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            dims = [mesh.axis_names.index(name) for name in chosen]
            last = np.moveaxis(places, dims, range(-count, 0)) if dims else places
            size = math.prod(mesh.shape[name] for name in chosen)
            rows = last.reshape(-1, size).tolist()
            if wanted == {frozenset(row) for row in rows if size > 1}:
                return chosen
    # No group is named: all devices take part.
    return tuple(names)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
