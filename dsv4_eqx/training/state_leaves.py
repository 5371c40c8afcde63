"""The arrays of a training state under names, and what tells two states apart.

A name is the path to the leaf, as in `['model'].layers.first[0].moe.experts.down`. The
wrapper `ShardedModel` adds nothing to it, so that a state has the same names on one
device and over any mesh. None has no name, and neither do static fields.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_eqx.sharding.sharded_model import ShardedModel

SCALARS: Final = (bool, int, float)
_WRAPPED: Final = jax.tree_util.GetAttrKey("model")  # the field of ShardedModel


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves that are saved, by name, in the order of `jax.tree.leaves`.

    Those are arrays, abstract ones too, and Python's numbers and booleans; functions
    and other objects are not.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {name_of(state, path): leaf for path, leaf in leaves if is_saved(leaf)}


def name_of(state: Any, path: tuple[Any, ...]) -> str:
    """The path without the wrappers of sharded models."""
    kept, node = [], state
    for key in path:
        if not (isinstance(node, ShardedModel) and key == _WRAPPED):
            kept.append(key)
        node = _child(node, key)
    return jax.tree_util.keystr(tuple(kept)) or "the state"


def is_saved(leaf: Any) -> bool:
    """Whether a leaf is of the kinds that a checkpoint has."""
    return isinstance(leaf, (*SCALARS, np.generic)) or is_array(leaf)


def is_array(leaf: Any) -> bool:
    """Whether it is an array, or the shape of one."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_key(leaf: Any) -> bool:
    """Whether it is an array of keys of `jax.random`."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def description(leaf: Any) -> str:
    """What must be equal for a leaf to take another one's place."""
    if isinstance(leaf, SCALARS) and not isinstance(leaf, np.generic):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"


def raw(leaf: Any) -> Any:
    """The array to write: of keys, their bits; abstract if the leaf is."""
    if not is_key(leaf):
        return leaf if is_array(leaf) else np.asarray(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def placement(leaf: Any) -> Any:
    """What the array is to be read as: on its devices, or in host memory first.

    An array that JAX may move, as `jnp.ones(3)`, must not become one that is bound to
    its device: it could no longer be used together with those over a mesh.
    """
    array = raw(leaf)
    is_bound = getattr(array, "committed", True)
    sharding = getattr(array, "sharding", None) if is_bound else None
    if sharding is None:
        return np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def from_read(leaf: Any, array: Any, key_kind: str | None) -> Any:
    """What was read, as `leaf` is: a key, a JAX array or numpy's."""
    if key_kind is not None:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=key_kind)
    if isinstance(leaf, np.generic):
        return array[()]
    return array if isinstance(leaf, np.ndarray) else jnp.asarray(array)


def difference(found: dict[str, str], wanted: dict[str, str]) -> str | None:
    """The first leaf in which two states differ, from names and descriptions."""
    for name, what in wanted.items():
        if name not in found:
            return f"it has no {name}, which is {what} here"
        if found[name] != what:
            return f"{name} is {found[name]} in it and {what} here"
    for name, what in found.items():
        if name not in wanted:
            return f"it has {name}, {what}, which is not here"
    return None


def _child(node: Any, key: Any) -> Any:
    """What lies at one key of a path."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    if isinstance(key, jax.tree_util.FlattenedIndexKey):  # of a container of one's own
        return None
    return node[getattr(key, "idx", getattr(key, "key", None))]
