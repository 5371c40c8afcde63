"""The product of activations and a weight of any number of dimensions."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_eqx.numerics.precision import wide_einsum


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    *,
    over: int = 1,
    wide: bool = False,
) -> Float[Array, "..."]:
    """Sums over the last `over` dimensions of both; the weight's others come last.

    It is one product of matrices, whatever the dimensions are: no transpose of a weight
    that has three of them is ever laid out. `wide` makes it at least float32.
    """
    outer, inner = weight.shape[:-over], weight.shape[-over:]
    if x.shape[-over:] != inner:
        raise ValueError(
            f"project: x of shape {x.shape} does not end in {inner}, as the weight of "
            f"shape {weight.shape} does."
        )
    size = math.prod(inner)
    rows, matrix = x.reshape(*x.shape[:-over], size), weight.reshape(-1, size)
    einsum = wide_einsum if wide else jnp.einsum
    out = einsum("...i,oi->...o", rows, matrix)
    return out.reshape(*out.shape[:-1], *outer)
