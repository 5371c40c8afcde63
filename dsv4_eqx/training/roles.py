"""How each parameter is optimized, read from its annotation by one table.

Paper section 2.4: Muon for matrices, each "logically independent weight" alone, and
AdamW for the rest. `query_up: Float[Array, "heads head_dim q_rank"]` is a matrix for
each head, `output_up: Float[Array, "dim groups out_per_group"]` is a single one, with a
row for each of `dim`. Stacked layers have matrices of their own.
"""

import collections
import enum
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_eqx.numerics.validation import invalid_argument
from dsv4_eqx.sharding.annotations import AnnotatedLeaf, annotated_leaves


class DimensionRole(enum.Enum):
    """What a dimension means for the optimizer, where an array has several."""

    SEPARATE = enum.auto()  # if it leads a matrix: each index has a matrix of its own
    SIDE = enum.auto()  # rows or columns of a matrix
    LOOKUP = enum.auto()  # the array is a row for each token: AdamW
    BIAS = enum.auto()  # the array is added: AdamW, not decayed
    FACTOR = enum.auto()  # the array is a factor of an adapter: AdamW


# Names that are numbers, such as the 2 of gate and up projection, are SEPARATE.
DIMENSION_ROLES: Final[Mapping[str, DimensionRole]] = types.MappingProxyType(
    {
        "heads": DimensionRole.SEPARATE,
        "index_heads": DimensionRole.SEPARATE,
        "groups": DimensionRole.SEPARATE,
        "series": DimensionRole.SEPARATE,
        "experts": DimensionRole.SEPARATE,
        "dim": DimensionRole.SIDE,
        "streams": DimensionRole.SIDE,
        "mixes": DimensionRole.SIDE,
        "head_dim": DimensionRole.SIDE,
        "q_rank": DimensionRole.SIDE,
        "in_per_group": DimensionRole.SIDE,
        "out_per_group": DimensionRole.SIDE,
        "index_dim": DimensionRole.SIDE,
        "expert_hidden": DimensionRole.SIDE,
        "shared_hidden": DimensionRole.SIDE,
        "routes": DimensionRole.SIDE,
        "targets": DimensionRole.SIDE,
        "markov_rank": DimensionRole.SIDE,
        "confidence_in": DimensionRole.SIDE,
        "vocab": DimensionRole.LOOKUP,
        "ratio": DimensionRole.BIAS,
        # AdamW, as all published recipes have it. Muon would give every singular value
        # of a factor's update one size, and what counts is their product, whose other
        # factor is still zero or small.
        "adapter_rank": DimensionRole.FACTOR,
    }
)


class Kind(enum.StrEnum):
    """How an array is optimized, if not by the user's own transformation."""

    MUON = "muon"
    DECAYED = "adamw"
    NOT_DECAYED = "adam"


_TITLES: Final[Mapping[str, str]] = types.MappingProxyType(
    {
        Kind.MUON: "Muon, decayed",
        Kind.DECAYED: "AdamW, decayed",
        Kind.NOT_DECAYED: "AdamW, not decayed",
    }
)


class LeafRole(NamedTuple):
    """How one array is optimized."""

    name: str  # path in the model
    shape: tuple[int, ...]
    kind: str  # a `Kind`, or `own_kind` of a key of the user's transformations
    num_stacked: int  # leading dimensions that the annotation does not name
    num_separate: int  # leading dimensions, stacked ones too, that count matrices

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Number of matrices, their rows and their columns."""
        separate = self.shape[: self.num_separate]
        rows, *columns = self.shape[self.num_separate :]
        return math.prod(separate), rows, math.prod(columns)


def own_kind(key: str) -> str:
    """The kind of the arrays that a key of `own` is for."""
    return f"own {key}"


def leaf_roles(call: str, trained: Any, own: Iterable[str] = ()) -> list[LeafRole]:
    """The role of every array, in the order of `jax.tree.leaves`.

    **Raises:** ValueError naming the array if it is not floating-point, or its
    annotation does not say which matrices it holds.
    """
    return [_leaf_role(call, leaf, tuple(own)) for leaf in annotated_leaves(trained)]


def kinds(call: str, trained: Any, own: Iterable[str] = ()) -> Any:
    """The tree with each array's kind in its place."""
    found = [role.kind for role in leaf_roles(call, trained, own)]
    return jax.tree.unflatten(jax.tree.structure(trained), found)


def describe_optimizer(trained: Any, own: Mapping[str, Any] | None = None) -> str:
    """A table of how `optimizer` trains each array, and what they add up to.

    `print(describe_optimizer(trained))`

    **Arguments, raises:** `trained` and `own` as for `optimizer`.
    """
    own = validate_own("describe_optimizer", trained, own)
    roles = leaf_roles("describe_optimizer", trained, own)
    rows = [(role.name, _sizes(role.shape), _described(role)) for role in roles]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines = [
        f"{name:{widths[0]}}  {shape:{widths[1]}}  {text}" for name, shape, text in rows
    ]
    totals = collections.Counter[str]()
    for role in roles:
        totals[_TITLES.get(role.kind, role.kind)] += math.prod(role.shape)
    ending = [f"{title}: {count:,} parameters" for title, count in totals.items()]
    return "\n".join(lines + ending)


def validate_own(
    call: str, trained: Any, own: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The user's own transformations; an error if one is for no array."""
    own = {} if own is None else own
    allowed = 'a mapping like {"shared.down": optax.adamw(1e-3)}'
    if not isinstance(own, Mapping) or not all(isinstance(key, str) for key in own):
        raise invalid_argument(call, "own", own, allowed)
    names = [leaf.name for leaf in annotated_leaves(trained)]
    for key in own:
        if not any(path_contains(key, name) for name in names):
            raise ValueError(
                f"{call}: own has the key {key!r}, and no array of the model has it in "
                "its path; `print(describe_optimizer(trained))` shows the paths."
            )
    return dict(own)


def _leaf_role(call: str, leaf: AnnotatedLeaf, own: tuple[str, ...]) -> LeafRole:
    dtype = getattr(leaf.array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        found = type(leaf.array).__name__ if dtype is None else dtype
        raise ValueError(
            f"{call}: {leaf.name} is {found}, which is not trained: give the first of "
            "`equinox.partition(model, dsv4_eqx.trainable(model))`."
        )
    dims, shape = leaf.dims or (), tuple(leaf.array.shape)
    num_stacked = len(shape) - len(dims)
    keys = [key for key in own if path_contains(key, leaf.name)]
    if len(keys) > 1:
        raise ValueError(
            f"{call}: the keys {keys} of own are all for {leaf.name}; leave one."
        )
    if keys:
        return LeafRole(leaf.name, shape, own_kind(keys[0]), 0, 0)
    _validate_dims(call, leaf)
    roles = [_dimension_role(name) for name in dims]
    if len(dims) < 2 or DimensionRole.BIAS in roles:
        return LeafRole(leaf.name, shape, Kind.NOT_DECAYED, num_stacked, 0)
    if DimensionRole.LOOKUP in roles or DimensionRole.FACTOR in roles:
        return LeafRole(leaf.name, shape, Kind.DECAYED, num_stacked, 0)
    separate = 0
    while roles[separate] is DimensionRole.SEPARATE and len(dims) - separate > 2:
        separate += 1
    return LeafRole(leaf.name, shape, Kind.MUON, num_stacked, num_stacked + separate)


def _validate_dims(call: str, leaf: AnnotatedLeaf) -> None:
    """Refuses an array whose annotation says too little."""
    key = ".".join(_path(leaf.name)[-2:])
    remedy = f"say how it is trained: own={{{key!r}: optax.adamw(...)}}."
    if leaf.dims is None:
        raise ValueError(f"{call}: {leaf.name} has no shape annotation; {remedy}")
    if len(leaf.dims) > leaf.array.ndim:
        raise ValueError(
            f"{call}: {leaf.name} has the shape {leaf.array.shape}, fewer dimensions "
            f"than its annotation {' '.join(leaf.dims)!r}."
        )
    if len(leaf.dims) < 2:
        return
    for name in leaf.dims:
        if _dimension_role(name) is None:
            raise ValueError(
                f"{call}: {leaf.name} has the dimensions {' '.join(leaf.dims)!r}, and "
                f"{name!r} is none of a matrix in dsv4_eqx.DIMENSIONS; {remedy}"
            )


def _dimension_role(name: str) -> DimensionRole | None:
    return DimensionRole.SEPARATE if name.isdigit() else DIMENSION_ROLES.get(name)


def _path(name: str) -> list[str]:
    """Names and numbers on the way to an array."""
    return re.findall(r"\w+", name)


def path_contains(key: str, name: str) -> bool:
    """Whether the names in the key follow one another in the path."""
    return f".{'.'.join(_path(key))}." in f".{'.'.join(_path(name))}."


def _sizes(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "scalar"


def _described(role: LeafRole) -> str:
    title = _TITLES.get(role.kind, role.kind)
    if role.kind != Kind.MUON:
        return title
    count, rows, columns = role.matrices
    noun = "matrix" if count == 1 else "matrices"
    return f"{title}, {count:,} {noun} of {rows} x {columns}"
