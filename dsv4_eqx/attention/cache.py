"""The state of attention: keys of the window, entries, and tokens not yet compressed.

A state is a value: extending it returns a new state and leaves the old one unchanged.
Its shapes are fixed by a capacity in tokens; rows of a batch may have different
lengths. Places that have not been written yet have weight 0, whatever finite numbers
they hold. Rows come first in every array, so that
`jax.tree.map(lambda x: x[order], state)` reorders them; where layers are stacked, the
dimension of the repetitions follows.

Extending returns an `Extended`, which has all new tokens; its `keep` returns the state
with those that are kept. Entries need no rollback: an entry that was completed by a
token that is not kept is written again before any query can see it.
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
    """A compressor's entries, and the last tokens, which later entries may need.

    Entry w covers `ratio` tokens from w x ratio on. Values and gates are those of the
    last `pending` tokens, the latest one last; with overlapping windows they include
    the window before.
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
    """A state with new tokens, before it is decided how many of them are kept.

    It cannot be extended again; the state that `keep` returns can.
    """

    longer: States  # `seq` more tokens in its windows than the state that `keep` gives
    seq: int = eqx.field(static=True)

    def keep(self, lengths: Int[Array | np.ndarray, " batch"]) -> Any:
        """The state after the first `lengths` of the new tokens.

        **Arguments:**

        - `lengths`: how many of each row's new tokens are kept.

        **Returns:** a state of the kind that was extended.

        **Raises:** ValueError if `lengths` are not one integer for each row or, except
        under `jit`, one of them is outside `[0, seq]`.
        """
        batch = jax.tree.leaves(self.longer)[0].shape[0]
        num_new = np.full(batch, self.seq, np.int32)
        lengths = jnp.asarray(validate_counts("Extended.keep", lengths, num_new))

        def kept(x: Array, tokens: int) -> Array:
            return rows_from(x, lengths, x.shape[tokens] - self.seq, tokens)

        return map_states(kept, lambda entries: entries, self.longer)


def validate_state(call: str, state: Any, kind: type) -> None:
    """Refuses anything but a state of this kind, such as an `Extended`.

    **Arguments:**

    - `call`: what the user called.
    - `state`: the argument.
    - `kind`: the class that it must have.

    **Raises:** ValueError if it has another class.
    """
    if isinstance(state, Extended):
        raise ValueError(
            f"{call}: the state was extended, and which of its new tokens stay is not "
            "settled: give extended.keep(lengths)."
        )
    if not isinstance(state, kind):
        name = type(state).__name__
        raise ValueError(f"{call}: the state must be a {kind.__name__}, not a {name}.")


def validate_parts_of_state(
    compressor: Any, indexer: Any, cache: AttentionCache
) -> None:
    """Refuses the cache of an attention with other parts.

    **Arguments:**

    - `compressor`, `indexer`: the attention's, or None.
    - `cache`: the argument.

    **Raises:** ValueError if only one of part and state is there.
    """
    for name, part in (("compressor", compressor), ("indexer", indexer)):
        is_part, is_state = part is not None, getattr(cache, name) is not None
        if is_part != is_state:
            has, lacks = ("attention", "cache") if is_part else ("cache", "attention")
            raise ValueError(
                f"Attention.extend: the {has} has a part for the {name} and the "
                f"{lacks} has none: give a cache from this attention's init_cache."
            )


def map_states(
    windows: Callable[[Array, int], Array],
    entries: Callable[[Any], Any],
    states: States,
) -> Any:
    """States of the same structure, with a function applied to each array.

    **Arguments:**

    - `windows`: applied to arrays of tokens, with the dimension of the tokens, counted
        from the end.
    - `entries`: applied to compressed entries.
    - `states`: a state, or any tree of states.
    """

    def map_compressor(state: CompressorState | None) -> CompressorState | None:
        if state is None:
            return None
        values, gates = windows(state.values, -3), windows(state.gates, -3)
        return CompressorState(values, gates, entries(state.entries))

    def map_state(state: Any) -> Any:
        if isinstance(state, CompressorState):
            return map_compressor(state)
        return AttentionCache(
            windows(state.window_keys, -2),
            map_compressor(state.compressor),
            map_compressor(state.indexer),
        )

    def is_state(node: Any) -> bool:
        return isinstance(node, CompressorState | AttentionCache)

    return jax.tree.map(map_state, states, is_leaf=is_state)


def positions_after(
    start: Int[Array, " batch"], lengths: Int[Array, " batch"], seq: int
) -> Int[Array, "batch seq"]:
    """Positions of new tokens; -1 for the padding after them.

    **Arguments:**

    - `start`: tokens that each row has already.
    - `lengths`: new tokens of each row.
    - `seq`: new tokens and padding of a row together.
    """
    index = jnp.arange(seq, dtype=jnp.int32)[None]
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
    - `begin`: index of the first token to take, for each row.
    - `size`: how many tokens to take.
    - `tokens`: the dimension of the tokens, counted from the end.
    """

    def slice_row(row: Array, begin: Array) -> Array:
        return lax.dynamic_slice_in_dim(row, begin, size, row.ndim + tokens)

    return jax.vmap(slice_row)(x, begin)
