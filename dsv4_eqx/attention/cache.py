"""What attention keeps of the tokens before: a window of keys, entries, and leftovers.

A state is a value: extending it gives another one and leaves the first as it was. Its
shapes are fixed by a capacity in tokens; each row of a batch is as far as it is. What
has not been written yet has the weight 0, whatever finite numbers it holds. Rows come
first in every array, so that `jax.tree.map(lambda x: x[order], state)` reorders them;
layers that are stacked have a dimension for the repetitions behind it.

Extending first gives an `Extended`, with the keys and leftovers of all new tokens, of
which `keep` takes those that stay. Entries need no going back: one that a token too
many completed is written again before any token can see it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dsv4_eqx.numerics.slice import Slice
from dsv4_eqx.numerics.validation import validate_counts


class CompressorState(eqx.Module):
    """A compressor's entries so far, and the tokens whose window is not complete.

    Entry w covers the tokens from w x ratio on; the last `pending` tokens are in order,
    the latest one last. With overlapping windows that includes the window before.
    """

    values: Float[Array, "batch *repeats pending series head_dim"]
    gates: Float[Array, "batch *repeats pending series head_dim"]
    entries: Float[Array, "batch *repeats entries head_dim"] | Slice


class AttentionCache(eqx.Module):
    """The state of one attention layer; the latest key comes last."""

    window_keys: Float[Array, "batch *repeats keys head_dim"]
    compressor: CompressorState | None
    indexer: CompressorState | None


# A part's state, or those of several layers.
States = CompressorState | AttentionCache | tuple[AttentionCache, ...]


class Extended(eqx.Module):
    """A state with new tokens, before it is settled how many of them stay.

    It cannot be extended again: `keep` gives the state that can.
    """

    longer: States  # `seq` more tokens in its windows than the state that `keep` gives
    seq: int = eqx.field(static=True)

    def keep(self, lengths: Int[Array | np.ndarray, " batch"]) -> Any:
        """The state after the first of the new tokens.

        **Arguments:**

        - `lengths`: of each row's new tokens, those that stay.

        **Returns:** a state of the kind that was extended.

        **Raises:** ValueError if there is not an integer for each row, or one of them
        is outside `[0, seq]`, which is not checked under `jit`.
        """
        batch = jax.tree.leaves(self.longer)[0].shape[0]
        whole = np.full(batch, self.seq, np.int32)
        lengths = jnp.asarray(validate_counts("Extended.keep", lengths, whole))

        def kept(x: Array, tokens: int) -> Array:
            return rows_from(x, lengths, x.shape[tokens] - self.seq, tokens)

        return map_states(kept, lambda entries: entries, self.longer)


def validate_state(call: str, state: Any, kind: type) -> None:
    """Refuses what is no state of this kind, above all one that is not settled.

    **Arguments:**

    - `call`: what the user called.
    - `state`: what was given.
    - `kind`: what it must be.

    **Raises:** ValueError if it is something else.
    """
    if isinstance(state, Extended):
        raise ValueError(
            f"{call}: the state was extended, and which of its new tokens stay is not "
            "settled: give extended.keep(lengths)."
        )
    if not isinstance(state, kind):
        name = type(state).__name__
        raise ValueError(f"{call}: the state must be a {kind.__name__}, not a {name}.")


def map_states(
    windows: Callable[[Array, int], Array],
    entries: Callable[[Any], Any],
    states: States,
) -> Any:
    """The same states with other arrays.

    **Arguments:**

    - `windows`: takes an array of tokens, and its dimension of tokens from the end.
    - `entries`: takes entries.
    - `states`: one, or any tree of them.
    """

    def of_compressor(state: CompressorState | None) -> CompressorState | None:
        if state is None:
            return None
        values, gates = windows(state.values, -3), windows(state.gates, -3)
        return CompressorState(values, gates, entries(state.entries))

    def other(state: Any) -> Any:
        if isinstance(state, CompressorState):
            return of_compressor(state)
        return AttentionCache(
            windows(state.window_keys, -2),
            of_compressor(state.compressor),
            of_compressor(state.indexer),
        )

    def is_state(node: Any) -> bool:
        return isinstance(node, CompressorState | AttentionCache)

    return jax.tree.map(other, states, is_leaf=is_state)


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
    x: Shaped[Array, "batch ..."],
    begin: Int[Array, " batch"],
    size: int,
    tokens: int,
) -> Shaped[Array, "batch ..."]:
    """Consecutive tokens of each row.

    **Arguments:**

    - `x`: rows of tokens.
    - `begin`: where each row's begin.
    - `size`: how many.
    - `tokens`: the dimension of tokens, from the end.
    """

    def of_row(row: Array, begin: Array) -> Array:
        return lax.dynamic_slice_in_dim(row, begin, size, row.ndim + tokens)

    return jax.vmap(of_row)(x, begin)
