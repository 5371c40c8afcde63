"""Products of queries with the entries that they attend to, reduced over heads.

What trains the indexer needs two numbers for each query and each of its entries: the
indexer's score, and what attention's heads give to it. Products `[queries, heads,
entries]` exist for a tile of entries at a time, forward and backward.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv4_eqx.kernels.entries import (
    Entries,
    Selection,
    gathered,
    is_index,
    tile_of,
    visible,
)
from dsv4_eqx.kernels.form import current_form, is_reference
from dsv4_eqx.numerics.precision import at_least_float32

# From products `[batch, block, heads, entries]` to `[batch, block, entries]`.
Reduction = Callable[[Array], Array]


def over_heads_reference(
    reduction: Reduction,
    queries: Float[Array, "batch block heads head_dim"],
    entries: Entries,
    selection: Selection = None,
) -> Float[Array, "batch block chosen"]:
    """What `over_heads` computes, all products at once."""
    values = tile_of(entries.values, 0, entries.shape[1])
    sums = reduction(_products("bqhc,bec->bqhe", queries, values))
    if selection is None or not is_index(selection):
        return sums
    return jnp.take_along_axis(sums, jnp.maximum(selection, 0), axis=-1)


def over_heads(
    reduction: Reduction,
    queries: Float[Array, "batch block heads head_dim"],
    entries: Entries,
    selection: Selection = None,
) -> Float[Array, "batch block chosen"]:
    """`reduction` of each query's products with the entries that it attends to.

    In the order of a selection's indices, or of all entries; what `is_chosen` leaves
    out may have any value. Gradients flow to queries, entries and what `reduction`
    closes over.
    """
    if is_reference():
        return over_heads_reference(reduction, queries, entries, selection)
    if selection is not None and is_index(selection):
        values = gathered(entries.values, selection)
        return reduction(_products("bqhc,bqkc->bqhk", queries, values))
    num_entries = entries.shape[1]
    values = tile_of(entries.values, 0, num_entries)
    tile = min(current_form().entry_tile, num_entries)

    @jax.checkpoint
    def of_tile(values: Array) -> Array:
        return reduction(_products("bqhc,bec->bqhe", queries, values))

    if tile == num_entries:
        return of_tile(values)
    padded = jnp.pad(values, ((0, 0), (0, -num_entries % tile), (0, 0)))
    tiles = padded.reshape(len(values), -1, tile, values.shape[2])
    sums = jnp.moveaxis(lax.map(of_tile, jnp.moveaxis(tiles, 1, 0)), 0, 2)
    return sums.reshape(*sums.shape[:2], -1)[..., :num_entries]


def is_chosen(
    entries: Entries,
    positions: Int[Array, "batch block"],
    selection: Selection = None,
    segment_ids: Int[Array, "batch block"] | None = None,
) -> Bool[Array, "batch block chosen"]:
    """Which of them each query attends to, in the order of `over_heads`."""
    if selection is None:
        return visible(entries, positions, segment_ids)
    if is_index(selection):
        return selection >= 0
    return visible(entries, positions, segment_ids) & selection


def _products(equation: str, queries: Array, values: Array) -> Array:
    wide = at_least_float32(queries).dtype
    return jnp.einsum(equation, queries, values, preferred_element_type=wide)
