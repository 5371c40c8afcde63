"""Core attention: one softmax over a sliding window, compressed entries and a sink.

Paper section 2.3. Keys are values, and one key head serves every query head. The
functions know positions, not tensors' places in a sequence: a training step, a chunk of
a prompt and one decoded token call the same code. `attend_reference` is the meaning;
`attend` chooses the form that runs.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv4_eqx.kernels.attend_blocked import attend_blocked
from dsv4_eqx.kernels.attend_listed import attend_listed, fits_lists
from dsv4_eqx.kernels.entries import (
    Entries,
    Selection,
    in_window,
    is_index,
    tile_of,
    visible,
)
from dsv4_eqx.kernels.form import current_form, is_reference
from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.varying import match_varying


def attend_reference(
    queries: Float[Array, "batch seq heads head_dim"],
    positions: Int[Array, "batch seq"],
    window_keys: Float[Array, "batch keys head_dim"],
    sinks: Float[Array, " heads"],
    entries: Entries | None = None,
    selection: Selection = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq heads"]]:
    """What `attend` computes, in a few lines; all logits exist at once."""
    wide = at_least_float32(queries)
    seen = in_window(positions, window_keys.shape[1])
    keys = window_keys
    if entries is not None:
        sees = visible(entries, positions, segment_ids)
        if selection is not None and is_index(selection):
            every = jnp.arange(entries.shape[1])[None, None, None]
            sees = jnp.any(selection[..., None] == every, axis=2)
        elif selection is not None:
            sees = sees & selection
        values = tile_of(entries.values, 0, entries.shape[1])
        keys = jnp.concatenate([keys, values], axis=1)
        seen = jnp.concatenate([seen, sees], axis=2)
    keys = keys.astype(wide.dtype)
    logits = jnp.einsum("bqhc,bkc->bqhk", wide, keys) * wide.shape[-1] ** -0.5
    sink = jnp.broadcast_to(sinks[:, None], (*wide.shape[:3], 1)).astype(wide.dtype)
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    logits = jnp.concatenate([logits, sink], axis=3)
    weights = jax.nn.softmax(logits, axis=3)
    out = jnp.einsum("bqhk,bkc->bqhc", weights[..., :-1], keys)
    return out.astype(queries.dtype), jax.nn.logsumexp(logits, axis=3)


def attend(
    queries: Float[Array, "batch seq heads head_dim"],
    positions: Int[Array, "batch seq"],
    window_keys: Float[Array, "batch keys head_dim"],
    sinks: Float[Array, " heads"],  # take weight and give nothing
    entries: Entries | None = None,
    selection: Selection = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq heads"]]:
    """Attention of a block of consecutive queries over window, entries and sink.

    Positions start at 0 in each document of a row; a query at a negative one sees
    nothing and yields zeros. Window keys are of the `window - 1` tokens before the
    first query, then of the queries' own. A selection's mask shows none that the query
    may not see; its indices must be of entries that it may see. Also returned is the
    logarithm of the sum of the exponentials of all of a query's logits, the sink's
    included.
    """
    if entries is not None and entries.shape[1] == 0:
        entries = selection = None
    if is_reference():
        return attend_reference(
            queries, positions, window_keys, sinks, entries, selection, segment_ids
        )
    operands = queries, window_keys, sinks, entries, positions, segment_ids, selection
    leaves, structure = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(structure, match_varying(*leaves))
    floats, others = eqx.partition(operands, eqx.is_inexact_array)
    form = current_form()
    if form.hopper and fits_lists(queries.dtype, queries.shape[-1]):
        return attend_listed(floats, others)
    return attend_blocked(floats, others, form)


def query_block(window_keys: Float[Array, "batch keys head_dim"]) -> int:
    """How many queries to give to `attend` at a time."""
    form = current_form()
    if form.hopper and fits_lists(window_keys.dtype, window_keys.shape[-1]):
        return form.hopper_query_block
    return form.query_block
