"""Compressed entries: what they are, who sees them, and where they lie.

A layer's entries are an array of their own, or a `Slice` of those of several layers, as
in a cache that a scan over layers extends: to take them out and put them back would
copy the whole cache for each token. The functions that read and write take both.
"""

from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv4_eqx.kernels.form import current_form
from dsv4_eqx.numerics.slice import Slice, as_slice

# A layer's values: an array, or a slice of [batch, layers, entries, head_dim].
Values = Float[Array, "batch entries head_dim"] | Slice
LAYERS: Final = 1  # the dimension of the stack that the slice's index counts along


class Entries(eqx.Module):
    """Compressed entries that queries may look at.

    A query sees an entry of its own document if the last of the tokens in it is not
    after the query. What a cache has not filled yet is after every query.
    """

    values: Values
    last_positions: Int[Array, "batch entries"]
    # The document that each belongs to; None where a row is a single one.
    segment_ids: Int[Array, "batch entries"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values: batch, entries, head_dim."""
        return self.values.shape


# Which entries a query attends to: a mask over all of them, or the indices of some,
# -1 for none. Without either, it attends to all it may see.
Selection = Bool[Array, "batch seq entries"] | Int[Array, "batch seq selected"] | None


def is_index(selection: Any) -> bool:
    """Whether a selection names entries, rather than marking them."""
    return selection is not None and jnp.issubdtype(selection.dtype, jnp.integer)


def in_window(
    positions: Int[Array, "batch block"], num_keys: int
) -> Bool[Array, "batch block keys"]:
    """Whether a window key is one of the last `window` tokens of a query's document.

    A query at position p of its document has p tokens of it before itself: what lies
    further back is another document's, wherever that begins. The last keys are the
    queries' own.
    """
    block = positions.shape[1]
    window = num_keys - block + 1
    index = jnp.arange(block, dtype=positions.dtype)[:, None]
    distance = index + window - 1 - jnp.arange(num_keys, dtype=positions.dtype)[None]
    in_band = (distance >= 0) & (distance < window)
    return in_band[None] & (distance[None] <= positions[..., None])


def visible(
    entries: Entries,
    positions: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Bool[Array, "batch seq entries"]:
    """Whether an entry is of the query's document and ends no later than the query."""
    if (segment_ids is None) != (entries.segment_ids is None):
        which = "entries" if segment_ids is None else "queries"
        raise ValueError(
            f"only the {which} have segment_ids: give both segment_ids, or neither."
        )
    seen = entries.last_positions[:, None, :] <= positions[:, :, None]
    if segment_ids is not None and entries.segment_ids is not None:
        seen &= entries.segment_ids[:, None, :] == segment_ids[:, :, None]
    return seen


def tile_of(
    values: Values, begin: Int[Array, ""] | int, size: int
) -> Float[Array, "batch size head_dim"]:
    """`size` consecutive entries of each row, the first of them at `begin`."""
    stack, layer = _stack_of(values)
    batch, _, _, dim = stack.shape
    start, sizes = (0, layer, begin, 0), (batch, 1, size, dim)
    return lax.dynamic_slice(stack, start, sizes)[:, 0]


def gathered(
    values: Values, index: Int[Array, "batch block selected"]
) -> Float[Array, "batch block selected head_dim"]:
    """Some entries for each query, never past the last; any for a negative index."""
    (stack, layer), index = _stack_of(values), jnp.maximum(index, 0)
    place = _rows(index), layer, index
    return stack.at[place].get(mode="promise_in_bounds")


def scattered(
    gradients: Float[Array, "batch block selected head_dim"],
    index: Int[Array, "batch block selected"],
    num_entries: int,
) -> Float[Array, "batch entries head_dim"]:
    """The transpose of `gathered`; gradients are zero where the index is negative."""
    batch, *_, dim = gradients.shape
    zeros = jnp.zeros_like(gradients, shape=(batch, num_entries, dim))
    index = jnp.maximum(index, 0)
    return zeros.at[_rows(index), index].add(gradients, mode="promise_in_bounds")


def replaced(
    values: Values,
    index: Int[Array, "batch new"],
    new: Float[Array, "batch new head_dim"],
) -> Values:
    """The entries with some of them replaced; an index past the last is dropped."""
    stack, layer = _stack_of(values)
    stack = stack.at[_rows(index), layer, index].set(new, mode="drop")
    if isinstance(values, Slice):
        return Slice(stack, values.index, LAYERS)
    return jnp.squeeze(stack, LAYERS)


def flat_entries(
    values: Values,
) -> tuple[Float[Array, "rows head_dim"], Int[Array, " batch"]]:
    """One list of all rows' entries, and all layers' where they lie together, and where
    in it each row's own begin.
    """
    stack, layer = _stack_of(values)
    batch, layers, num_entries, dim = stack.shape
    row = jnp.arange(batch, dtype=jnp.int32)
    return stack.reshape(-1, dim), (row * layers + layer) * num_entries


def write_if(
    is_any: Bool[Array, ""],
    write: Callable[..., Values],
    entries: Values,
    start: Int[Array, " batch"],
) -> Values:
    """The entries after a write that may have nothing to write, left where they are.
    `write` takes the entries and `start`, and drops what is not to be written.
    """
    if not current_form().stops_early:
        return write(entries, start)

    # XLA on CPU copies the operands of a conditional. A loop of at most one round
    # leaves the entries where they are; with i, which is 0, XLA does not compute what
    # to write before it knows whether to.
    def run(i: Array, entries: Values) -> Values:
        return write(entries, start + i)

    return lax.fori_loop(0, is_any.astype(jnp.int32), run, entries)


def _stack_of(
    values: Values,
) -> tuple[Float[Array, "batch layers entries head_dim"], Int[Array, ""] | int]:
    """The entries of all layers, and which layer's these are."""
    at = as_slice(values, LAYERS)
    assert isinstance(at.stack, jax.Array)  # no packed weight
    return at.stack, at.index


def _rows(index: Int[Array, "batch ..."]) -> Int[Array, "batch ..."]:
    batch = jnp.arange(index.shape[0], dtype=index.dtype)
    return batch.reshape(-1, *[1] * (index.ndim - 1))
