"""Attention for Hopper GPUs: each query with the list of the keys that it sees.

One kernel serves every kind of attention: a query's list holds the rows of its window,
then those of its entries, -1 for none. The softmax over the list comes without the
sink, which joins here.
"""

from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_eqx.kernels.entries import (
    Entries,
    Selection,
    flat_entries,
    is_index,
    visible,
)
from dsv4_eqx.kernels.query_blocks import KEPT
from dsv4_eqx.kernels.select import listed

# Multiprocessors of a Hopper GPU: what a few queries' lists are split over.
_PROCESSORS: Final = 132
# Keys in a block of the kernels.
_BLOCK: Final = 64


def fits_lists(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether the kernels take keys of this dtype and so many channels."""
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return is_half and head_dim % 64 == 0 and head_dim <= 512


@jax.custom_vjp
def attend_listed(floats, others):
    """`attend`, from its operands parted by whether they have a gradient."""
    return _forward(floats, others)[0]


@jax.named_scope("attend")
def _forward(floats, others):
    # Pallas is imported where it is used: most users have no such GPU.
    from dsv4_eqx.kernels.hopper_attention import attend_lists

    operands = eqx.combine(floats, others)
    queries, keys, sinks, entries, positions, segment_ids, selection = operands
    lists, num_keys = key_lists(
        positions, keys.shape[1], entries, selection, segment_ids
    )
    window, rows = _rows(keys, entries)
    batch, seq, heads, dim = queries.shape
    out, log_total = attend_lists(
        queries.reshape(-1, heads, dim),
        window,
        rows,
        lists,
        num_keys,
        scale=dim**-0.5,
        splits=_num_splits(batch * seq, heads, lists.shape[1]),
    )
    # The sink takes its share of the softmax's total.
    with_sink = jnp.logaddexp(log_total, sinks.astype(log_total.dtype)[None])
    share = jnp.exp(log_total - with_sink)[..., None]
    out = out.astype(share.dtype) * share
    out = checkpoint_name(out.reshape(queries.shape).astype(queries.dtype), KEPT)
    with_sink = checkpoint_name(with_sink, KEPT)
    log_total = with_sink.reshape(queries.shape[:3])
    return (out, log_total), (floats, others, out, with_sink)


@jax.named_scope("attend_backward")
def _backward(residuals, cotangents):
    from dsv4_eqx.kernels.hopper_attention_backward import attend_lists_backward

    d_out, d_log_total = cotangents
    floats, others, out, log_total = residuals
    operands = eqx.combine(floats, others)
    queries, keys, sinks, entries, positions, segment_ids, selection = operands
    lists, num_keys = key_lists(
        positions, keys.shape[1], entries, selection, segment_ids
    )
    window, rows = _rows(keys, entries)
    heads, dim = queries.shape[2:]
    flat = (x.reshape(-1, heads, dim) for x in (queries, out, d_out))
    queries, out, d_out = flat
    d_log_total = d_log_total.reshape(log_total.shape)
    d_queries, d_window, d_rows = attend_lists_backward(
        queries,
        window,
        rows,
        lists,
        num_keys,
        out,
        log_total,
        d_out,
        d_log_total,
        scale=dim**-0.5,
    )
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    mean -= d_log_total
    d_sinks = -jnp.sum(jnp.exp(sinks[None] - log_total) * mean, axis=0)
    gradients = [d_queries, d_window, d_sinks]
    gradients += [] if entries is None else [d_rows]
    leaves, structure = jax.tree.flatten(floats)
    gradients = [
        new.reshape(x.shape).astype(x.dtype)
        for new, x in zip(gradients, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, gradients), None


attend_listed.defvjp(_forward, _backward)


def key_lists(
    positions: Int[Array, "batch seq"],
    num_window_keys: int,
    entries: Entries | None,
    selection: Selection,
    segment_ids: Int[Array, "batch seq"] | None,
) -> tuple[Int[Array, "queries keys"], Int[Array, " queries"]]:
    """Rows of the keys that each query sees, and how many of the list's are used.

    Rows count first the window keys of all rows of the batch, then the entries, as they
    lie in their array; -1 is none.
    """
    batch, seq = positions.shape
    window = num_window_keys - seq + 1
    row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    place = jnp.arange(window, dtype=jnp.int32)[None, None]
    index = jnp.arange(seq, dtype=jnp.int32)[None, :, None] + place
    distance = window - 1 - place
    sees = distance <= positions[..., None]
    parts = [jnp.where(sees, row * num_window_keys + index, -1)]
    used = jnp.full((batch, seq), window, jnp.int32)
    if entries is not None:
        chosen = _chosen_entries(positions, entries, selection, segment_ids)
        first = flat_entries(entries.values)[1][:, None, None] + batch * num_window_keys
        parts.append(jnp.where(chosen >= 0, first + chosen, -1))
        place = jnp.arange(1, chosen.shape[2] + 1, dtype=jnp.int32)[None, None]
        last = jnp.max(jnp.where(chosen >= 0, place, 0), axis=2)
        used = jnp.where(last > 0, window + last, used)
    lists = jnp.concatenate(parts, axis=2)
    return lists.reshape(batch * seq, -1), used.reshape(-1)


def _chosen_entries(
    positions: Int[Array, "batch seq"],
    entries: Entries,
    selection: Selection,
    segment_ids: Int[Array, "batch seq"] | None,
) -> Int[Array, "batch seq chosen"]:
    """The entries that each query attends to, -1 for none."""
    if selection is not None and is_index(selection):
        return selection
    seen = visible(entries, positions, segment_ids)
    if selection is not None:
        return listed(seen & selection, seen.shape[-1])
    if segment_ids is not None:  # the document's entries alone, wherever they begin
        return listed(seen, seen.shape[-1])
    every = jnp.arange(seen.shape[-1], dtype=jnp.int32)[None, None]
    return jnp.where(seen, every, -1)


def _rows(
    keys: Float[Array, "batch keys head_dim"], entries: Entries | None
) -> tuple[Float[Array, "rows head_dim"], Float[Array, "entry_rows head_dim"]]:
    """Window keys and entries, all rows of the batch and all layers in one."""
    dim = keys.shape[-1]
    if entries is None:
        return keys.reshape(-1, dim), jnp.zeros_like(keys, shape=(0, dim))
    return keys.reshape(-1, dim), flat_entries(entries.values)[0]


def _num_splits(num_queries: int, heads: int, num_keys: int) -> int:
    """Into how many parts to split each list, so that all processors have work."""
    tiles = num_queries * -(-heads // 64)
    return max(1, min(_PROCESSORS // tiles, num_keys // (2 * _BLOCK)))
