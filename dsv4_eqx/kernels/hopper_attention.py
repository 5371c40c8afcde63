"""Attention over lists of keys on Hopper GPUs: one kernel for every kind of attention.

All heads share the keys, and keys are values: 64 heads of one query are a tile that
attends to the rows which the query's list names.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dsv4_eqx.kernels.batching import one_by_one
from dsv4_eqx.kernels.hopper_attention_kernel import (
    HEADS,
    LOG2_E,
    PROGRAMS,
    Sizes,
    lists_kernel,
)
from dsv4_eqx.kernels.hopper_gather import BLOCK
from dsv4_eqx.numerics.varying import match_varying


def attend_lists(
    queries: Float[Array, "queries heads head_dim"],
    window: Float[Array, "window_rows head_dim"],
    entries: Float[Array, "entry_rows head_dim"],
    lists: Int[Array, "queries keys"],
    num_keys: Int[Array, " queries"],
    *,
    scale: float,
    splits: int = 1,
    num_programs: int = PROGRAMS,
    interpret: Any = None,  # parameters of Pallas's interpreter, for tests
) -> tuple[Float[Array, "queries heads head_dim"], Float32[Array, "queries heads"]]:
    """Each query's softmax over the keys in its list, and the logarithm of its total.

    Index i of a list means row i of `window`, or row `i - len(window)` of `entries`, or
    no key if it is negative; `num_keys` is where the part of a list ends that holds
    keys. A query that has no keys yields zeros and -inf. The `splits` parts of a list
    are attended to by different programs, for few queries.
    """
    num_queries, heads, head_dim = queries.shape
    if len(window) == 0:
        # Then entries are the rows that a list counts from 0.
        window, entries = entries, window
    if 0 in (num_queries, len(window)):
        return _nothing(queries, window, lists)
    # Two warpgroups have half of the channels each, in whole tiles of memory.
    queries = padded(padded(queries, 1, HEADS), 2, 128)
    window, entries = padded(window, 1, 128), padded(entries, 1, 128)
    entries = entries if entries.shape[0] > 0 else window
    sizes = Sizes(
        num_queries=num_queries,
        tiles=queries.shape[1] // HEADS,
        head_dim=queries.shape[2],
        splits=splits,
        split_blocks=max(1, -(-lists.shape[1] // (splits * BLOCK))),
        dtype=queries.dtype,
        log2_scale=scale * LOG2_E,
        num_programs=num_programs,
        interprets=bool(interpret),
    )
    length = splits * sizes.split_blocks * BLOCK
    lists = padded(lists.astype(jnp.int32), 1, length, -1)
    operands = queries, window, entries, lists, num_keys.astype(jnp.int32)
    out, log_total = one_by_one(lists_kernel(sizes, operands, interpret))(*operands)
    out, log_total = match_varying(out, log_total, *operands)[:2]
    out, log_total = _joined(out, log_total, splits)
    return out[:, :heads, :head_dim].astype(queries.dtype), log_total[:, :heads]


def _nothing(queries, *others):
    """What there is of no queries, or where there are no keys."""
    log_total = jnp.full(queries.shape[:2], -jnp.inf, jnp.float32)
    operands = queries, *others
    out, log_total, *_ = match_varying(jnp.zeros_like(queries), log_total, *operands)
    return out, log_total


def padded(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
    """With more of `value` at the end of an axis, to a multiple, at least one."""
    more = max(1, -(-x.shape[axis] // multiple)) * multiple - x.shape[axis]
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if more > 0 else x


def _joined(out, log_total, splits):
    """Of all parts of each list, which lie next to each other."""
    if splits == 1:
        return out, log_total
    out = out.reshape(-1, splits, *out.shape[1:])
    logs = log_total.reshape(-1, splits, *log_total.shape[1:])
    log_total = jax.nn.logsumexp(logs, axis=1)
    # A query without keys has -inf everywhere.
    weights = jnp.exp(logs - jnp.maximum(log_total, -1e30)[:, None])
    return jnp.sum(out * weights[..., None], axis=1), log_total
