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
        """The state after the first `lengths` of each row's new tokens.

        Raises ValueError if `lengths` are not one integer for each row or, except under
        `jit`, one of them is outside `[0, seq]`.
        """
        batch = jax.tree.leaves(self.longer)[0].shape[0]
        num_new = np.full(batch, self.seq, np.int32)
        lengths = jnp.asarray(validate_counts("Extended.keep", lengths, num_new))

        def kept(x: Array, tokens: int) -> Array:
            return rows_from(x, lengths, x.shape[tokens] - self.seq, tokens)

        return map_states(kept, lambda entries: entries, self.longer)


def validate_state(call: str, state: Any, kind: type) -> None:
    """Refuses anything but a state of this class, such as an `Extended`."""
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
    """Refuses the cache of an attention with other parts; None is a missing part."""
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
    """A tree of states of the same structure, with a function applied to each array.

    `windows` is given an array of tokens, and the dimension of the tokens, counted from
    the end; `entries` is given compressed entries.
    """

    def is_compressor(node: Any) -> bool:
        return isinstance(node, CompressorState)

    def mapped(node: Any) -> Any:
        if not is_compressor(node):
            return windows(node, -2)  # the keys of an `AttentionCache`
        values, gates = windows(node.values, -3), windows(node.gates, -3)
        return CompressorState(values, gates, entries(node.entries))

    return jax.tree.map(mapped, states, is_leaf=is_compressor)


def positions_after(
    start: Int[Array, " batch"], lengths: Int[Array, " batch"], seq: int
) -> Int[Array, "batch seq"]:
    """Positions of `lengths` new tokens after the first `start`; -1 for padding."""
    index = jnp.arange(seq, dtype=jnp.int32)[None]
    return jnp.where(index < lengths[:, None], start[:, None] + index, -1)


def rows_from(
    x: Shaped[Array, "batch ..."],
    begin: Int[Array, " batch"],
    size: int,
    tokens: int,
) -> Shaped[Array, "batch ..."]:
    """`size` consecutive tokens of each row, from its index `begin` on.

    `tokens` is the dimension of the tokens, counted from the end.
    """

    def slice_row(row: Array, begin: Array) -> Array:
        return lax.dynamic_slice_in_dim(row, begin, size, row.ndim + tokens)

    return jax.vmap(slice_row)(x, begin)
