"""Core attention: one softmax over a sliding window, compressed entries and a sink.

Paper section 2.3. Keys are values, and one key head serves every query head, so a block
of queries with all its heads is one matrix. Blocks of queries run one after another:
each sees the band of window keys that it needs, and either tiles of all entries up to
the last visible one or, gathered, its own. Nothing of size seq x seq exists, forward or
backward: the backward pass computes a block's weights again from what `attend` kept,
the output and the logarithm of the softmax's sum.

The functions know positions, not tensors' places in a sequence: a training step, a
chunk of a prompt and one decoded token call the same code.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from dsv4_eqx.attention.entries import (
    Entries,
    gathered,
    scattered,
    tile_of,
    visible,
)
from dsv4_eqx.primitives.precision import at_least_float32
from dsv4_eqx.primitives.varying import alike

# Queries in a block. More reuse each key more, fewer waste less of the window's band.
QUERY_BLOCK: Final = 64
# Entries whose logits exist at a time.
_ENTRY_TILE: Final = 256
# What a block of queries keeps for the backward pass, beside what goes into it.
_KEPT: Final = "attended"


# Which entries a query attends to: a mask over all of them, or the indices of some,
# -1 for none. Without either, it attends to all it may see.
Selection = Bool[Array, "batch seq entries"] | Int[Array, "batch seq selected"] | None


def attend(
    queries: Float[Array, "batch seq heads head_dim"],
    positions: Int[Array, "batch seq"],
    window_keys: Float[Array, "batch keys head_dim"],
    sinks: Float[Array, " heads"],
    entries: Entries | None = None,
    selection: Selection = None,
    owners: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention of a block of consecutive queries over window, entries and sink.

    **Arguments:**

    - `queries`: rotated, of consecutive tokens.
    - `positions`: of the queries, starting at 0 in each document of a row; a negative
        one sees nothing and yields zeros.
    - `window_keys`: rotated, of the `window - 1` tokens before the first query, then of
        the queries' own tokens. What lies before position 0, another document, is
        never seen.
    - `sinks`: a logit for each head that takes weight and gives nothing.
    - `entries`: compressed entries, if the layer has them.
    - `selection`: which of them each query attends to. A mask shows none that the
        query may not see; indices must be of entries that it may see.
    - `owners`: document of each query, if the entries have owners.
    """
    if entries is not None and entries.values.shape[1] == 0:
        entries = selection = None
    operands = queries, window_keys, sinks, entries, positions, owners, selection
    leaves, structure = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(structure, alike(*leaves))
    return _attend(*eqx.partition(operands, eqx.is_inexact_array))


def map_queries(
    function: Callable[[PyTree[Array], Array], Array],
    per_query: PyTree[Shaped[Array, "batch seq ..."]],
    window_keys: Float[Array, "batch keys head_dim"],
) -> Array:
    """Applies a function to blocks of consecutive queries, one after another.

    For the backward pass it keeps what goes into each block and what `attend` gives,
    and computes the rest again.

    **Arguments:**

    - `function`: takes a block of `per_query` and the window keys of that block.
    - `per_query`: arrays over the queries; shorter blocks are filled with zeros, and
        integers with -1.
    - `window_keys`: as for `attend`.
    """
    seq = jax.tree.leaves(per_query)[0].shape[1]
    if seq <= QUERY_BLOCK:
        return function(per_query, window_keys)
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    run = jax.checkpoint(lambda operands: function(*operands), policy=policy)
    bands = _banded(window_keys, window_keys.shape[1] - seq + 1)
    blocks = jax.tree.map(split_blocks, per_query)
    return join_blocks(lax.map(run, (blocks, bands)), seq)


def split_blocks(
    x: Shaped[Array, "batch seq *rest"],
) -> Shaped[Array, "blocks batch block *rest"]:
    """Blocks of consecutive queries, filled up with ones and positions -1."""
    short = -x.shape[1] % QUERY_BLOCK
    # Not with zeros, whose norm has no derivative where `rms_norm_eps` is 0.
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 1
    widths = [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)


def join_blocks(
    blocks: Shaped[Array, "blocks batch block *rest"], seq: int
) -> Shaped[Array, "batch seq *rest"]:
    """What `split_blocks` split, without the filling."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :seq]


def _banded(
    keys: Float[Array, "batch keys head_dim"], window: int
) -> Float[Array, "blocks batch band head_dim"]:
    """For each block of queries, the window's keys before it and its own.

    Built of whole shifted copies, so that the backward pass is a sum of slices.
    """
    before = -(-(window - 1) // QUERY_BLOCK)  # blocks of keys before one of queries
    front = before * QUERY_BLOCK - (window - 1)
    keys = split_blocks(jnp.pad(keys, ((0, 0), (front, 0), (0, 0))))
    blocks = keys.shape[0] - before
    shifted = [keys[i : i + blocks] for i in range(before + 1)]
    return jnp.concatenate(shifted, axis=2)[:, :, front:]


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


@jax.custom_vjp
def _attend(floats, others):
    return _forward(floats, others)[0]


@jax.named_scope("attend")
def _forward(floats, others):
    operands = eqx.combine(floats, others)
    queries, keys, sinks, entries, positions, owners, selection = operands
    wide = at_least_float32(queries)
    # The sink is where the softmax starts: one logit, without a value.
    top = jnp.zeros_like(wide[..., :1]) + sinks.astype(wide.dtype)[:, None]
    softmax = _Softmax(jnp.zeros_like(wide), jnp.ones_like(top), top)
    softmax = softmax.add(queries, keys, _in_window(positions, keys.shape[1]))
    if entries is not None and _is_index(selection):
        values = gathered(entries.values, selection)
        softmax = softmax.add(queries, values, selection >= 0)
    elif entries is not None:

        def add_tile(i, softmax):
            _, values, seen = _tile(i, entries, positions, owners, selection)
            return softmax.add(queries, values, seen)

        softmax = lax.fori_loop(0, _num_tiles(entries, positions), add_tile, softmax)
    out = (softmax.weighted / softmax.total).astype(queries.dtype)
    out = checkpoint_name(out, _KEPT)
    log_total = checkpoint_name(softmax.top + jnp.log(softmax.total), _KEPT)
    return out, (floats, others, out, log_total)


@jax.named_scope("attend_backward")
def _backward(residuals, d_out):
    floats, others, out, log_total = residuals
    operands = eqx.combine(floats, others)
    queries, keys, sinks, entries, positions, owners, selection = operands
    # What softmax's derivative subtracts: sum_j p_j dp_j, which is out . d_out.
    wide_out, wide_d_out = at_least_float32(out), at_least_float32(d_out)
    mean = jnp.sum(wide_out * wide_d_out, axis=-1, keepdims=True)

    def backward_of(values: Array, seen: Array) -> tuple[Array, Array]:
        """Gradients of the queries and of these values."""
        logits = _masked_logits(queries, values, seen)
        weights = jnp.exp(logits - log_total)
        d_logits = weights * (_products(d_out, values) - mean)
        d_logits = jnp.where(seen[:, :, None], d_logits * _scale(queries), 0)
        d_queries = _weighted_sum(d_logits, values)
        if values.ndim == 4:
            d_values = _outer(d_logits, queries) + _outer(weights, d_out)
        else:
            d_values = _turned_outer(d_logits, turned_queries)
            d_values += _turned_outer(weights, turned_d_out)
        return d_queries, d_values

    turned_queries, turned_d_out = _turned(queries), _turned(d_out)
    d_queries, d_keys = backward_of(keys, _in_window(positions, keys.shape[1]))
    d_entries = None
    if entries is not None and _is_index(selection):
        values = gathered(entries.values, selection)
        more, d_gathered = backward_of(values, selection >= 0)
        d_queries += more
        d_entries = scattered(d_gathered, selection, entries.values.shape[1])
    elif entries is not None:

        def add_tile(i, gradients):
            d_queries, d_entries = gradients
            begin, values, seen = _tile(i, entries, positions, owners, selection)
            more, d_values = backward_of(values, seen)
            d_values += lax.dynamic_slice_in_dim(d_entries, begin, values.shape[1], 2)
            d_entries = lax.dynamic_update_slice_in_dim(d_entries, d_values, begin, 2)
            return d_queries + more, d_entries

        turned = *d_keys.shape[:2], entries.values.shape[1]
        gradients = d_queries, jnp.zeros_like(d_keys, shape=turned)
        tiles = _num_tiles(entries, positions)
        d_queries, d_entries = lax.fori_loop(0, tiles, add_tile, gradients)
        d_entries = jnp.swapaxes(d_entries, 1, 2)
    d_sinks = -jnp.sum(jnp.exp(sinks[:, None] - log_total) * mean, axis=(0, 1, 3))
    gradients = [d_queries, jnp.swapaxes(d_keys, 1, 2), d_sinks]
    gradients += [] if d_entries is None else [d_entries]
    return _in_form_of(floats, gradients), None


def _in_form_of(tree: PyTree, leaves: list[Array]) -> PyTree:
    """The leaves as a tree like another, in the dtypes of that."""
    own, structure = jax.tree.flatten(tree)
    leaves = [new.astype(x.dtype) for new, x in zip(leaves, own, strict=True)]
    return jax.tree.unflatten(structure, leaves)


_attend.defvjp(_forward, _backward)


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


# The gradient of values that all queries share, `[batch, channel, keys]`. Turning the
# queries once spares XLA on CPU turning the weights of every tile.
def _turned(queries: Array) -> Array:
    batch, _, _, channels = queries.shape
    return jnp.swapaxes(queries.reshape(batch, -1, channels), 1, 2)


def _turned_outer(weights: Array, turned: Array) -> Array:
    rows = weights.reshape(turned.shape[0], turned.shape[2], -1).astype(turned.dtype)
    return _einsum("bcr,brk->bck", turned, rows)


def _einsum(equation: str, left: Array, right: Array) -> Array:
    wide = at_least_float32(left).dtype
    return jnp.einsum(equation, left, right, preferred_element_type=wide)


def _in_window(
    positions: Int[Array, "batch block"], num_keys: int
) -> Bool[Array, "batch block keys"]:
    block = positions.shape[1]
    window = num_keys - block + 1
    index = jnp.arange(block, dtype=positions.dtype)[:, None]
    distance = index + window - 1 - jnp.arange(num_keys, dtype=positions.dtype)
    in_band = (distance >= 0) & (distance < window)
    return in_band & (distance <= positions[..., None])


def _is_index(selection: Selection) -> bool:
    return selection is not None and jnp.issubdtype(selection.dtype, jnp.integer)


def _num_tiles(
    entries: Entries, positions: Int[Array, "batch block"]
) -> Int[Array, ""]:
    """Tiles up to the last entry that any of the queries sees."""
    seen = entries.last_positions <= jnp.max(positions, axis=1, keepdims=True)
    count = jnp.max(jnp.where(seen, jnp.arange(1, seen.shape[1] + 1), 0))
    return -(-count // min(_ENTRY_TILE, seen.shape[1]))


def _tile(
    i: Array,
    entries: Entries,
    positions: Int[Array, "batch block"],
    owners: Int[Array, "batch block"] | None,
    mask: Bool[Array, "batch block entries"] | None,
) -> tuple[Array, Array, Array]:
    """A tile's first entry, its values, and which of them each query sees."""
    num_entries = entries.values.shape[1]
    tile = min(_ENTRY_TILE, num_entries)
    # The last tile reaches back into the one before, where nothing is seen again.
    begin = jnp.minimum(i * tile, num_entries - tile)
    values = tile_of(entries.values, begin, tile)
    part = Entries(
        values,
        *jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, begin, tile, axis=1),
            (entries.last_positions, entries.owners),
        ),
    )
    seen = visible(part, positions, owners) & (begin + jnp.arange(tile) >= i * tile)
    if mask is not None:
        seen &= lax.dynamic_slice_in_dim(mask, begin, tile, axis=2)
    return begin, values, seen
