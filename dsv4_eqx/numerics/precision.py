"""The floor under every float32 island.

Parameters and activations have the dtype that the user chose; norm statistics, the
router, the hyper-connections, the compressor's pooling, softmax and logits are at
least float32 whatever that is. float64 stays float64, so that finite differences can
check the whole model.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.astype(wide_dtype(x.dtype))


def wide_einsum(equation: str, *operands: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` that accumulates and returns at least float32.

    bfloat16 operands need no cast first: their products are exact in float32.
    """
    dtype = wide_dtype(operands[0].dtype)
    return jnp.einsum(
        equation,
        *operands,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32, or `dtype` where that is wider."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype
