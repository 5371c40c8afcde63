"""Attention in plain XLA: a block of queries over its window, entries and a sink.

A block of queries with all its heads is one matrix. It sees the band of window keys
that it needs, and either tiles of all entries or, gathered, its own. Nothing of size
seq x seq exists, forward or backward: the backward pass computes a block's weights
again from what was kept, the output and the logarithm of the softmax's sum.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsv4_eqx.kernels.entries import (
    Entries,
    gathered,
    in_window,
    is_index,
    scattered,
    tile_of,
    visible,
)
from dsv4_eqx.kernels.form import Form
from dsv4_eqx.kernels.query_blocks import KEPT
from dsv4_eqx.numerics.precision import at_least_float32


class _Softmax(NamedTuple):
    """A softmax under way: everything is relative to the exponential of `top`."""

    weighted: Float[Array, "batch block heads head_dim"]
    total: Float[Array, "batch block heads 1"]
    top: Float[Array, "batch block heads 1"]

    def add(self, queries: Array, values: Array, seen: Array) -> "_Softmax":
        """The softmax with some more keys, which are the values."""
        logits = _masked_logits(queries, values, seen)
        top = jnp.maximum(self.top, jnp.max(logits, axis=-1, keepdims=True))
        shrink, weights = jnp.exp(self.top - top), jnp.exp(logits - top)
        weighted = _weighted_sum(weights, values)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return _Softmax(
            self.weighted * shrink + weighted, self.total * shrink + total, top
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend_blocked(floats, others, form: Form):
    """`attend`, from its operands parted by whether they have a gradient."""
    return _forward(floats, others, form)[0]


@jax.named_scope("attend")
def _forward(floats, others, form):
    operands = eqx.combine(floats, others)
    queries, keys, sinks, entries, positions, segment_ids, selection = operands
    wide = at_least_float32(queries)
    # The sink is where the softmax starts: one logit, without a value.
    sinks = sinks.astype(wide.dtype)[None, None, :, None]
    top = jnp.zeros_like(wide[..., :1]) + sinks
    softmax = _Softmax(jnp.zeros_like(wide), jnp.ones_like(top), top)
    softmax = softmax.add(queries, keys, in_window(positions, keys.shape[1]))
    if entries is not None and is_index(selection):
        values = gathered(entries.values, selection)
        softmax = softmax.add(queries, values, selection >= 0)
    elif entries is not None:
        tile, tiles = _tiling(entries, positions, segment_ids, form)

        def add_tile(i, softmax):
            _, values, seen = _tile(i, tile, entries, positions, segment_ids, selection)
            return softmax.add(queries, values, seen)

        softmax = lax.fori_loop(*tiles, add_tile, softmax)
    out = (softmax.weighted / softmax.total).astype(queries.dtype)
    out = checkpoint_name(out, KEPT)
    log_total = checkpoint_name(softmax.top + jnp.log(softmax.total), KEPT)
    return (out, log_total[..., 0]), (floats, others, out, log_total)


@jax.named_scope("attend_backward")
def _backward(form, residuals, cotangents):
    d_out, d_log_total = cotangents
    floats, others, out, log_total = residuals
    operands = eqx.combine(floats, others)
    queries, keys, sinks, entries, positions, segment_ids, selection = operands
    # What softmax's derivative subtracts: sum_j p_j dp_j, which is out . d_out. The
    # derivative of the log-sum-exp by a logit is its weight.
    wide_out, wide_d_out = at_least_float32(out), at_least_float32(d_out)
    mean = jnp.sum(wide_out * wide_d_out, axis=-1, keepdims=True)
    mean -= d_log_total[..., None]

    rows = _Rows(queries, d_out, log_total, mean)
    by_head = _transposed(queries), _transposed(d_out)
    seen = in_window(positions, keys.shape[1])
    d_queries, d_keys = _gradients_shared(rows, by_head, keys, seen)
    d_entries = None
    if entries is not None and is_index(selection):
        values = gathered(entries.values, selection)
        more, d_gathered = _gradients_own(rows, values, selection >= 0)
        d_queries += more
        d_entries = scattered(d_gathered, selection, entries.values.shape[1])
    elif entries is not None:
        tile, tiles = _tiling(entries, positions, segment_ids, form)

        def add_tile(i, gradients):
            d_queries, d_entries = gradients
            begin, values, seen = _tile(
                i, tile, entries, positions, segment_ids, selection
            )
            more, d_values = _gradients_shared(rows, by_head, values, seen)
            d_values += lax.dynamic_slice_in_dim(d_entries, begin, values.shape[1], 2)
            d_entries = lax.dynamic_update_slice_in_dim(d_entries, d_values, begin, 2)
            return d_queries + more, d_entries

        transposed = *d_keys.shape[:2], entries.values.shape[1]
        gradients = d_queries, jnp.zeros_like(d_keys, shape=transposed)
        d_queries, d_entries = lax.fori_loop(*tiles, add_tile, gradients)
        d_entries = jnp.swapaxes(d_entries, 1, 2)
    d_sinks = -jnp.sum(
        jnp.exp(sinks[None, None, :, None] - log_total) * mean, axis=(0, 1, 3)
    )
    gradients = [d_queries, jnp.swapaxes(d_keys, 1, 2), d_sinks]
    gradients += [] if d_entries is None else [d_entries]
    return _in_form_of(floats, gradients), None


class _Rows(NamedTuple):
    """What every gradient of a block of queries needs.

    With S = scale q.k the logits, P = exp(S - L) the weights and v = k the values:
    dP = dO.v, dS = P (dP - D) where D = O.dO, dq = scale sum_k dS k, and a value, which
    is also the key, gets sum_q P dO + scale sum_q dS q.
    """

    queries: Array
    d_out: Array
    log_total: Array  # L
    mean: Array  # D

    def weights(self, values: Array, seen: Array) -> tuple[Array, Array]:
        """P, and dS times the scale."""
        logits = _masked_logits(self.queries, values, seen)
        weights = jnp.exp(logits - self.log_total)
        d_logits = weights * (_products(self.d_out, values) - self.mean)
        d_logits = jnp.where(seen[:, :, None], d_logits * _scale(self.queries), 0)
        return weights, d_logits


def _gradients_own(rows: _Rows, values: Array, seen: Array) -> tuple[Array, Array]:
    """Of the queries, and of values that each query has for itself."""
    weights, d_logits = rows.weights(values, seen)
    d_values = _outer(d_logits, rows.queries) + _outer(weights, rows.d_out)
    return _weighted_sum(d_logits, values), d_values


def _gradients_shared(
    rows: _Rows, by_head: tuple[Array, Array], values: Array, seen: Array
) -> tuple[Array, Array]:
    """Of the queries, and of values that all queries share, transposed. `by_head`:
    queries and `d_out`, transposed once for all tiles.
    """
    weights, d_logits = rows.weights(values, seen)
    queries, d_out = by_head
    d_values = _transposed_outer(d_logits, queries)
    d_values += _transposed_outer(weights, d_out)
    return _weighted_sum(d_logits, values), d_values


def _in_form_of(tree: PyTree, leaves: list[Array]) -> PyTree:
    """The leaves as a tree like another, in the dtypes of that."""
    own, structure = jax.tree.flatten(tree)
    leaves = [new.astype(x.dtype) for new, x in zip(leaves, own, strict=True)]
    return jax.tree.unflatten(structure, leaves)


attend_blocked.defvjp(_forward, _backward)


def _scale(queries: Float[Array, "*batch head_dim"]) -> float:
    return queries.shape[-1] ** -0.5


def _masked_logits(queries: Array, values: Array, seen: Array) -> Array:
    logits = _products(queries, values) * _scale(queries)
    return jnp.where(seen[:, :, None, :], logits, -jnp.inf)


# Values are `[batch, keys, channel]`, or of each query `[batch, query, keys, channel]`.
def _products(queries: Array, values: Array) -> Array:
    equation = "bqhc,bkc->bqhk" if values.ndim == 3 else "bqhc,bqkc->bqhk"
    return _einsum(equation, queries, values)


def _weighted_sum(weights: Array, values: Array) -> Array:
    equation = "bqhk,bkc->bqhc" if values.ndim == 3 else "bqhk,bqkc->bqhc"
    return _einsum(equation, weights.astype(values.dtype), values)


def _outer(weights: Array, queries: Array) -> Array:
    return _einsum("bqhk,bqhc->bqkc", weights.astype(queries.dtype), queries)


# The gradient of values that all queries share is `[batch, channel, keys]`. Transposing
# the queries once spares XLA on CPU transposing the weights of every tile.
def _transposed(queries: Array) -> Array:
    batch, _, _, channels = queries.shape
    return jnp.swapaxes(queries.reshape(batch, -1, channels), 1, 2)


def _transposed_outer(weights: Array, transposed: Array) -> Array:
    rows = weights.reshape(transposed.shape[0], transposed.shape[2], -1).astype(
        transposed.dtype
    )
    return _einsum("bcr,brk->bck", transposed, rows)


def _einsum(equation: str, left: Array, right: Array) -> Array:
    wide = at_least_float32(left).dtype
    return jnp.einsum(equation, left, right, preferred_element_type=wide)


def _tiling(
    entries: Entries,
    positions: Int[Array, "batch block"],
    segment_ids: Int[Array, "batch block"] | None,
    form: Form,
) -> tuple[int, tuple[Int[Array, ""] | int, Int[Array, ""] | int]]:
    """Entries in a tile, and the tiles from the first to the last that a query sees."""
    num_entries = entries.last_positions.shape[1]
    tile = min(form.entry_tile, num_entries)
    if not form.stops_early:
        return tile, (0, -(-num_entries // tile))
    if segment_ids is not None:
        seen = jnp.any(visible(entries, positions, segment_ids), axis=1)
        index = jnp.arange(num_entries)
        first = jnp.min(jnp.where(seen, index, num_entries))
        end = jnp.max(jnp.where(seen, index + 1, 0))
        return tile, (first // tile, -(-end // tile))
    seen = entries.last_positions <= jnp.max(positions, axis=1, keepdims=True)
    count = jnp.max(jnp.where(seen, jnp.arange(1, num_entries + 1), 0))
    return tile, (0, -(-count // tile))


def _tile(
    i: Array,
    tile: int,
    entries: Entries,
    positions: Int[Array, "batch block"],
    segment_ids: Int[Array, "batch block"] | None,
    mask: Bool[Array, "batch block entries"] | None,
) -> tuple[Array, Array, Array]:
    """A tile's first entry, its values, and which of them each query sees."""
    num_entries = entries.values.shape[1]
    # The last tile reaches back into the one before, where nothing is seen again.
    begin = jnp.minimum(i * tile, num_entries - tile)
    values = tile_of(entries.values, begin, tile)
    part = Entries(
        values,
        *jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, begin, tile, axis=1),
            (entries.last_positions, entries.segment_ids),
        ),
    )
    is_first = begin + jnp.arange(tile) >= i * tile
    seen = visible(part, positions, segment_ids) & is_first[None, None]
    if mask is not None:
        seen &= lax.dynamic_slice_in_dim(mask, begin, tile, axis=2)
    return begin, values, seen
