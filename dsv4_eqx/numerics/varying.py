"""What the types of arrays say of a mesh: over which axes values vary or are split.

Inside `shard_map`, values vary over some mesh axes and are equal over others.

JAX reconciles the operands of its own operations. A custom derivative rule and the
carry of a loop have to do it themselves; outside `shard_map` this does nothing.
"""

import functools
from collections.abc import Iterable

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array


def match_varying(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each varying over every mesh axis that any of them varies over."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = functools.reduce(frozenset.union, axes)
    return tuple(varying(x, union) for x in arrays)


def shape_varying_like(
    shape: tuple[int, ...], dtype: DTypeLike, *arrays: Array
) -> jax.ShapeDtypeStruct:
    """What a kernel's output is declared as, whose operands are these arrays.

    Pallas may forget over which mesh axes it varies: join the result by `match_varying`
    too.
    """
    kind = jax.typeof(match_varying(*arrays)[0]).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def varying(x: Array, axes: Iterable[str]) -> Array:
    """The same array, of which each device of these mesh axes has one of its own."""
    missing = frozenset(axes) - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def explicit_axes(x: Array) -> tuple[str, ...]:
    """The mesh axes of type Explicit that split an array."""
    entries = [entry or () for entry in jax.typeof(x).sharding.spec]
    axes = ((entry,) if isinstance(entry, str) else entry for entry in entries)
    return tuple(axis for entry in axes for axis in entry)
