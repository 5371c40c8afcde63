"""The experts' activation, a clamped SwiGLU, and the routing weight it is given.

The gate is clamped from above, the other branch on both sides; the weight is applied in
float32, before the down projection (released code).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_eqx.numerics.precision import at_least_float32


def clamped_swiglu(
    gate_up: Float[Array, "*batch both_hidden"], limit: float
) -> Float[Array, "*batch hidden"]:
    """silu(min(gate, limit)) clip(up, +-limit), float32; the gate is the first half."""
    gate, up = jnp.split(at_least_float32(gate_up), 2, axis=-1)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def activate(
    before: Float[Array, "rows both_hidden"],
    weights: Float[Array, " rows"],
    limit: float,
) -> Float[Array, "rows hidden"]:
    """What `down` multiplies: the activation, times the rows' weights; float32."""
    hidden = clamped_swiglu(before, limit)
    return hidden * weights[:, None].astype(hidden.dtype)
