"""What attention keeps of the tokens before: a window of keys, entries, and leftovers.

A state is a value: extending it gives another one and leaves the first as it was. Its
shapes are fixed by a capacity in tokens; each row of a batch is as far as it is. What
has not been written yet is never looked at, whatever it holds.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


class CompressorState(eqx.Module):
    """A compressor's entries so far, and the tokens whose window is not complete.

    Entry w covers the tokens from w x ratio on; the last `pending` tokens are in order,
    the latest one last. With overlapping windows that includes the window before.
    """

    values: Float[Array, "batch pending series head_dim"]
    gates: Float[Array, "batch pending series head_dim"]
    entries: Float[Array, "batch entries head_dim"]


class AttentionCache(eqx.Module):
    """The state of one attention layer; the latest key comes last."""

    window_keys: Float[Array, "batch keys head_dim"]
    compressor: CompressorState | None
    indexer: CompressorState | None


def positions_after(
    start: Int[Array, " batch"], lengths: Int[Array, " batch"], seq: int
) -> Int[Array, "batch seq"]:
    """Positions of new tokens; -1 for the padding after them.

    **Arguments:**

    - `start`: tokens that each row has already.
    - `lengths`: new tokens of each row.
    - `seq`: room for new tokens.
    """
    index = jnp.arange(seq, dtype=jnp.int32)
    return jnp.where(index < lengths[:, None], start[:, None] + index, -1)


def rows_from(
    x: Shaped[Array, "batch seq ..."], begin: Int[Array, " batch"], size: int
) -> Shaped[Array, "batch size ..."]:
    """Consecutive tokens of each row.

    **Arguments:**

    - `x`: rows of tokens.
    - `begin`: where each row's begin.
    - `size`: how many.
    """
    return jax.vmap(lambda row, i: lax.dynamic_slice_in_dim(row, i, size))(x, begin)
