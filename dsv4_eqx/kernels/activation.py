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
    """silu(min(gate, limit)) times the other half clipped to +-limit, float32.

    **Arguments:**

    - `gate_up`: the gate in the first half of the channels.
    - `limit`: `swiglu_limit`.
    """
    gate, up = jnp.split(at_least_float32(gate_up), 2, axis=-1)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def activate(
    before: Float[Array, "rows both_hidden"],
    weights: Float[Array, " rows"],
    limit: float,
) -> Float[Array, "rows hidden"]:
    """What the down projection multiplies, from what the first one gave; float32.

    **Arguments:**

    - `before`: gate and up, side by side.
    - `weights`: of the rows.
    - `limit`: as for `clamped_swiglu`.
    """
    hidden = clamped_swiglu(before, limit)
    return hidden * weights[:, None].astype(hidden.dtype)
