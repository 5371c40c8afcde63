"""The selection with the kernel for Hopper GPUs in it, which a few lines stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.kernels import hopper_scores
from dsv4_eqx.kernels.entries import LAYERS, Entries, visible
from dsv4_eqx.kernels.form import FORMS, use_kernels
from dsv4_eqx.kernels.select import query_block, select, select_reference
from dsv4_eqx.numerics.slice import Slice

HEADS, DIM, TOPK = 8, 64, 5


def plain_scores(queries, weights, keys, first_rows, num_entries, num_seen):
    """Every entry's score; garbage where nobody looks, as the kernel leaves it."""
    rows = first_rows[:, None] + jnp.arange(num_entries)[None]
    products = jnp.einsum(
        "bqhc,bec->bqhe", queries, keys[rows], preferred_element_type=jnp.float32
    )
    scores = jnp.einsum("bqhe,bqh->bqe", jax.nn.relu(products), weights)
    seen = jnp.arange(num_entries)[None, None] < num_seen[..., None]
    return jnp.where(seen, scores, jnp.nan)


def picks(selection):
    """For each query the set of its entries, of marks or of a list."""
    selection = np.asarray(selection)
    rows = selection.reshape(-1, selection.shape[-1])
    if selection.dtype == bool:
        return [set(np.flatnonzero(row)) for row in rows]
    return [set(row[row >= 0]) for row in rows]


@pytest.mark.parametrize("layers", [None, 3])
def test_hopper_selects_what_other_forms_do(layers, monkeypatch):
    monkeypatch.setattr(hopper_scores, "index_scores", plain_scores)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    values = normal(2, 33, DIM)
    last = jnp.broadcast_to(4 * jnp.arange(33) + 3, (2, 33))
    positions = jnp.broadcast_to(jnp.arange(90, 131), (2, 41))
    queries, weights = normal(2, 41, HEADS, DIM), normal(2, 41, HEADS).astype("f4")
    keys = Entries(values, last)
    expected = select(queries, weights, visible(keys, positions), keys, TOPK)
    if layers is not None:
        stack = normal(2, layers, 33, DIM).at[:, 1].set(values)
        keys = Entries(Slice(stack, jnp.array(1), LAYERS), last)
    with use_kernels("hopper"):
        seen = visible(keys, positions)
        found = jax.jit(select, static_argnums=4)(queries, weights, seen, keys, TOPK)
    assert found.shape == (2, 41, TOPK)
    assert picks(found) == picks(expected)


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_selections_of_documents_equal_the_reference(form, monkeypatch):
    # Tiles of a few entries: those before a block's documents are not scored.
    monkeypatch.setitem(FORMS, form, dataclasses.replace(FORMS[form], entry_tile=7))
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    # Two rows of two documents, and a block of queries in the second one of each.
    last = np.concatenate([4 * np.arange(20) + 3, 4 * np.arange(13) + 3])
    ids = np.concatenate([np.zeros(20), np.ones(11), np.full(2, -1)])
    keys = Entries(
        normal(2, 33, DIM),
        jnp.asarray(np.stack([last, last]), jnp.int32),
        jnp.asarray(np.stack([ids, ids]), jnp.int32),
    )
    positions = jnp.broadcast_to(jnp.arange(9, 50), (2, 41))
    seen = visible(keys, positions, jnp.ones_like(positions))
    given = normal(2, 41, HEADS, DIM), normal(2, 41, HEADS), seen, keys, TOPK
    with use_kernels(form):
        found = jax.jit(select, static_argnums=4)(*given)
    assert picks(found) == picks(select_reference(*given))


@pytest.mark.parametrize("num_entries, block", [(0, 4096), (10**4, 4096), (10**6, 128)])
def test_queries_at_a_time_leave_room_for_their_scores(num_entries, block):
    values = jnp.zeros((1, num_entries, 1), jnp.bfloat16)
    keys = Entries(values, jnp.zeros((1, num_entries), jnp.int32))
    with use_kernels("hopper"):
        assert query_block(keys) == block
