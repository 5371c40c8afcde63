"""Sums over heads of products with entries, against all products at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.kernels.chosen import is_chosen, over_heads
from dsv4_eqx.kernels.entries import Entries
from dsv4_eqx.kernels.form import FORMS, use_kernels
from tests.models import relative

BATCH, QUERIES, HEADS, ENTRIES, DIM = 2, 7, 3, 11, 5


def normal(seed, *shape):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32))


def selected(kind):
    """Some entries for each query; of some queries fewer, or none."""
    marks = np.random.default_rng(3).random((BATCH, QUERIES, ENTRIES)) < 0.4
    marks[:, 2] = False
    if kind == "all":
        return None
    if kind == "mask":
        return jnp.asarray(marks)
    lists = np.full((BATCH, QUERIES, 9), -1, np.int32)
    for place in np.ndindex(BATCH, QUERIES):
        found = np.flatnonzero(marks[place])[:9]
        lists[place][: len(found)] = found
    return jnp.asarray(lists)


@pytest.mark.parametrize("tile", [4, ENTRIES])
@pytest.mark.parametrize("kind", ["all", "mask", "list"])
def test_sums_and_gradients_equal_those_of_all_products(kind, tile, monkeypatch):
    form = dataclasses.replace(FORMS["cpu"], entry_tile=tile)
    monkeypatch.setitem(FORMS, "cpu", form)
    selection = selected(kind)
    last = jnp.broadcast_to(jnp.arange(ENTRIES), (BATCH, ENTRIES))
    positions = jnp.broadcast_to(4 + jnp.arange(QUERIES), (BATCH, QUERIES))
    operands = (
        normal(0, BATCH, QUERIES, HEADS, DIM),
        normal(1, BATCH, ENTRIES, DIM),
        normal(2, BATCH, QUERIES, HEADS),
    )

    @jax.jit
    def step(*operands):
        def loss(queries, values, weights):
            entries = Entries(values, last)
            sums = over_heads(
                lambda x: jnp.sum(jax.nn.relu(x) * weights[..., None], axis=2),
                queries,
                entries,
                selection,
            )
            sums = jnp.where(is_chosen(entries, positions, selection), sums, 0)
            return jnp.sum(jnp.sin(sums)), sums

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*operands)

    gradients, found = step(*operands)
    with use_kernels("reference"):
        expected_gradients, expected = step(*operands)
    assert relative(found, expected) <= 1e-6 and jnp.any(expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(gradient, wanted) <= 1e-6
