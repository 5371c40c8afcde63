"""RMSNorm and UnweightedRMSNorm against transformers, and their float32 islands."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, PartitionSpec
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx import RMSNorm, UnweightedRMSNorm
from dsv4_eqx.numerics.precision import at_least_float32, wide_einsum

SHAPES = [(7,), (3, 5), (2, 3, 5, 7), (1, 1), (4, 129), (0, 3)]


def weighted(dim, seed=0, eps=1e-6):
    """Our norm and transformers', with the same weight."""
    weight = 1 + 0.3 * np.random.default_rng(seed).standard_normal(dim)
    weight = weight.astype(np.float32)
    theirs = hf.DeepseekV4RMSNorm(dim, eps=eps)
    theirs.weight.data = torch.tensor(weight)
    ours = RMSNorm(dim, eps=eps)
    return eqx.tree_at(lambda m: m.weight, ours, jnp.asarray(weight)), theirs


def normal(shape, seed=1, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_transformers(shape, scale):
    ours, theirs = weighted(shape[-1])
    x = normal(shape, scale=scale)
    close(ours(jnp.asarray(x)), theirs(torch.tensor(x)).detach(), 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_unweighted_norm_equals_transformers(shape, eps):
    x = normal(shape)
    theirs = hf.DeepseekV4UnweightedRMSNorm(eps=eps)(torch.tensor(x))
    close(UnweightedRMSNorm(eps=eps)(jnp.asarray(x)), theirs, 1e-6)


def test_rms_norm_gradients_equal_transformers():
    ours, theirs = weighted(7)
    x, cotangent = normal((3, 5, 7)), normal((3, 5, 7), seed=2)
    tensor = torch.tensor(x, requires_grad=True)
    (theirs(tensor) * torch.tensor(cotangent)).sum().backward()
    d_norm, d_x = jax.grad(lambda m, x: jnp.sum(m(x) * cotangent), argnums=(0, 1))(
        ours, jnp.asarray(x)
    )
    close(d_x, tensor.grad, 1e-5)
    close(d_norm.weight, theirs.weight.grad, 1e-5)


def test_unweighted_norm_gradient_equals_transformers():
    x, cotangent = normal((3, 5, 7)), normal((3, 5, 7), seed=2)
    tensor = torch.tensor(x, requires_grad=True)
    theirs = hf.DeepseekV4UnweightedRMSNorm()
    (theirs(tensor) * torch.tensor(cotangent)).sum().backward()
    d_x = jax.grad(lambda x: jnp.sum(UnweightedRMSNorm()(x) * cotangent))(
        jnp.asarray(x)
    )
    close(d_x, tensor.grad, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norms_round_low_precision_once(dtype):
    ours, _ = weighted(7)
    x = jnp.asarray(normal((50, 7))).astype(dtype)
    wide = x.astype(jnp.float32)
    assert ours.weight.dtype == jnp.float32
    for norm in (ours, UnweightedRMSNorm()):
        out = norm(x)
        assert out.dtype == dtype
        assert (out == norm(wide).astype(dtype)).all()


def test_norm_statistics_do_not_overflow_in_float16():
    # 300**2 is infinite in float16.
    out = UnweightedRMSNorm()(jnp.full((3, 5), 300, jnp.float16))
    assert (out == 1).all()


def test_norms_of_zeros_have_finite_gradients():
    for norm in (RMSNorm(5), UnweightedRMSNorm()):
        x = jnp.zeros((3, 5))
        np.testing.assert_array_equal(norm(x), x)
        assert jnp.isfinite(jax.grad(lambda x, norm=norm: norm(x).sum())(x)).all()


def test_unweighted_norm_has_no_leaves():
    assert jax.tree.leaves(UnweightedRMSNorm()) == []
    (leaf,) = jax.tree.leaves(RMSNorm(5))
    assert leaf.shape == (5,) and leaf.dtype == jnp.float32


def test_norms_work_under_transformations():
    norm, _ = weighted(5)
    x = jnp.asarray(normal((8, 3, 5)))
    for module in (norm, UnweightedRMSNorm()):

        def f(x, module=module):  # jax's own transformations hash what they are given
            return module(x)

        expected = f(x)
        close(jax.jit(f)(x), expected, 1e-6)
        close(jax.vmap(f)(x), expected, 1e-6)
        _, scanned = jax.lax.scan(lambda c, row, f=f: (c, f(row)), None, x)
        close(scanned, expected, 1e-6)
        out = jax.eval_shape(f, x)
        assert out.shape == x.shape and out.dtype == x.dtype


def test_norms_work_in_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    norm, _ = weighted(5)
    x = jnp.asarray(normal((8, 3, 5)))
    spec = PartitionSpec("data")

    def mapped(norm, x):
        return jax.shard_map(
            lambda m, x: m(x),
            mesh=mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=spec,
        )(norm, x)

    def loss(f):
        return jax.grad(lambda m, x: jnp.sum(jnp.sin(f(m, x))), argnums=(0, 1))

    close(jax.jit(mapped)(norm, x), norm(x), 1e-6)
    close(jax.jit(mapped)(UnweightedRMSNorm(), x), UnweightedRMSNorm()(x), 1e-6)
    d_norm, d_x = jax.jit(loss(mapped))(norm, x)
    expected_norm, expected_x = loss(lambda m, x: m(x))(norm, x)
    close(d_x, expected_x, 1e-5)
    close(d_norm.weight, expected_norm.weight, 1e-5)


@pytest.mark.parametrize("make", [lambda eps: RMSNorm(3, eps=eps), None])
@pytest.mark.parametrize("eps", [-1e-6, math.nan, math.inf])
def test_norms_refuse_a_bad_eps(make, eps):
    make = make or (lambda eps: UnweightedRMSNorm(eps=eps))
    with pytest.raises(ValueError, match="eps=.*must be a number that .*, at least 0"):
        make(eps)


@pytest.mark.parametrize("dim", [0, -3])
def test_rms_norm_refuses_a_size_that_is_not_positive(dim):
    with pytest.raises(ValueError, match=rf"RMSNorm\(dim={dim}\).*at least 1"):
        RMSNorm(dim)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("dim", [3.0, True, "3", None, np.bool_(True), np.float32(3)])
def test_rms_norm_refuses_a_size_that_is_no_integer(dim):
    with pytest.raises(ValueError, match=r"RMSNorm\(dim=.*\): must be an integer"):
        RMSNorm(dim)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("eps", ["a", True, None, 1j])
def test_norms_refuse_an_eps_that_is_no_number(eps):
    match = rf"RMSNorm\(eps={re.escape(repr(eps))}\): must be a number"
    for make in (lambda: RMSNorm(3, eps=eps), lambda: UnweightedRMSNorm(eps=eps)):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("dim", [np.int64(3), np.uint8(3), np.array(3), jnp.array(3)])
def test_norms_take_the_numbers_of_numpy_and_jax(dim):
    for eps in (np.float32(0.5), np.array(0.5), jnp.array(0.5, jnp.bfloat16)):
        norm = RMSNorm(dim, eps=eps)
        assert norm.weight.shape == (3,) and norm.eps == 0.5
        assert type(norm.eps) is float


@pytest.mark.parametrize("shape", [(5,), (3, 1), (7, 6)])
def test_rms_norm_refuses_another_last_dimension(shape):
    # (3, 1) would broadcast against the weight.
    with pytest.raises(ValueError, match=r"RMSNorm\(dim=7\).*must be 7"):
        RMSNorm(7)(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_unweighted_norm_refuses_an_empty_last_dimension(shape):
    with pytest.raises(ValueError, match="last dimension of at least 1"):
        UnweightedRMSNorm()(jnp.ones(shape))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("norm", [RMSNorm(3), UnweightedRMSNorm()])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_norms_refuse_what_is_not_floating(norm, dtype):
    match = f"Norm was called with x of dtype {dtype}: it needs a floating-point"
    with pytest.raises(ValueError, match=match):
        norm(jnp.ones((2, 3), dtype))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("norm", [RMSNorm(3), UnweightedRMSNorm()])
def test_norms_refuse_scalars(norm):
    with pytest.raises(ValueError, match=r"x of shape \(\): "):
        norm(jnp.ones(()))


@pytest.mark.parametrize(
    "dtype, wide",
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")],
)
def test_precision_is_at_least_float32(dtype, wide):
    x = jnp.asarray(normal((3, 5))).astype(dtype)
    assert at_least_float32(x).dtype == wide
    product = wide_einsum("ab,cb->ac", x, x)
    assert product.dtype == wide
    exact = np.asarray(x, np.float64)
    close(np.asarray(product), exact @ exact.T, 1e-6)


def test_precision_leaves_float64_alone():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)))
        assert at_least_float32(x).dtype == jnp.float64
        exact = np.asarray(x) @ np.asarray(x).T
        close(np.asarray(wide_einsum("ab,cb->ac", x, x)), exact, 1e-14)
        normed = RMSNorm(5, eps=0.0)(x)
        assert normed.dtype == jnp.float64
        close(np.mean(np.square(normed), axis=-1), np.ones(3), 1e-14)
