"""Layers at every length: each has a program of its own."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_block import LAYERS, assert_finite, inputs, run, small_block
from tests.tiers import tiers

# 5: one window, one HCA entry, a CSA entry and a rest. Around windows, one entry and
# the next, and more CSA entries than are selected.
TRUNCATED = {0: (4, 6), 1: (4, 6, 10), 2: (1, 2, 3, 9)}
QUICK = [(layer, 5) for layer in LAYERS]
IN_CI = [(layer, length) for layer in TRUNCATED for length in TRUNCATED[layer]]
# Around the window of 5, and around what a processor takes at once.
LENGTHS = {jnp.float32: (1, 4, 6, 32), jnp.bfloat16: (1, 5, 7, 33)}


@pytest.mark.parametrize(
    "layer, length",
    tiers(itertools.product(LAYERS, range(1, 17)), quick=QUICK, in_ci=IN_CI),
)
def test_truncating_the_input_truncates_the_output(layer, length):
    block, (streams, ids) = small_block(layer), inputs(17)
    part = run(block, streams[:, :length], ids[:, :length])
    whole = run(block, streams, ids)[:, :length]
    np.testing.assert_allclose(part, whole, 5e-5, 5e-5)


@pytest.mark.parametrize(
    "length", tiers(range(1, 41), quick=[5], in_ci=LENGTHS[jnp.float32])
)
def test_a_sliding_layer_is_finite_at_every_length(length):
    assert_finite(small_block(0), *inputs(length, batch=1))


@pytest.mark.parametrize("length", tiers(range(1, 41), in_ci=LENGTHS[jnp.bfloat16]))
def test_a_bfloat16_sliding_layer_is_finite_at_every_length(length):
    dtype = jnp.bfloat16
    assert_finite(small_block(0, dtype), *inputs(length, batch=1, dtype=dtype))


@pytest.mark.parametrize(
    "layer, length",
    tiers(
        itertools.product([1, 2], [1, 2, 3, 5, 9, 31]),
        in_ci=[(1, 1), (1, 5), (2, 3), (2, 9)],
    ),
)
def test_compressed_layers_are_finite_around_their_windows(layer, length):
    assert_finite(small_block(layer), *inputs(length))
