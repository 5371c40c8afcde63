"""What attention keeps of the tokens before: a window of keys, entries, and leftovers.

A state is a value: extending it gives another one and leaves the first as it was. Its
shapes are fixed by a capacity in tokens; each row of a batch is as far as it is. What
has not been written yet has the weight 0, whatever finite numbers it holds.

Extending first gives a longer state, with the keys and leftovers of all new tokens, of
which `keep` takes those that stay. Entries need no going back: one that a token too
many completed is written again before any token can see it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from dsv4_eqx.kernels.entries import Values


class CompressorState(eqx.Module):
    """A compressor's entries so far, and the tokens whose window is not complete.

    Entry w covers the tokens from w x ratio on; the last `pending` tokens are in order,
    the latest one last. With overlapping windows that includes the window before.
    """

    values: Float[Array, "batch pending series head_dim"]
    gates: Float[Array, "batch pending series head_dim"]
    entries: Values

    def keep(self, lengths: Int[Array, " batch"], seq: int) -> "CompressorState":
        """**Arguments:** as for `AttentionCache.keep`."""
        size = self.values.shape[1] - seq
        values = rows_from(self.values, lengths, size)
        return CompressorState(
            values, rows_from(self.gates, lengths, size), self.entries
        )


def mark_entries(caches: PyTree) -> PyTree[bool]:
    """Marks compressors' entries, for `eqx.partition`.

    **Arguments:**

    - `caches`: a tree of states.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, CompressorState)

    def mark(node: Any) -> PyTree[bool]:
        nothing = jax.tree.map(lambda _: False, node)
        if not is_state(node):
            return nothing
        return eqx.tree_at(lambda state: state.entries, nothing, True)

    return jax.tree.map(mark, caches, is_leaf=is_state)


class AttentionCache(eqx.Module):
    """The state of one attention layer; the latest key comes last."""

    window_keys: Float[Array, "batch keys head_dim"]
    compressor: CompressorState | None
    indexer: CompressorState | None

    def keep(self, lengths: Int[Array, " batch"], seq: int) -> "AttentionCache":
        """The state after the first of the new tokens.

        **Arguments:**

        - `lengths`: of each row's new tokens, those that stay.
        - `seq`: new tokens that the state was extended by.
        """
        size = self.window_keys.shape[1] - seq
        compressor, indexer = (
            None if state is None else state.keep(lengths, seq)
            for state in (self.compressor, self.indexer)
        )
        return AttentionCache(
            rows_from(self.window_keys, lengths, size), compressor, indexer
        )


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
