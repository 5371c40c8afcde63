"""Core attention: one softmax over a sliding window, compressed entries and a sink.

Paper section 2.3. Keys are values, and one key head serves every query head, so a block
of queries with all its heads is one matrix. Blocks of queries run one after another:
each sees the band of window keys that it needs and either all entries or, gathered,
its own. Nothing of size seq x seq exists, forward or backward.

The functions know positions, not tensors' places in a sequence: a training step, a
chunk of a prompt and one decoded token call the same code.
"""

from collections.abc import Callable
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from dsv4_eqx.primitives.precision import at_least_float32

# Queries in a block. More reuse each key more, fewer waste less of the window's band.
QUERY_BLOCK: Final = 64


class Entries(eqx.Module):
    """Compressed entries that queries may look at.

    A query sees an entry if the last of the tokens in it is not after the query. What a
    cache has not filled yet is after every query.
    """

    values: Float[Array, "batch entries head_dim"]
    last_positions: Int[Array, "batch entries"]


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
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention of consecutive queries over their window, entries and the sink.

    **Arguments:**

    - `queries`: rotated, of consecutive tokens.
    - `positions`: of the queries; a negative one sees nothing and yields zeros.
    - `window_keys`: rotated, of the `window - 1` tokens before the first query, then of
        the queries' own tokens. What lies before position 0 is never seen.
    - `sinks`: a logit for each head that takes weight and gives nothing.
    - `entries`: compressed entries, if the layer has them.
    - `selection`: which of them each query attends to.
    """
    if entries is not None and entries.values.shape[1] == 0:
        entries = selection = None

    def attend_block(per_query: tuple[Array, Array, Selection], keys: Array) -> Array:
        queries, positions, selection = per_query
        return _attend_block(queries, positions, selection, keys, sinks, entries)

    per_query = (queries, positions, selection)
    return map_queries(attend_block, per_query, window_keys, block=QUERY_BLOCK)


def map_queries(
    function: Callable[[PyTree[Array], Array], Array],
    per_query: PyTree[Shaped[Array, "batch seq ..."]],
    window_keys: Float[Array, "batch keys head_dim"],
    *,
    block: int,
) -> Array:
    """Applies a function to blocks of consecutive queries, one after another.

    The backward pass keeps what goes into each block and computes the rest again.

    **Arguments:**

    - `function`: takes a block of `per_query` and the window keys of that block.
    - `per_query`: arrays over the queries; shorter blocks are filled with zeros, and
        integers with -1.
    - `window_keys`: as for `attend`.
    - `block`: the most queries at a time.
    """
    seq = jax.tree.leaves(per_query)[0].shape[1]
    if seq <= block:
        return function(per_query, window_keys)
    window = window_keys.shape[1] - seq + 1
    blocks = jax.tree.map(lambda x: split_blocks(x, block), per_query)
    bands = _banded(window_keys, window, block)
    out = lax.map(jax.checkpoint(lambda operands: function(*operands)), (blocks, bands))
    return join_blocks(out, seq)


def split_blocks(
    x: Shaped[Array, "batch seq *rest"], block: int
) -> Shaped[Array, "blocks batch block *rest"]:
    """Blocks of consecutive queries, filled up with zeros and positions -1."""
    short = -x.shape[1] % block
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    widths = [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def join_blocks(
    blocks: Shaped[Array, "blocks batch block *rest"], seq: int
) -> Shaped[Array, "batch seq *rest"]:
    """What `split_blocks` split, without the filling."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :seq]


def _banded(
    keys: Float[Array, "batch keys head_dim"], window: int, block: int
) -> Float[Array, "blocks batch band head_dim"]:
    """For each block of queries, the window's keys before it and its own.

    Built of whole shifted copies, so that the backward pass is a sum of slices.
    """
    before = -(-(window - 1) // block)  # blocks of keys before a block of queries
    seq = keys.shape[1] - (window - 1)
    front = before * block - (window - 1)
    keys = jnp.pad(keys, ((0, 0), (front, -seq % block), (0, 0)))
    keys = jnp.moveaxis(keys.reshape(keys.shape[0], -1, block, keys.shape[2]), 1, 0)
    blocks = keys.shape[0] - before
    shifted = [keys[i : i + blocks] for i in range(before + 1)]
    return jnp.concatenate(shifted, axis=2)[:, :, front:]


@jax.named_scope("attend")
def _attend_block(
    queries: Float[Array, "batch block heads head_dim"],
    positions: Int[Array, "batch block"],
    selection: Selection,
    keys: Float[Array, "batch band head_dim"],
    sinks: Float[Array, " heads"],
    entries: Entries | None,
) -> Float[Array, "batch block heads head_dim"]:
    # What is attended to: values, which are keys too, and who sees them.
    attended = [(keys, _in_window(positions, keys.shape[1]))]
    if entries is not None:
        attended.append(_seen_entries(entries, positions, selection))
    logits = [_masked_logits(queries, values, seen) for values, seen in attended]
    sinks = sinks.astype(logits[0].dtype)[:, None]
    tops = [jnp.max(part, axis=-1, keepdims=True) for part in logits]
    top = lax.stop_gradient(jnp.max(jnp.stack(tops), axis=0, initial=-jnp.inf))
    top = jnp.maximum(top, lax.stop_gradient(sinks))
    weights = [jnp.exp(part - top) for part in logits]
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    total = total + jnp.exp(sinks - top)
    out = sum(
        _weighted_sum(part, values) for part, (values, _) in zip(weights, attended)
    )
    return (out / total).astype(queries.dtype)


def _masked_logits(queries: Array, values: Array, seen: Array) -> Array:
    """Values are `[batch, keys, channel]`, or `[batch, query, keys, channel]`."""
    equation = "bqhc,bkc->bqhk" if values.ndim == 3 else "bqhc,bqkc->bqhk"
    wide = at_least_float32(queries).dtype
    logits = jnp.einsum(equation, queries, values, preferred_element_type=wide)
    logits = logits * queries.shape[-1] ** -0.5
    return jnp.where(seen[:, :, None, :], logits, -jnp.inf)


def _weighted_sum(weights: Array, values: Array) -> Array:
    equation = "bqhk,bkc->bqhc" if values.ndim == 3 else "bqhk,bqkc->bqhc"
    return jnp.einsum(
        equation,
        weights.astype(values.dtype),
        values,
        preferred_element_type=weights.dtype,
    )


def _seen_entries(
    entries: Entries, positions: Int[Array, "batch block"], selection: Selection
) -> tuple[Array, Array]:
    if selection is not None and jnp.issubdtype(selection.dtype, jnp.integer):
        index = jnp.maximum(selection, 0)
        values = jax.vmap(lambda v, i: v.at[i].get(mode="promise_in_bounds"))(
            entries.values, index
        )
        return values, selection >= 0
    seen = visible(entries, positions)
    return entries.values, seen if selection is None else seen & selection


def visible(
    entries: Entries, positions: Int[Array, "batch seq"]
) -> Bool[Array, "batch seq entries"]:
    """Whether the last token of each entry is not after the query.

    **Arguments:**

    - `entries`: the compressed entries.
    - `positions`: of the queries.
    """
    return entries.last_positions[:, None, :] <= positions[:, :, None]


def _in_window(
    positions: Int[Array, "batch block"], num_keys: int
) -> Bool[Array, "batch block keys"]:
    block = positions.shape[1]
    window = num_keys - block + 1
    index = jnp.arange(block, dtype=positions.dtype)[:, None]
    distance = index + window - 1 - jnp.arange(num_keys, dtype=positions.dtype)
    in_band = (distance >= 0) & (distance < window)
    return in_band & (distance <= positions[..., None])
