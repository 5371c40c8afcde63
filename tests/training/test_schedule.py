"""The learning rate over a run, at its corners and beyond."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4

pytest.importorskip("optax")


def rates(steps, *args):
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        return np.asarray(jax.vmap(dsv4.schedule(*args))(jnp.asarray(steps)), "f8")


def test_rate_rises_stays_and_falls_along_a_cosine():
    steps = [0, 1, 3, 4, 9, 10, 13, 16, 22, 1000]
    fallen = [2e-5 + 9e-5 * (1 + math.cos(math.pi * k / 12)) for k in (3, 6)]
    expected = [0, 5e-5, 1.5e-4, *[2e-4] * 3, *fallen, 2e-5, 2e-5]
    found = rates(steps, 2e-4, 2e-5, 4, 6, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ((0, 0, 0), [1, 1, 1, 1, 1]),
        ((2, 0, 0), [0, 0.5, 1, 1, 1]),
        ((0, 2, 0), [1, 1, 1, 1, 1]),
        ((0, 0, 2), [1, 0.75, 0.5, 0.5, 0.5]),
        ((2, 0, 2), [0, 0.5, 1, 0.75, 0.5]),
        ((0, 1, 2), [1, 1, 0.75, 0.5, 0.5]),
    ],
)
def test_each_piece_may_be_absent(lengths, expected):
    np.testing.assert_allclose(rates(range(5), 1.0, 0.5, *lengths), expected, 1e-6)


@pytest.mark.parametrize(
    "args, name",
    [
        ((0.0, 0.0, 1, 1, 1), "peak=0.0"),
        ((1e-4, 2e-4, 1, 1, 1), "final=0.0002"),
        ((1e-4, -1e-5, 1, 1, 1), "final=-1e-05"),
        ((1e-4, 1e-5, -1, 1, 1), "warmup_steps=-1"),
        ((1e-4, 1e-5, 1, 1.5, 1), "constant_steps=1.5"),
        ((1e-4, 1e-5, 1, 1, True), "decay_steps=True"),
    ],
)
def test_wrong_numbers_are_refused(args, name, without_shape_checks):
    with pytest.raises(ValueError, match=rf"schedule\({name}\): must be"):
        dsv4.schedule(*args)
