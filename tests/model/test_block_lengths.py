"""Layers at every length: each has a program of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_block import LAYERS, assert_finite, inputs, run, small_block

QUICK_LENGTHS = (1, 5)  # 5: one window, one HCA entry, a CSA entry and a rest


def _length(length):
    slow = length not in QUICK_LENGTHS
    return pytest.param(length, marks=pytest.mark.slow) if slow else length


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("length", [_length(n) for n in range(1, 17)])
def test_truncating_the_input_truncates_the_output(layer, length):
    block, (streams, ids) = small_block(layer), inputs(17)
    part = run(block, streams[:, :length], ids[:, :length])
    whole = run(block, streams, ids)[:, :length]
    np.testing.assert_allclose(part, whole, 5e-5, 5e-5)


@pytest.mark.parametrize("length", [_length(n) for n in range(1, 41)])
def test_a_sliding_layer_is_finite_at_every_length(length):
    assert_finite(small_block(0), *inputs(length, batch=1))


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 41))
def test_a_bfloat16_sliding_layer_is_finite_at_every_length(length):
    dtype = jnp.bfloat16
    assert_finite(small_block(0, dtype), *inputs(length, batch=1, dtype=dtype))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("length", [_length(n) for n in (1, 2, 3, 5, 9, 31)])
def test_compressed_layers_are_finite_around_their_windows(layer, length):
    assert_finite(small_block(layer), *inputs(length))
