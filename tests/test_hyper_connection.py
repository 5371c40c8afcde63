"""Hyper-connections against transformers, and the Sinkhorn iterations' limits."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx.hyper_connection import StreamMixing
from dsv4_eqx.kernels.form import use_kernels
from dsv4_eqx.kernels.mix import mix, sinkhorn
from dsv4_eqx.model.parts import make_hyper_connection, make_hyper_head
from tests.models import quick_jit, relative
from tests.reference import reference_config
from tests.tiny import tiny_config

CONFIG = tiny_config(hc_mult=3, hidden_size=15)
SHAPE = (2, 5, 3, 15)  # batch, seq, streams, dim


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def connections(seed=0):
    """Ours and transformers', with the same weights; the mixing is not symmetric."""
    theirs = hf.DeepseekV4HyperConnection(reference_config(CONFIG))
    ours = make_hyper_connection(CONFIG, key=jax.random.key(0))
    weight = normal(ours.weight.shape, seed, 0.4)
    base, scale = normal(ours.base.shape, seed + 1), 1 + normal(3, seed + 2, 0.3)
    with torch.no_grad():
        theirs.fn.copy_(torch.tensor(weight.reshape(theirs.fn.shape)))
        theirs.base.copy_(torch.tensor(base))
        theirs.scale.copy_(torch.tensor(scale))
    arrays = tuple(jnp.asarray(x) for x in (weight, base, scale))
    return eqx.tree_at(lambda m: (m.weight, m.base, m.scale), ours, arrays), theirs


def heads(seed=0):
    """Our head and transformers', with the same weights."""
    theirs = hf.DeepseekV4HyperHead(reference_config(CONFIG))
    ours = make_hyper_head(CONFIG, key=jax.random.key(0))
    weight = normal(ours.weight.shape, seed, 0.4)
    base, scale = normal(ours.base.shape, seed + 1), 1 + normal(1, seed + 2, 0.3)
    with torch.no_grad():
        theirs.hc_fn.copy_(torch.tensor(weight.reshape(theirs.hc_fn.shape)))
        theirs.hc_base.copy_(torch.tensor(base))
        theirs.hc_scale.copy_(torch.tensor(scale))
    arrays = tuple(jnp.asarray(x) for x in (weight, base, scale))
    return eqx.tree_at(lambda m: (m.weight, m.base, m.scale), ours, arrays), theirs


def read_and_write(connection, streams, output):
    """The sublayer's input, and the streams after a sublayer that gives `output`."""
    read, mixing = connection.read(streams)
    return read, connection.write(streams, output, mixing)


run_ours = quick_jit(read_and_write)


def run_theirs(connection, streams, output):
    """The same, written as in `DeepseekV4DecoderLayer.forward`."""
    post, comb, read = connection(streams)
    written = post.unsqueeze(-1) * output.unsqueeze(-2)
    return read, written + torch.matmul(comb.transpose(-1, -2), streams)


@functools.partial(jax.jit, static_argnums=1)
def run_sinkhorn(logits, iterations=20):
    return sinkhorn(logits, iterations=iterations, eps=1e-6)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_read_and_write_equal_transformers(seed, scale):
    ours, theirs = connections(10 * seed)
    streams, output = normal(SHAPE, 7, scale), normal((2, 5, 15), 8)
    read, written = run_ours(ours, jnp.asarray(streams), jnp.asarray(output))
    with torch.no_grad():
        their = run_theirs(theirs, torch.tensor(streams), torch.tensor(output))
    np.testing.assert_allclose(read, their[0], 1e-5, 1e-5 * scale)
    np.testing.assert_allclose(written, their[1], 1e-5, 1e-5 * max(scale, 1))


def test_a_transposed_combine_would_be_seen():
    ours, theirs = connections()
    streams, output = normal(SHAPE, 7), normal((2, 5, 15), 8)
    with torch.no_grad():
        _, their = run_theirs(theirs, torch.tensor(streams), torch.tensor(output))
    _, mixing = ours.read(jnp.asarray(streams))
    wrong = StreamMixing(mixing.post, jnp.swapaxes(mixing.combine, -1, -2))
    written = ours.write(jnp.asarray(streams), jnp.asarray(output), wrong)
    assert np.abs(np.asarray(written) - their.numpy()).max() > 0.1


def test_gradients_equal_transformers():
    ours, theirs = connections()
    streams, output = normal(SHAPE, 7), normal((2, 5, 15), 8)
    cotangents = normal((2, 5, 15), 9), normal(SHAPE, 10)

    def loss(connection, streams, output):
        parts = read_and_write(connection, streams, output)
        return sum(jnp.sum(x * c) for x, c in zip(parts, cotangents))

    grads = quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(ours, streams, output)
    tensors = [torch.tensor(x, requires_grad=True) for x in (streams, output)]
    parts = run_theirs(theirs, *tensors)
    sum((x * torch.tensor(c)).sum() for x, c in zip(parts, cotangents)).backward()
    assert relative(grads[0].weight, theirs.fn.grad) < 5e-4
    assert relative(grads[0].base, theirs.base.grad) < 5e-4
    assert relative(grads[0].scale, theirs.scale.grad) < 5e-4
    assert relative(grads[1], tensors[0].grad) < 5e-4
    assert relative(grads[2], tensors[1].grad) < 5e-4


def test_hyper_head_equals_transformers():
    ours, theirs = heads()
    streams = normal(SHAPE, 7)
    close(ours(jnp.asarray(streams)), theirs(torch.tensor(streams)).detach(), 1e-5)


def test_hyper_head_gradients_equal_transformers():
    ours, theirs = heads()
    streams, cotangent = normal(SHAPE, 7), normal((2, 5, 15), 8)
    grads = jax.grad(lambda m, x: jnp.sum(m(x) * cotangent), argnums=(0, 1))(
        ours, jnp.asarray(streams)
    )
    tensor = torch.tensor(streams, requires_grad=True)
    (theirs(tensor) * torch.tensor(cotangent)).sum().backward()
    assert relative(grads[0].weight, theirs.hc_fn.grad) < 5e-4
    assert relative(grads[0].base, theirs.hc_base.grad) < 5e-4
    assert relative(grads[0].scale, theirs.hc_scale.grad) < 5e-4
    assert relative(grads[1], tensor.grad) < 5e-4


@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 5)])
def test_any_leading_dimensions(leading):
    ours, head = connections()[0], heads()[0]
    streams = jnp.asarray(normal((*leading, 3, 15), 7))
    output = jnp.asarray(normal((*leading, 15), 8))
    flat = run_ours(ours, streams.reshape(-1, 3, 15), output.reshape(-1, 15))
    for part, expected in zip(run_ours(ours, streams, output), flat):
        assert part.shape[: len(leading)] == leading
        close(part.reshape(expected.shape), expected, 1e-6)
    run_head = eqx.filter_jit(head)
    flat = run_head(streams.reshape(-1, 3, 15))
    close(run_head(streams).reshape(-1, 15), flat, 1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e3])
def test_sinkhorn_columns_sum_to_one(scale):
    logits = jnp.asarray(normal((4, 4, 501), 0, scale))
    matrix = run_sinkhorn(logits)
    assert (matrix >= 0).all()
    assert jnp.abs(matrix.sum(axis=0) - 1).max() <= 2e-6


def test_sinkhorn_rows_approach_one():
    # How fast depends on the logits: with wide ones 20 iterations are not enough.
    logits = jnp.asarray(normal((4, 4, 501)))
    errors = [
        float(jnp.abs(run_sinkhorn(logits, n).sum(axis=1) - 1).max())
        for n in (1, 2, 5, 20)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("form", ["cpu", "gpu", "reference"])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_equals_plain_iterations(iterations, form):
    logits = normal((3, 3, 7)).astype(np.float64)
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) + 1e-6
    for i in range(iterations):
        if i > 0:
            exact /= exact.sum(axis=1, keepdims=True) + 1e-6
        exact /= exact.sum(axis=0, keepdims=True) + 1e-6
    with use_kernels(form):
        matrix = run_sinkhorn(jnp.asarray(logits, "f4"), iterations)
    close(matrix, exact, 2e-6)


def test_sinkhorn_gradient_is_finite_at_huge_logits():
    signs = np.random.default_rng(0).choice([-1e3, 0.0, 1e3], (4, 4, 300))
    rows = np.zeros((4, 4, 4))  # one huge row, one huge column, equal, one element
    rows[1, :, 0] = rows[:, 2, 1] = 1e3
    rows[..., 2], rows[0, 3, 3] = -1e3, -1e3
    logits = jnp.asarray(np.concatenate([signs, rows], axis=-1), jnp.float32)
    cotangent = normal(logits.shape)
    value, pullback = jax.vjp(run_sinkhorn, logits)
    (gradient,) = pullback(jnp.asarray(cotangent))
    assert jnp.isfinite(value).all() and jnp.isfinite(gradient).all()
    assert jnp.abs(value.sum(axis=0) - 1).max() <= 2e-6


def test_read_and_write_are_finite_at_huge_logits():
    ours, _ = connections()
    ours = eqx.tree_at(lambda m: m.scale, ours, jnp.full(3, 1e3))
    streams, output = jnp.asarray(normal(SHAPE)), jnp.asarray(normal((2, 5, 15)))

    def loss(connection, streams):
        return sum(jnp.sum(x) for x in read_and_write(connection, streams, output))

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, grads = run(ours, streams)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 5, 7), (5, 1, 3), (1, 3, 1)])
def test_mix_equals_the_plain_einsum_and_its_gradient(dtype, sizes):
    sources, targets, dim = sizes
    weights = jnp.asarray(normal((2, 4, sources, targets)))
    streams = jnp.asarray(normal((2, 4, sources, dim), 1)).astype(dtype)
    cotangent = jnp.asarray(normal((2, 4, targets, dim), 2))

    def plain(weights, streams):
        wide = streams.astype(jnp.float32)
        return jnp.einsum("...jk,...jd->...kd", weights, wide, precision="highest")

    out, pullback = jax.vjp(mix, weights, streams)
    expected, plain_pullback = jax.vjp(plain, weights, streams)
    assert out.dtype == jnp.float32
    close(out, expected, 1e-5)
    for grad, other in zip(pullback(cotangent), plain_pullback(cotangent)):
        assert grad.dtype == other.dtype
        close(grad.astype(jnp.float32), other.astype(jnp.float32), 1e-5)


def test_bfloat16_streams_use_float32_arithmetic():
    ours, head = connections()[0], heads()[0]
    streams = jnp.asarray(normal(SHAPE)).astype(jnp.bfloat16)
    output = jnp.asarray(normal((2, 5, 15), 1)).astype(jnp.bfloat16)
    wide_streams, wide_output = (x.astype(jnp.float32) for x in (streams, output))
    _, mixing = ours.read(streams)
    assert mixing.post.dtype == mixing.combine.dtype == jnp.float32
    parts = (*run_ours(ours, streams, output), head(streams))
    wide = (*run_ours(ours, wide_streams, wide_output), head(wide_streams))
    for part, expected in zip(parts, wide):
        assert part.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
        assert (part == expected.astype(jnp.bfloat16)).all()
    for leaf in jax.tree.leaves((ours, head)):
        assert leaf.dtype == jnp.float32


def test_mixing_does_not_look_at_other_tokens():
    ours, _ = connections()
    streams, output = jnp.asarray(normal(SHAPE)), jnp.asarray(normal((2, 5, 15)))
    changed = streams.at[1, 3].multiply(2.0)
    for a, b in zip(run_ours(ours, streams, output), run_ours(ours, changed, output)):
        same = np.asarray(a == b).reshape(2, 5, -1).all(axis=-1)
        np.testing.assert_array_equal(same, np.arange(10).reshape(2, 5) != 8)


@pytest.mark.parametrize("shape", [(2, 3, 14), (2, 2, 15), (2, 15, 3), (3, 1)])
def test_wrong_streams_are_refused(shape):
    match = r"\(streams, dim\) = \(3, 15\)"
    with pytest.raises(ValueError, match=f"HyperConnection .*{match}"):
        connections()[0].read(jnp.ones(shape))
    with pytest.raises(ValueError, match=f"HyperHead .*{match}"):
        heads()[0](jnp.ones(shape))


REFUSED = (ValueError, jaxtyping.TypeCheckError)  # the latter under the type checker


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_streams_and_outputs_of_other_dtypes_are_refused(dtype):
    ours, streams = connections()[0], jnp.asarray(normal(SHAPE))
    bad = jnp.ones(SHAPE, dtype)
    _, mixing = ours.read(streams)
    for call in (
        lambda: ours.read(bad),
        lambda: heads()[0](bad),
        lambda: ours.write(bad, bad[:, :, 0], mixing),
        lambda: ours.write(streams, bad[:, :, 0], mixing),
    ):
        with pytest.raises(REFUSED, match="it needs a floating|Array"):
            call()


def test_what_is_written_must_fit_the_streams():
    # Each of these would broadcast.
    ours, streams = connections()[0], jnp.asarray(normal(SHAPE))
    output, (_, mixing) = jnp.ones((2, 5, 15)), ours.read(streams)
    _, one = ours.read(streams[:, :1])
    for args in [
        (streams, output[:, :1], mixing),
        (streams, output[..., :1], mixing),
        (streams[:, :1], output, mixing),
        (streams, output, one),
        (streams, output, mixing._replace(post=one.post)),
        (streams, output, mixing._replace(combine=mixing.combine[..., :1])),
    ]:
        with pytest.raises(REFUSED, match="leading dimensions must be the same|Array"):
            ours.write(*args)


@pytest.mark.parametrize("iterations", [-1, True])
def test_sinkhorn_refuses_a_negative_number_of_iterations(iterations):
    with pytest.raises(ValueError, match=rf"iterations={iterations}\): must be an int"):
        sinkhorn(jnp.ones((3, 3)), iterations=iterations, eps=1e-6)


def test_initial_connection_is_near_the_mean_of_the_streams():
    # Small weights, zero base: the mixing starts out close to uniform.
    ours = make_hyper_connection(CONFIG, key=jax.random.key(3))
    _, mixing = ours.read(jnp.asarray(normal(SHAPE)))
    np.testing.assert_allclose(mixing.combine, np.full((2, 5, 3, 3), 1 / 3), atol=0.2)
    np.testing.assert_allclose(mixing.post, np.ones((2, 5, 3)), atol=0.5)
