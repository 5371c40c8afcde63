"""The grouped product against dense products, on both of its paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv4_eqx.moe import grouped
from dsv4_eqx.moe.grouped import grouped_matmul

SIZES = {
    "uneven": [5, 1, 9, 2],
    "empty ones": [0, 7, 0, 0, 3, 0],
    "all in the first": [13, 0, 0],
    "all in the last": [0, 0, 13],
    "one row": [0, 1, 0],
    "one group": [5],
    "no row": [0, 0, 0],
    "over the block": [70, 3, 129, 0, 64, 65],
}


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(sizes, past_end=0, in_size=5, out_size=7):
    num_rows = sum(sizes) + past_end
    rows = normal((num_rows, in_size))
    matrices = normal((len(sizes), out_size, in_size), 1)
    return rows, matrices, jnp.asarray(sizes, jnp.int32)


def dense(rows, matrices, sizes):
    """Every row with every matrix, then the row's own."""
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
    own = group[:, None] == jnp.arange(sizes.shape[0])
    products = jnp.einsum("ri,goi->rgo", rows, matrices, precision="highest")
    return jnp.sum(jnp.where(own[..., None], products, 0), axis=1)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("past_end", [0, 1, 8])
def test_product_and_gradients_equal_dense(sizes, past_end):
    rows, matrices, sizes = operands(sizes, past_end)
    used = int(sizes.sum())
    cotangent = normal((rows.shape[0], 7), 2)

    def loss(product):
        # Rows past the last group are unspecified: nobody may use them.
        return lambda rows, matrices: jnp.sum(
            (product(rows, matrices, sizes) * cotangent)[:used]
        )

    out = jax.jit(grouped_matmul)(rows, matrices, sizes)
    assert out.shape == (rows.shape[0], 7) and jnp.isfinite(out).all()
    close(out[:used], dense(rows, matrices, sizes)[:used], 1e-5)
    grads = jax.jit(jax.grad(loss(grouped_matmul), (0, 1)))(rows, matrices)
    expected = jax.grad(loss(dense), (0, 1))(rows, matrices)
    for grad, other in zip(grads, expected):
        close(grad, other, 2e-5)


@pytest.mark.parametrize("seed", range(8))
def test_product_equals_dense_for_random_sizes(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(67, rng.dirichlet(np.full(7, 0.4)))
    rows, matrices, sizes = operands(sizes.tolist())
    close(grouped_matmul(rows, matrices, sizes), dense(rows, matrices, sizes), 1e-5)


def test_gradient_of_rows_past_the_last_group_is_zero():
    rows, matrices, sizes = operands([3, 0, 2], past_end=4)

    def loss(rows, matrices):
        return jnp.sum(jnp.sin(grouped_matmul(rows, matrices, sizes)))

    d_rows, d_matrices = jax.grad(loss, (0, 1))(rows, matrices)
    np.testing.assert_array_equal(d_rows[5:], np.zeros((4, 5)))
    expected = jax.grad(loss, 1)(rows[:5], matrices)
    close(d_matrices, expected, 1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_default_platform_functions_equal_the_cpu_ones(sizes):
    rows, matrices, sizes = operands(sizes)
    ragged = grouped._ragged_matmul(rows, matrices, sizes)
    close(ragged, grouped._blocked_matmul(rows, matrices, sizes), 1e-5)
    left, right = normal((rows.shape[0], 7), 3), rows
    outer = grouped._ragged_outer(left, right, sizes)
    assert outer.shape == matrices.shape
    close(outer, grouped._blocked_outer(left, right, sizes), 2e-5)


@pytest.mark.parametrize("path", ["_blocked", "_ragged"])
def test_both_paths_leave_other_groups_rows_out(path):
    # A NaN in one group must not reach another one, in either direction.
    rows, matrices, sizes = operands([3, 2, 4], past_end=2)
    matmul = getattr(grouped, f"{path}_matmul")
    poisoned = rows.at[3:5].set(jnp.nan)
    out = matmul(poisoned, matrices, sizes)
    clean = matmul(rows, matrices, sizes)
    close(out[:3], clean[:3], 1e-6)
    close(out[5:9], clean[5:9], 1e-6)


@pytest.mark.parametrize("sizes", [[5, 0, 9, 2], [70, 3, 129, 0]])
def test_bfloat16_product_is_near_float32(sizes):
    rows, matrices, sizes = operands(sizes)
    rows, matrices = rows.astype(jnp.bfloat16), matrices.astype(jnp.bfloat16)
    out = grouped_matmul(rows, matrices, sizes)
    assert out.dtype == jnp.bfloat16
    expected = dense(rows.astype(jnp.float32), matrices.astype(jnp.float32), sizes)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, 2**-8, 1e-5)

    def loss(rows, matrices):
        product = grouped_matmul(rows, matrices, sizes)
        return jnp.sum(product.astype(jnp.float32))

    grads = jax.grad(loss, (0, 1))(rows, matrices)
    assert all(grad.dtype == jnp.bfloat16 for grad in grads)
    assert all(jnp.isfinite(grad.astype(jnp.float32)).all() for grad in grads)


def test_product_works_in_a_scan_over_layers():
    rows, _, sizes = operands([5, 0, 9, 2], out_size=5)
    stacked = normal((3, 4, 5, 5), 4)

    def run(product, rows):
        def layer(rows, matrices):
            return product(rows, matrices, sizes), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, rows, stacked)[0]))

    value, grad = jax.jit(jax.value_and_grad(lambda rows: run(grouped_matmul, rows)))(
        rows
    )
    expected, expected_grad = jax.value_and_grad(lambda rows: run(dense, rows))(rows)
    close(value, expected, 1e-4)
    assert np.linalg.norm(grad - expected_grad) < 1e-5 * np.linalg.norm(expected_grad)


def test_product_has_a_shape_without_values():
    rows, matrices, sizes = operands([5, 0, 9, 2])
    out = jax.eval_shape(grouped_matmul, rows, matrices, sizes)
    assert out.shape == (16, 7) and out.dtype == jnp.float32


def test_product_works_in_shard_map_over_rows():
    # Replicated matrices meet rows that differ from device to device: their gradient
    # is a sum over the devices.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(rng.multinomial(9, [0.3, 0.0, 0.6, 0.1], 8), jnp.int32)
    rows, matrices = normal((8, 9, 5)), normal((4, 7, 5), 1)
    split, whole = PartitionSpec("data"), PartitionSpec()

    def local(rows, matrices, sizes):
        return grouped_matmul(rows[0], matrices, sizes[0])[None]

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(split, whole, split), out_specs=split
    )

    def one_by_one(rows, matrices, sizes):
        return jnp.stack([dense(r, matrices, s) for r, s in zip(rows, sizes)])

    def gradients(product):
        return jax.grad(
            lambda rows, matrices: jnp.sum(jnp.sin(product(rows, matrices, sizes))),
            argnums=(0, 1),
        )

    close(
        jax.jit(mapped)(rows, matrices, sizes), one_by_one(rows, matrices, sizes), 1e-5
    )
    grads = jax.jit(gradients(mapped))(rows, matrices)
    for grad, expected in zip(grads, gradients(one_by_one)(rows, matrices)):
        close(grad, expected, 2e-5)
