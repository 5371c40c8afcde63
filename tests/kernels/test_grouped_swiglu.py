"""The experts' products against dense ones, on both of their paths."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv4_eqx.kernels.activation import clamped_swiglu
from dsv4_eqx.kernels.form import use_kernels
from dsv4_eqx.kernels.grouped_swiglu import grouped_swiglu
from tests.models import QUICKLY
from tests.tiers import tiers

DIM, HIDDEN, LIMIT = 5, 3, 1.0
SIZES = {
    "uneven": [5, 1, 9, 2],
    "empty ones": [0, 7, 0, 0, 3, 0],
    "all in the first": [13, 0, 0],
    "all in the last": [0, 0, 13],
    "one row": [0, 1, 0],
    "one group": [5],
    "no row of any": [0, 0, 0],
    "over both blocks": [150, 3, 129, 0, 64, 65],
}


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(sizes, past_end=0):
    """Rows, their weights, the groups' matrices and sizes."""
    num_rows, groups = sum(sizes) + past_end, len(sizes)
    return (
        normal((num_rows, DIM)),
        1 + normal((num_rows,), 1),
        normal((groups, 2 * HIDDEN, DIM), 2),
        normal((groups, DIM, HIDDEN), 3),
        jnp.asarray(sizes, jnp.int32),
    )


def ours(*given, first=0):
    return grouped_swiglu(*given, LIMIT, first=first)


def dense(rows, weights, gate_up, down, sizes):
    """Every row through every group's matrices, then the row's own."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    own = group[:, None] == jnp.arange(len(sizes))[None]
    hidden = clamped_swiglu(jnp.einsum("ri,ghi->rgh", rows, gate_up), LIMIT)
    hidden = (hidden * weights[:, None, None]).astype(rows.dtype)
    out = jnp.einsum("rgh,goh->rgo", hidden, down)
    return jnp.sum(jnp.where(own[..., None], out, 0), axis=1)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def with_gradients(product, floats, sizes, cotangent):
    """The product, and what `cotangent` gives for rows, weights and matrices."""
    out, pullback = jax.vjp(lambda *floats: product(*floats, sizes), *floats)
    return out, *pullback(cotangent)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name, past_end",
    tiers(
        itertools.product(SIZES, [0, 3]),
        in_ci=[*((name, 0) for name in SIZES), ("empty ones", 3), ("no row of any", 3)],
    ),
)
def test_product_and_gradients_equal_dense(name, past_end):
    *floats, sizes = operands(SIZES[name], past_end)
    used, num_rows = int(sizes.sum()), len(floats[0])
    # What lies past the last group is unspecified: nobody may use it.
    cotangent = normal((num_rows, DIM), 4).at[used:].set(0)
    out, *grads = with_gradients(ours, floats, sizes, cotangent)
    expected, *others = with_gradients(dense, floats, sizes, cotangent)
    assert out.shape == (num_rows, DIM) and jnp.isfinite(out).all()
    close(out[:used], expected[:used], 1e-5)
    for grad, other in zip(grads, others, strict=True):
        close(grad, other, 3e-5)


@pytest.mark.parametrize("seed", range(8))
def test_product_equals_dense_for_random_sizes(seed):
    rng = np.random.default_rng(seed)
    given = operands(rng.multinomial(300, rng.dirichlet(np.full(7, 0.4))).tolist())
    close(jax.jit(ours)(*given), dense(*given), 1e-5)


def test_rows_past_the_last_group_get_no_gradient():
    *floats, sizes = operands([3, 0, 2], past_end=4)
    cotangent = normal((9, DIM), 4)  # not even where someone asks for one
    _, d_rows, d_weights, *d_matrices = with_gradients(ours, floats, sizes, cotangent)
    assert (d_rows[5:] == 0).all() and (d_weights[5:] == 0).all()
    used = [floats[0][:5], floats[1][:5], *floats[2:]]
    expected = with_gradients(dense, used, sizes, cotangent[:5])
    for grad, other in zip(d_matrices, expected[3:], strict=True):
        close(grad, other, 1e-5)


@pytest.mark.parametrize(
    "form, name",
    tiers(
        itertools.product(
            ["gpu", "tpu", "hopper"], [name for name in SIZES if sum(SIZES[name])]
        ),
        in_ci=itertools.product(
            ["gpu", "tpu", "hopper"], ["empty ones", "over both blocks"]
        ),
    ),
)
def test_all_forms_give_the_same(form, name):
    *floats, sizes = operands(SIZES[name])
    cotangent = normal(floats[0].shape, 4)
    expected = with_gradients(ours, floats, sizes, cotangent)
    with use_kernels(form):
        found = with_gradients(ours, floats, sizes, cotangent)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 3e-5)


@pytest.mark.parametrize("form", ["cpu", "tpu"])
@pytest.mark.parametrize("first", [0, 2, 5])
def test_groups_have_their_matrices_among_others(form, first):
    rows, weights, *matrices, sizes = operands([5, 0, 9, 2])
    others = [normal((9, *x.shape[1:]), 7) for x in matrices]
    stacks = [x.at[first : first + 4].set(own) for x, own in zip(others, matrices)]
    with use_kernels(form):
        found, expected = (
            jax.jit(lambda *args: ours(*args[:-1], first=args[-1]))(
                rows, weights, *given, sizes, index
            )
            for given, index in ((stacks, first), (matrices, 0))
        )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_matrices_of_no_group_get_no_gradient(first):
    rows, weights, *matrices, sizes = operands([5, 0, 9, 2])
    padding = ((first, 5 - first), (0, 0), (0, 0))
    cotangent = normal(rows.shape, 4)

    def padded(rows, weights, gate_up, down, sizes):
        stacks = (jnp.pad(x, padding) for x in (gate_up, down))
        return ours(rows, weights, *stacks, sizes, first=first)

    floats = rows, weights, *matrices
    found = with_gradients(padded, floats, sizes, cotangent)
    for one, other in zip(found, with_gradients(ours, floats, sizes, cotangent)):
        close(one, other, 1e-6)

    floats = rows, weights, *(normal((9, *x.shape[1:]), 7) for x in matrices)
    among = functools.partial(ours, first=first)
    *_, d_gate_up, d_down = with_gradients(among, floats, sizes, cotangent)
    for gradient in (d_gate_up, d_down):
        filled = jnp.any(gradient != 0, axis=(1, 2))
        assert np.flatnonzero(filled).tolist() == [first, first + 2, first + 3]


@pytest.mark.parametrize("form", ["cpu", "tpu"])
def test_a_nan_stays_in_its_group(form):
    rows, *rest = operands([3, 2, 4], past_end=2)
    with use_kernels(form):
        forward = jax.jit(ours)
        clean = forward(rows, *rest)
        poisoned = forward(rows.at[3:5].set(jnp.nan), *rest)
    assert jnp.isnan(poisoned[3:5]).all()
    close(poisoned[:3], clean[:3], 1e-6)
    close(poisoned[5:9], clean[5:9], 1e-6)


@pytest.mark.parametrize("sizes", [[5, 0, 9, 2], [70, 3, 129, 0]])
def test_bfloat16_is_near_float32(sizes):
    *wide, sizes = operands(sizes)
    floats = [x.astype(jnp.bfloat16) for x in wide]
    floats[1] = wide[1]  # the routing weights stay float32
    cotangent = normal(floats[0].shape, 4).astype(jnp.bfloat16)
    out, *grads = with_gradients(ours, floats, sizes, cotangent)
    wide = [x.astype(jnp.float32) for x in floats]
    expected, *others = with_gradients(dense, wide, sizes, cotangent.astype("f4"))
    assert out.dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for one, other in zip((out, *grads), (expected, *others), strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other)
        assert error < 0.02 * jnp.linalg.norm(other)


def test_product_works_in_a_scan_over_layers():
    rows, weights, gate_up, down, sizes = operands([5, 0, 9, 2])

    def run(product, rows):
        def layer(rows, scale):
            return product(rows, weights, scale * gate_up, down, sizes), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, rows, jnp.arange(1.0, 4.0))[0]))

    both = [
        jax.jit(jax.value_and_grad(functools.partial(run, product)))(rows)
        for product in (ours, dense)
    ]
    close(both[0][0], both[1][0], 1e-4)
    error = jnp.linalg.norm(both[0][1] - both[1][1])
    assert error < 1e-4 * jnp.linalg.norm(both[1][1])


def test_product_has_a_shape_without_values():
    out = jax.eval_shape(ours, *operands([5, 0, 9, 2]))
    assert out.shape == (16, DIM) and out.dtype == jnp.float32


def test_product_works_in_shard_map_over_rows():
    # Replicated matrices meet rows that differ from device to device: their gradient
    # is a sum over the devices.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(rng.multinomial(9, [0.3, 0.0, 0.6, 0.1], 8), jnp.int32)
    rows, weights = normal((8, 9, DIM)), normal((8, 9), 1)
    matrices = operands([1, 1, 1, 1])[2:4]
    split, whole = PartitionSpec("data"), PartitionSpec()

    def local(rows, weights, gate_up, down, sizes):
        return ours(rows[0], weights[0], gate_up, down, sizes[0])[None]

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, whole, whole, split),
        out_specs=split,
    )

    def one_by_one(rows, weights, gate_up, down, sizes):
        each = zip(rows, weights, sizes)
        return jnp.stack([dense(r, w, gate_up, down, s) for r, w, s in each])

    floats, cotangent = (rows, weights, *matrices), normal(rows.shape, 4)
    found = with_gradients(mapped, floats, sizes, cotangent)
    expected = with_gradients(one_by_one, floats, sizes, cotangent)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 3e-5)
