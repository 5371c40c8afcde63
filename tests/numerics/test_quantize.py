"""Packing in FP8 and FP4 against ml_dtypes' rounding, block by block."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_eqx.numerics.quantize import (
    BLOCKS,
    FP4,
    FP8,
    LARGEST_CODE,
    FakeQuantizedWeight,
    fake_quantize,
    quantize,
)

CODES = pytest.mark.parametrize("code_dtype", [FP8, FP4], ids=str)


def by_block(x, code_dtype, block):
    """The numbers, each block in numpy and float64."""
    x = np.asarray(x, "f8")
    out, largest = np.empty_like(x), LARGEST_CODE[code_dtype]
    for row in range(0, x.shape[0], block[0]):
        for column in range(0, x.shape[1], block[1]):
            place = np.s_[row : row + block[0], column : column + block[1]]
            most = max(np.abs(x[place]).max(), largest * 2.0**-126)
            scale = 2.0 ** np.ceil(np.log2(most / largest))
            codes = np.float32(x[place] / scale).astype(code_dtype)
            out[place] = codes.astype("f8") * scale
    return out


@CODES
def test_numbers_are_the_nearest_of_their_block(code_dtype):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((150, 134)) * 2.0 ** generator.integers(
        -30, 30, (150, 1)
    )
    x[:, 33:40] = 0
    x = jnp.asarray(x, jnp.float32)
    block = BLOCKS[code_dtype]
    packed = quantize(x, code_dtype, block)
    assert packed.shape == x.shape and packed.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(packed.dequantize(), by_block(x, code_dtype, block))


@CODES
def test_ties_go_to_even_codes_and_signs_stay(code_dtype):
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    if code_dtype == FP4:
        codes = np.arange(16, dtype=np.uint8).astype(np.uint8).view(np.uint8)
        codes = codes.view(FP4) if FP4.itemsize == 1 else codes
    values = np.unique(codes.astype(np.float32)[np.isfinite(codes.astype("f4"))])
    halfway = (values[1:] + values[:-1]) / 2
    given = np.concatenate([values, halfway, [-0.0], values[-1:]]).astype(np.float32)
    given = given[: len(given) // 2 * 2]
    given[0] = LARGEST_CODE[code_dtype]  # so that the scale is 1
    found = quantize(jnp.asarray(given[None]), code_dtype, (1, given.size))
    expected = given.astype(code_dtype).astype(np.float32)
    assert (np.asarray(found.scales) == 127).all()
    assert np.asarray(found.dequantize()[0]).tobytes() == expected.tobytes()


@CODES
def test_blocks_of_zeros_and_of_the_smallest_numbers(code_dtype):
    x = np.zeros((2, 256), np.float32)
    x[0, :128] = 2.0**-126
    found = quantize(jnp.asarray(x), code_dtype, (1, 32))
    np.testing.assert_array_equal(found.dequantize(), x)
    assert (np.asarray(found.scales) >= 1).all()


@CODES
def test_what_is_packed_already_stays_the_same(code_dtype):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((130, 160)), jnp.float32)
    once = quantize(x, code_dtype, BLOCKS[code_dtype]).dequantize()
    again = quantize(once, code_dtype, BLOCKS[code_dtype]).dequantize()
    assert np.asarray(once).tobytes() == np.asarray(again).tobytes()


def test_blocks_are_those_of_the_matrix_in_a_checkpoint():
    x = np.random.default_rng(2).standard_normal((2, 150, 6, 25)).astype(np.float32)
    x *= 2.0 ** np.arange(6)[:, None]
    weight = FakeQuantizedWeight(jnp.asarray(x), FP8, (150, 150), 1, 2)
    found = np.asarray(weight.dequantize())
    for layer in range(2):
        expected = by_block(x[layer].reshape(150, 150), FP8, (128, 128))
        np.testing.assert_array_equal(found[layer].reshape(150, 150), expected)
    # Experts' gate and up are two matrices, one above another.
    x = x.reshape(2, 3, 2, 75, 50) * np.array([1, 64])[:, None, None]
    weight = FakeQuantizedWeight(jnp.asarray(x, jnp.float32), FP8, (75, 50), 1, 1)
    stacked = weight.reshaped(150)
    assert stacked.shape == (6, 150, 50)
    found = np.asarray(weight.dequantize()).reshape(6, 150, 50)
    np.testing.assert_array_equal(stacked.dequantize(), found)
    expected = by_block(x[1, 2, 1], FP8, (128, 128))
    np.testing.assert_array_equal(found[5, 75:], expected)


def test_gradients_go_straight_through():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 100)), jnp.float32)
    cotangent = x**2

    def run(x):
        return fake_quantize(x, FP8, 64, 1e-4)

    out, pullback = jax.vjp(run, x)
    np.testing.assert_array_equal(out, by_block(x, FP8, (1, 64)))
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent)


def test_numbers_that_are_not_finite_stay_so():
    x = jnp.asarray([[1.0, jnp.nan, 3.0, jnp.inf]])
    weight = FakeQuantizedWeight(x, FP4, (1, 4), 1, 1)
    found = np.asarray(weight.dequantize())
    assert np.isnan(found[0, 1]) and np.isinf(found[0, 3])


def test_least_is_what_a_scale_is_made_for():
    x = jnp.full((1, 64), 7e-10, jnp.float32)
    rough, fine = (fake_quantize(x, FP8, 64, least) for least in (1e-4, 1e-30))
    assert abs(rough[0, 0] / x[0, 0] - 1) > abs(fine[0, 0] / x[0, 0] - 1)


def test_parts_of_blocks_and_accidental_arrays_are_refused():
    weight = FakeQuantizedWeight(jnp.ones((64, 256)), FP8, (128, 256), 1, 1)
    with pytest.raises(ValueError, match=r"split into parts of \(64, 256\)"):
        weight.quantize()
    with pytest.raises(TypeError, match="FakeQuantizedWeight is no array"):
        np.asarray(weight)
