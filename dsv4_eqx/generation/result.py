"""The result of generation."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dsv4_eqx.generation.steps import State
from dsv4_eqx.model.abstract import Cache
from dsv4_eqx.model.mtp import MTPCache


class Generated(eqx.Module):
    """New tokens of each row; samples of one prompt are consecutive rows."""

    tokens: Int32[Array, "batch new"]  # 0 after a row's end
    lengths: Int32[Array, " batch"]  # new tokens, with the one that ended the row
    log_probabilities: Float32[Array, "batch new"]  # the model's, at temperature 1
    cache: Cache  # after all tokens but the last
    mtp_cache: MTPCache | None  # of the prediction block; None without speculation
    num_drafted: Int32[Array, " batch"]  # drafts that the model has verified
    num_accepted: Int32[Array, " batch"]  # drafts that were kept
    # None without `decode`. Static: jit of a function of the whole result compiles it
    # for each text; give the function the arrays that it needs.
    texts: tuple[str, ...] | None = eqx.field(static=True)


def result_of(state: State) -> Generated:
    """The result so far, in rows as long as the cache's capacity."""
    rows = state.rows
    index = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None]
    place = rows.prompt_lengths[:, None] + index
    is_new = place < rows.lengths[:, None]

    def new(x: Array) -> Array:
        moved = jnp.take_along_axis(x, place, axis=1, mode="clip")
        return jnp.where(is_new, moved, jnp.zeros_like(moved))

    return Generated(
        new(rows.tokens),
        rows.lengths - rows.prompt_lengths,
        new(rows.log_probabilities),
        state.cache,
        None if state.draft is None else state.draft.cache,
        rows.num_drafted,
        rows.num_accepted,
        texts=None,
    )


def shortened(result: Generated, new: int, texts: tuple[str, ...] | None) -> Generated:
    """The result in rows of `new` tokens, with texts."""

    def first(x: Array) -> Array:
        if not x.is_fully_addressable:
            return x[:, :new]
        # On the host, where another length needs no compilation.
        return jax.device_put(jax.device_get(x)[:, :new])

    return dataclasses.replace(
        result,
        tokens=first(result.tokens),
        log_probabilities=first(result.log_probabilities),
        texts=texts,
    )
