"""Root mean square norms, with and without a weight.

Statistics and the product with the weight are float32; the result is rounded once, to
the dtype that came in (released model code, `RMSNorm`).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.validation import (
    validate_floating,
    validate_number,
    validate_size,
)
from dsv4_eqx.numerics.varying import match_varying


class RMSNorm(eqx.Module):
    r"""Divides by the root mean square of the last dimension, then scales it.

    $y = w \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$

    The weight is float32 in every model: it multiplies float32 statistics.
    """

    weight: Float32[Array, " dim"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, *, eps: float = 1e-6):
        """**Arguments:**

        - `dim`: size of the last dimension of what will be normalised.
        - `eps`: added to the mean square.

        **Raises:** ValueError if `dim` is not a positive integer, or `eps` is negative
        or not finite.
        """
        self.weight = jnp.ones(validate_size("RMSNorm", "dim", dim), jnp.float32)
        self.eps = validate_number("RMSNorm", "eps", eps)

    @jax.named_scope("RMSNorm")
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """**Arguments:**

        - `x`: any leading dimensions, the last one normalised.

        **Raises:** ValueError if the last dimension is not the weight's, or `x` is not
        floating point.
        """
        validate_floating("RMSNorm", x)
        (dim,) = self.weight.shape
        if x.ndim == 0 or x.shape[-1] != dim:
            raise ValueError(
                f"RMSNorm(dim={dim}) was called with x of shape {x.shape}: the last "
                f"dimension must be {dim}."
            )
        wide = at_least_float32(x)
        # Broadcast explicitly: the weight's gradient is then summed over rows before
        # it is summed over devices. And rank promotion may be forbidden.
        weight, wide = match_varying(self.weight.astype(wide.dtype), wide)
        weight = jnp.broadcast_to(weight, wide.shape)
        return (weight * _normalised(wide, self.eps)).astype(x.dtype)


class UnweightedRMSNorm(eqx.Module):
    r"""Divides by the root mean square of the last dimension.

    $y = x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$

    It has no array: nothing to train, to store or to synchronise. DeepSeek-V4 applies
    it to each query head and to the input of the hyper-connections.
    """

    eps: float = eqx.field(static=True)

    def __init__(self, *, eps: float = 1e-6):
        """**Arguments:**

        - `eps`: added to the mean square.

        **Raises:** ValueError if `eps` is negative or not finite.
        """
        self.eps = validate_number("UnweightedRMSNorm", "eps", eps)

    @jax.named_scope("UnweightedRMSNorm")
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """**Arguments:**

        - `x`: any leading dimensions, the last one normalised.

        **Raises:** ValueError if `x` is a scalar, has an empty last dimension, or is
        not floating point.
        """
        validate_floating("UnweightedRMSNorm", x)
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(
                f"UnweightedRMSNorm() was called with x of shape {x.shape}: it needs a "
                "last dimension of at least 1."
            )
        return _normalised(at_least_float32(x), self.eps).astype(x.dtype)


def _normalised(x: Float[Array, "*batch dim"], eps: float) -> Array:
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + eps)
