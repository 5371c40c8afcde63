"""Gathering over mesh axes, and its transpose: a sum of which each device keeps a part.

On CPU devices of several processes, the sum is an all-reduce. XLA's reduce-scatter
sometimes returns wrong numbers there, and fails where one process reaches it half a
minute after another (jax-ml/jax issues 40830 and 40831).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

Axes = str | tuple[str, ...]


def gather(x: Shaped[Array, "*part"], axes: Axes, dim: int) -> Shaped[Array, "*whole"]:
    """The parts of all devices of some mesh axes, major first, joined along `dim`."""
    if _sums_whole() and jnp.issubdtype(x.dtype, jnp.inexact):
        return _gather(x, axes, dim)
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def sum_and_split(
    x: Float[Array, "*whole"], axes: Axes, dim: int
) -> Float[Array, "*part"]:
    """This device's part along `dim` of the sum over all devices of some mesh axes."""
    if not _sums_whole():
        return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    return own_part(lax.psum(x, axes), axes, dim)


def own_part(
    x: Shaped[Array, "*whole"], axes: Axes, dim: int
) -> Shaped[Array, "*part"]:
    """This device's part along `dim` of an array that is equal on all devices."""
    part = x.shape[dim] // size_of(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * part, part, dim)


def size_of(axes: Axes) -> int:
    """The product of the sizes of some mesh axes."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(map(lax.axis_size, names))


def _sums_whole() -> bool:
    """Whether sums are all-reduces, since XLA would leave reduce-scatter to Gloo."""
    return jax.distributed.is_initialized() and jax.default_backend() == "cpu"


# The transpose of `lax.all_gather` is a reduce-scatter.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, axes, dim):
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _backward(axes, dim, _, cotangent):
    return (sum_and_split(cotangent, axes, dim),)


_gather.defvjp(lambda x, axes, dim: (_gather(x, axes, dim), None), _backward)
