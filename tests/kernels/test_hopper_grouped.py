"""Hopper's grouped products, run by Pallas's interpreter, against plain products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dsv4_eqx.kernels.hopper_grouped import Tiles, grouped_matmul
from dsv4_eqx.kernels.hopper_outer import grouped_outer

pytestmark = pytest.mark.slow  # the interpreter, or whole models

# jax 0.10's interpreter multiplies no transposed operand.
IS_OLD = jax.__version_info__ < (0, 11)
needs_transpose = pytest.mark.skipif(IS_OLD, reason="its interpreter cannot transpose")
TRANSPOSED = [pytest.param(False, marks=needs_transpose), True]
INTERPRETED = InterpretGPUParams()
QUICKLY = {"xla_backend_optimization_level": 0}
OUT, IN = 128, 192
ROWS_SHARED = Tiles(block_m=128, block_n=64, block_k=64, stages=2)
COLUMNS_SHARED = Tiles(block_m=64, block_n=128, block_k=128, stages=3, stores=1)
ALONE = Tiles(block_m=64, block_n=64, block_k=64, stages=3, warpgroups=1)


def integers(*shape):
    """Small ones: sums of their products are exact."""
    numbers = np.random.default_rng(len(shape)).integers(-2, 3, shape)
    return jnp.asarray(numbers, jnp.bfloat16)


def matmul(sizes, num_rows, first, transposed, tiles, interpret=INTERPRETED):
    matrices = integers(first + len(sizes) + 1, OUT, IN)
    rows = integers(num_rows, OUT if transposed else IN)
    product = functools.partial(
        grouped_matmul, transposed=transposed, tiles=tiles, interpret=interpret
    )
    product = jax.jit(product, compiler_options=QUICKLY)
    sizes = jnp.asarray(sizes, jnp.int32)
    return rows, matrices, product(rows, matrices, sizes, first=jnp.asarray(first))


def assert_products(got, rows, matrices, sizes, first, transposed):
    rows, matrices = np.asarray(rows, "f4"), np.asarray(matrices, "f4")
    if not transposed:
        matrices = matrices.swapaxes(1, 2)
    group = np.repeat(first + np.arange(len(sizes)), sizes)
    want = np.einsum("ri,rio->ro", rows[: len(group)], matrices[group])
    want = np.pad(want, ((0, len(rows) - len(group)), (0, 0)))
    np.testing.assert_array_equal(np.asarray(got, "f4"), want)


@pytest.mark.parametrize("transposed", TRANSPOSED)
@pytest.mark.parametrize(
    "sizes, num_rows, first, tiles",
    [
        # Whole subtiles and parts, none, rows past the end, of which some fill none.
        ([70, 0, 1, 130, 17], 230, 2, ROWS_SHARED),
        ([0, 3, 64, 0, 33], 200, 1, COLUMNS_SHARED),
        ([0, 2, 0, 1], 3, 3, ALONE),
        ([0, 0, 90], 90, 0, ALONE),
    ],
)
def test_rows_are_multiplied_by_their_groups_matrix(
    sizes, num_rows, first, tiles, transposed
):
    rows, matrices, got = matmul(sizes, num_rows, first, transposed, tiles)
    assert_products(got, rows, matrices, sizes, first, transposed)


@pytest.mark.skipif(IS_OLD, reason="its interpreter finds no races")
def test_no_copy_races_with_another():
    sizes = [64, 3, 128, 20]  # where no two subtiles share rows
    interpret = InterpretGPUParams(detect_races=True)
    matmul(sizes, 215, 0, True, ROWS_SHARED, interpret)
    assert not gpu_callbacks.get_races().races_found


@needs_transpose
@pytest.mark.parametrize(
    "sizes, num_rows, tiles, dtype",
    [
        ([70, 0, 1, 130, 15], 230, ROWS_SHARED, jnp.bfloat16),
        ([64, 64, 0, 9], 137, ALONE, jnp.float32),
        ([0, 2, 1], 3, ROWS_SHARED, jnp.bfloat16),
    ],
)
def test_outer_products_are_summed_by_group(sizes, num_rows, tiles, dtype):
    left, right = integers(num_rows, OUT), integers(num_rows, IN)
    # What lies past the last group is not used, on the left not even where not finite.
    left = left.at[sum(sizes) :].set(jnp.nan)
    interpret = InterpretGPUParams(detect_races=True)
    product = functools.partial(
        grouped_outer, dtype=dtype, tiles=tiles, interpret=interpret
    )
    product = jax.jit(product, compiler_options=QUICKLY)
    got = product(left, right, jnp.asarray(sizes, jnp.int32))
    assert not gpu_callbacks.get_races().races_found
    ends = np.cumsum(sizes)
    want = [
        np.asarray(left[end - size : end], "f4").T
        @ np.asarray(right[end - size : end], "f4")
        for size, end in zip(sizes, ends)
    ]
    assert got.dtype == dtype
    want = np.asarray(jnp.asarray(want).astype(dtype), "f4")
    np.testing.assert_array_equal(np.asarray(got, "f4"), want)


def test_no_rows_give_no_rows_and_zeros():
    matrices, sizes = integers(2, OUT, IN), jnp.zeros(2, jnp.int32)
    no_rows = integers(0, IN)
    assert grouped_matmul(no_rows, matrices, sizes).shape == (0, OUT)
    sums = grouped_outer(integers(0, OUT), no_rows, sizes)
    np.testing.assert_array_equal(np.asarray(sums, "f4"), np.zeros((2, OUT, IN)))


SIZES = jnp.ones(1, jnp.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: grouped_matmul(integers(1, 96), integers(1, 64, 96), SIZES),
            "multiples of 64",
        ),
        (
            lambda: grouped_matmul(integers(1, 128), integers(1, 128, 64), SIZES),
            "take 64 channels",
        ),
        (
            lambda: grouped_outer(integers(1, 64), integers(2, 64), SIZES),
            "1 and 2 rows",
        ),
        (
            lambda: grouped_outer(integers(1, 64), integers(1, 64).astype("f4"), SIZES),
            "both must be bfloat16",
        ),
        (lambda: Tiles(block_m=128, warpgroups=1), "cannot be multiplied"),
    ],
)
def test_what_does_not_fit_is_refused(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
