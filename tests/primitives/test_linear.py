"""GroupedLinear against transformers."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, PartitionSpec
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx import GroupedLinear

GROUPS, IN, OUT = 3, 5, 7  # OUT is of each group


def pair(groups=GROUPS, in_size=IN, out_size=OUT, seed=0):
    """Our map and transformers', with the same weight."""
    ours = GroupedLinear(
        in_size, groups * out_size, groups, key=jax.random.key(seed), std=1.0
    )
    theirs = hf.DeepseekV4GroupedLinear(in_size, groups * out_size, groups)
    flat = np.array(ours.weight).reshape(groups * out_size, in_size)
    theirs.weight.data = torch.tensor(flat)
    return ours, theirs


def normal(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("leading", [(1,), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 3, 5), (7, 1, 3), (5, 7, 1)])
def test_grouped_linear_equals_transformers(leading, sizes):
    ours, theirs = pair(*sizes)
    x = normal((*leading, sizes[0], sizes[1]))
    out = ours(jnp.asarray(x))
    assert out.shape == (*leading, sizes[0], sizes[2])
    close(out, theirs(torch.tensor(x)).detach(), 1e-6)


def test_grouped_linear_takes_no_leading_dimensions():
    ours, theirs = pair()
    x = normal((GROUPS, IN))
    close(ours(jnp.asarray(x)), theirs(torch.tensor(x[None])).detach()[0], 1e-6)


def test_grouped_linear_gradients_equal_transformers():
    ours, theirs = pair()
    x, cotangent = normal((2, 4, GROUPS, IN)), normal((2, 4, GROUPS, OUT), seed=2)
    tensor = torch.tensor(x, requires_grad=True)
    (theirs(tensor) * torch.tensor(cotangent)).sum().backward()
    d_map, d_x = jax.grad(lambda m, x: jnp.sum(m(x) * cotangent), argnums=(0, 1))(
        ours, jnp.asarray(x)
    )
    close(d_x, tensor.grad, 1e-5)
    close(d_map.weight, theirs.weight.grad.reshape(d_map.weight.shape), 1e-5)


def test_groups_do_not_mix():
    ours, _ = pair()
    x = jnp.asarray(normal((2, GROUPS, IN)))
    changed = ours(x.at[:, 1].add(1.0)) != ours(x)
    np.testing.assert_array_equal(changed.any(axis=(0, 2)), [False, True, False])


def test_grouped_linear_in_bfloat16_rounds_once():
    weight, x = pair()[0].weight, jnp.asarray(normal((2, 9, GROUPS, IN)))
    low = GroupedLinear(
        IN, GROUPS * OUT, GROUPS, key=jax.random.key(0), dtype=jnp.bfloat16
    )
    low = eqx.tree_at(lambda m: m.weight, low, weight.astype(jnp.bfloat16))
    out = low(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = np.einsum(
        "...gi,goi->...go",
        np.asarray(x.astype(jnp.bfloat16), np.float64),
        np.asarray(low.weight, np.float64),
    )
    # Half a unit in the last place of bfloat16, and float32's own error near zero.
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, 2**-8, 1e-6)


def test_initial_weight_has_the_given_deviation_and_dtype():
    weight = GroupedLinear(
        65, 7 * 63, 7, key=jax.random.key(3), std=0.5, dtype=jnp.bfloat16
    ).weight
    assert weight.shape == (7, 63, 65) and weight.dtype == jnp.bfloat16
    values = np.asarray(weight, np.float64)
    assert abs(values.std() - 0.5) < 0.01 and abs(values.mean()) < 0.01


def test_grouped_linear_works_under_transformations():
    module, _ = pair()
    x = jnp.asarray(normal((8, 2, GROUPS, IN)))

    def f(x):  # jax's own transformations hash what they are given
        return module(x)

    expected = f(x)
    close(jax.jit(f)(x), expected, 1e-6)
    close(jax.vmap(f)(x), expected, 1e-6)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, f(row)), None, x)
    close(scanned, expected, 1e-6)
    assert jax.eval_shape(f, x).shape == expected.shape
    abstract = eqx.filter_eval_shape(
        lambda key: GroupedLinear(IN, GROUPS * OUT, GROUPS, key=key), jax.random.key(0)
    )
    assert abstract.weight.shape == (GROUPS, OUT, IN)


@pytest.mark.parametrize("split", ["batch", "groups"])
def test_grouped_linear_works_in_shard_map(split):
    # Over its groups it runs on local weights and needs no collective.
    mesh = jax.make_mesh((8,), ("axis",), axis_types=(AxisType.Auto,))
    f, _ = pair(groups=8)
    x, spec = jnp.asarray(normal((8, 3, 8, IN))), PartitionSpec("axis")
    specs = (PartitionSpec(), spec)
    if split == "groups":
        specs = (spec, PartitionSpec(None, None, "axis"))

    def mapped(f, x):
        def local(f, x):
            return f(x)

        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=True
        )(f, x)

    def gradients(call):
        return jax.grad(lambda f, x: jnp.sum(jnp.sin(call(f, x))), argnums=(0, 1))

    close(jax.jit(mapped)(f, x), f(x), 1e-6)
    d_map, d_x = jax.jit(gradients(mapped))(f, x)
    expected_map, expected_x = gradients(lambda f, x: f(x))(f, x)
    close(d_map.weight, expected_map.weight, 1e-5)
    close(d_x, expected_x, 1e-5)


@pytest.mark.parametrize(
    "sizes, name",
    [
        ((0, 6, 3), "in_features_per_group=0"),
        ((5, 0, 3), "out_features=0"),
        ((5, 6, 0), "n_groups=0"),
        ((-5, 6, 3), "in_features_per_group=-5"),
        ((5, 6, -3), "n_groups=-3"),
    ],
)
def test_grouped_linear_refuses_sizes_that_are_not_positive(sizes, name):
    with pytest.raises(ValueError, match=f"{name}.*at least 1"):
        GroupedLinear(*sizes, key=jax.random.key(0))


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf])
def test_grouped_linear_refuses_a_bad_deviation(std):
    with pytest.raises(ValueError, match=rf"std={std}\): must be a number that"):
        GroupedLinear(5, 6, 3, key=jax.random.key(0), std=std)


@pytest.mark.parametrize("dtype", [jnp.complex64, "int32", np.bool_, "float8_e4m3fn"])
def test_grouped_linear_refuses_a_dtype_that_is_none_of_weights(dtype):
    with pytest.raises(ValueError, match=r"GroupedLinear\(dtype=.*one of float16, bf"):
        GroupedLinear(5, 6, 3, key=jax.random.key(0), dtype=dtype)


def test_grouped_linear_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="n_groups=3.*must divide out_features"):
        GroupedLinear(5, 7, 3, key=jax.random.key(0))


@pytest.mark.parametrize(
    "shape", [(2, IN, GROUPS), (2, GROUPS, 1), (2, 1, IN), (2, GROUPS, IN, 1)]
)
def test_grouped_linear_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"\(groups, in_per_group\) = \(3, 5\)"):
        pair()[0](jnp.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_grouped_linear_refuses_another_dtype(dtype):
    name = jnp.dtype(dtype).name
    with pytest.raises(ValueError, match=f"x of dtype {name}.*float32: cast one"):
        pair()[0](jnp.ones((2, GROUPS, IN), dtype))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "x, match",
    [
        (jnp.ones((3, 5), jnp.int32), "x of dtype int32"),
        (jnp.ones(5), r"x of shape \(5,\): "),
        (jnp.ones(()), r"x of shape \(\): "),
    ],
)
def test_grouped_linear_refuses_integers_and_vectors(x, match):
    with pytest.raises(ValueError, match=match):
        GroupedLinear(5, 21, 3, key=jax.random.key(0))(x)


@pytest.mark.usefixtures("without_shape_checks")
def test_grouped_linear_takes_the_numbers_of_numpy():
    sizes = (np.int64(5), np.uint8(21), np.array(3))
    ours = GroupedLinear(*sizes, key=jax.random.key(0), std=np.float32(0.5))
    expected = GroupedLinear(5, 21, 3, key=jax.random.key(0), std=0.5)
    np.testing.assert_array_equal(ours.weight, expected.weight)
