"""Queries in blocks, one after another.

Queries and heads' outputs are many times wider than the model; neither exists for a
whole sequence at once. Each block of consecutive queries sees the band of window keys
that it needs.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

# What a block of queries keeps for the backward pass, beside what goes into it.
KEPT: Final = "attended"


def map_queries(
    function: Callable[[PyTree[Array], Array], PyTree[Array]],
    per_query: PyTree[Shaped[Array, "batch seq ..."]],
    window_keys: Float[Array, "batch keys head_dim"],
    block: int,
) -> PyTree[Array]:
    """Applies a function to blocks of consecutive queries, and to their window keys.

    Shorter blocks are filled with ones, and integers with -1. For the backward pass it
    keeps what goes into each block and what `attend` gives, and computes the rest
    again.
    """
    seq = jax.tree.leaves(per_query)[0].shape[1]
    if seq <= block:
        return function(per_query, window_keys)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    run = jax.checkpoint(lambda operands: function(*operands), policy=policy)
    bands = _banded(window_keys, window_keys.shape[1] - seq + 1, block)
    blocks = jax.tree.map(lambda x: split_blocks(x, block), per_query)
    out = lax.map(run, (blocks, bands))
    return jax.tree.map(lambda x: join_blocks(x, seq), out)


def map_blocks(
    function: Callable[[PyTree[Array]], PyTree[Array]],
    per_query: PyTree[Shaped[Array, "batch seq ..."]],
    block: int,
) -> PyTree[Array]:
    """The same without window keys; it keeps what the function itself does."""
    seq = jax.tree.leaves(per_query)[0].shape[1]
    if seq <= block:
        return function(per_query)
    blocks = jax.tree.map(lambda x: split_blocks(x, block), per_query)
    out = lax.map(function, blocks)
    return jax.tree.map(lambda x: join_blocks(x, seq), out)


def split_blocks(
    x: Shaped[Array, "batch seq *rest"], block: int
) -> Shaped[Array, "blocks batch block *rest"]:
    """Blocks of consecutive queries, filled up with ones and positions -1."""
    short = -x.shape[1] % block
    # Not with zeros, whose norm has no derivative where `rms_norm_eps` is 0.
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 1
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
    before = -(-(window - 1) // block)  # blocks of keys before one of queries
    front = before * block - (window - 1)
    keys = split_blocks(jnp.pad(keys, ((0, 0), (front, 0), (0, 0))), block)
    blocks = keys.shape[0] - before
    shifted = [keys[i : i + blocks] for i in range(before + 1)]
    return jnp.concatenate(shifted, axis=2)[:, :, front:]
