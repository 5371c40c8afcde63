"""Packed rows: several documents one after another, each computed as if it were alone.

Paper section 3.4.3. A document is a run of equal `segment_ids`, and is identified by
the index of its first token. Positions count from there, and so do a compressor's
windows; tokens after a document's last complete window are in no entry. With windows of
2 tokens:

    index            0   1   2   3   4   5   6   7   8   9
    segment_ids      7   7   7   7   7   2   5   5   5   5
    start            0   0   0   0   0   5   6   6   6   6
    position         0   1   2   3   4   0   0   1   2   3
    window          [0   0] [1   1]  .   .  [0   0] [1   1]
    entry                0       1               2       3     last tokens 1, 3, 7, 9

There are at most `seq // ratio` entries; arrays of entries have this fixed size,
whatever the documents.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from dsv4_eqx.numerics.validation import is_concrete


def document_starts(
    segment_ids: Int[Array | np.ndarray, "batch seq"],
) -> Int32[Array, "batch seq"]:
    """The index of the first token of each token's document.

    A document is a run of equal ids; an id that comes back begins a new document. The
    result may be used as segment ids, with the same documents.
    """
    if isinstance(segment_ids, np.ndarray):  # JAX would truncate 64 bits
        segment_ids = np.cumsum(_is_first(segment_ids), axis=1, dtype=np.int32)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.where(_is_first(segment_ids), index, 0), axis=1)


def local_positions(
    segment_ids: Int[Array | np.ndarray, "batch seq"],
) -> Int32[Array, "batch seq"]:
    """Position of each token in its document."""
    starts = document_starts(segment_ids)
    return jnp.arange(starts.shape[1], dtype=jnp.int32)[None] - starts


def last_tokens(
    positions: Int32[Array, "batch seq"], ratio: int, num_windows: int
) -> Int32[Array, "batch windows"]:
    """Index of the last token of each complete window, in order, then `seq`.

    Positions are those in the documents; `num_windows` is the length of the result.
    """
    seq = positions.shape[1]
    is_last = (positions + 1) % ratio == 0

    def in_row(is_last: Array) -> Array:
        return jnp.flatnonzero(is_last, size=num_windows, fill_value=seq)

    return jax.vmap(in_row)(is_last).astype(jnp.int32)


def tokens_from(
    x: Float[Array, "batch seq head_dim"],
    first: Int[Array, "batch windows"],
    ratio: int,
) -> Float[Array, "batch windows ratio head_dim"]:
    """Windows of `ratio` tokens, each from its index `first` on.

    Where a window begins before the row, the result is arbitrary.
    """
    index = jnp.maximum(jnp.add.outer(first, jnp.arange(ratio, dtype=first.dtype)), 0)
    read = jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))
    return read(x, index)


def validate_positions(
    call: str,
    positions: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None,
) -> None:
    """Refuses positions that do not count from 0 in each document, unless traced."""
    if not is_concrete(positions, segment_ids):
        return
    known = np.asarray(positions)
    expected = np.arange(known.shape[1])
    if segment_ids is not None:
        expected = np.asarray(local_positions(segment_ids))
    wrong = np.argwhere(known != expected)
    if len(wrong) > 0:
        place = [int(i) for i in wrong[0]]
        raise ValueError(
            f"{call}: position {known[tuple(place)]} at {place} is not the token's in "
            "its document: give 0, 1, 2, ... in each row, or in each document that "
            "segment_ids tell of."
        )


def validate_segment_ids(call: str, segment_ids: Any, shape: tuple[int, ...]) -> None:
    """Refuses other shapes, other dtypes and, unless traced, an id that comes back."""
    is_array = isinstance(segment_ids, jax.Array | np.ndarray)
    if not is_array or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        got = segment_ids.dtype if is_array else type(segment_ids).__name__
        raise ValueError(
            f"{call}: segment_ids must be an array of integers, not {got}: give each "
            "token the number of its document."
        )
    if segment_ids.shape != shape:
        raise ValueError(
            f"{call}: segment_ids of shape {segment_ids.shape} are not one for each "
            f"token of shape {shape}."
        )
    if not is_concrete(segment_ids):
        return
    for row, ids in enumerate(np.asarray(segment_ids)):
        starts = np.flatnonzero(_is_first(ids[None])[0])
        _, first = np.unique(ids[starts], return_index=True)
        if len(first) < len(starts):
            again = np.setdiff1d(np.arange(len(starts)), first)[0]
            raise ValueError(
                f"{call}: segment id {ids[starts[again]]} comes back at "
                f"[{row}, {starts[again]}] after another document: give each document "
                "consecutive tokens and an id of its own."
            )


def _is_first(segment_ids: Any) -> Any:
    """Whether a token is its document's first; a numpy or JAX array, as the ids are."""
    xp = np if isinstance(segment_ids, np.ndarray) else jnp
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return xp.concatenate([xp.ones_like(changes, shape=(len(changes), 1)), changes], 1)
