"""Random initial weights, small ones from few programs.

`jax.random.normal` is a program of its own for each shape, and compiling one takes
longer than drawing a million numbers. Its numbers depend on the key and on the place in
the array alone, so that outside of `jit` small arrays are cut from a few lengths.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

_LENGTHS: Final = (1 << 13, 1 << 16, 1 << 18)


def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike, *, std: float
) -> Float[Array, "..."]:
    """`std * jax.random.normal(key, shape, dtype)`, to the bit."""
    size = math.prod(shape)
    lengths = [length for length in _LENGTHS if length >= size]
    if not lengths or not _may_cut(key):
        return std * jax.random.normal(key, shape, dtype)
    drawn = np.asarray(jax.random.normal(key, lengths[:1], dtype))
    # Unlike jnp.asarray, this compiles nothing.
    return jax.device_put(drawn[:size].reshape(shape) * drawn.dtype.type(std))


def stack(make: Callable[[PRNGKeyArray], Any], keys: Shaped[Array, "keys ..."]) -> Any:
    """Modules of all the keys, their arrays stacked: `eqx.filter_vmap(make)(keys)`."""
    if not _may_cut(keys):
        return eqx.filter_vmap(make)(keys)

    def joined(*arrays: Array) -> Array:
        if arrays[0].size > _LENGTHS[-1]:
            return jnp.stack(arrays)
        return jax.device_put(np.stack(arrays))

    return jax.tree.map(joined, *map(make, keys))


def _may_cut(key: Shaped[Array, "..."]) -> bool:
    """Whether numbers are drawn here and now, on the default device, place by place."""
    # A key may be known where everything that is computed is traced.
    computed = jax.lax.add(np.int32(0), np.int32(0))
    if any(isinstance(x, jax.core.Tracer) for x in (key, computed)):
        return False
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(key))
    else:
        impl = str(jax.config.jax_default_prng_impl)  # pyright: ignore
    return impl == "threefry2x32" and not getattr(key, "committed", False)
