"""Attention in which every query of a block sees the same keys, and a sink.

For the few queries of a drafter: they see each other in both directions, so that it is
no sliding window. There is one form, since it costs little.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsv4_eqx.numerics.precision import at_least_float32


def attend_every(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch keys head_dim"],
    seen: Bool[Array, "batch keys"],
    sinks: Float[Array, " heads"],
) -> Float[Array, "batch seq heads head_dim"]:
    """One softmax over the keys that are seen, which are values too, and the sink."""
    wide = at_least_float32(queries)
    keys = keys.astype(wide.dtype)
    logits = jnp.einsum("bqhc,bkc->bqhk", wide, keys) * wide.shape[-1] ** -0.5
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    sink = jnp.broadcast_to(sinks[:, None], (*wide.shape[:3], 1)).astype(wide.dtype)
    weights = jax.nn.softmax(jnp.concatenate([logits, sink], axis=3), axis=3)
    # A key that is not there may hold anything: 0 times that is not 0.
    keys = jnp.where(seen[..., None], keys, 0)
    out = jnp.einsum("bqhk,bkc->bqhc", weights[..., :-1], keys)
    return out.astype(queries.dtype)
