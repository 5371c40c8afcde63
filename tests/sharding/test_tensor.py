"""Embedding and loss over a split vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv4_eqx import make_mesh
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding.tensor import cross_entropy_split_vocab, embed_split_vocab

BATCH, SEQ, VOCAB, DIM = 4, 7, 24, 5
MESHES = [dict(tensor=8), dict(data=4, tensor=2), dict(data=2, expert=2, tensor=2)]


def normal(shape, seed, scale=1.0):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32))


def ids():
    """Every id at least once."""
    values = np.arange(BATCH * SEQ, dtype=np.int32) % VOCAB
    return jnp.asarray(np.random.default_rng(0).permutation(values).reshape(BATCH, SEQ))


def batch_axes(mesh):
    return tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1) or None


def with_gradient(function, array, token_ids, cotangent):
    """The output, and the gradient of its product with `cotangent`."""
    out, pull_back = jax.vjp(lambda array: function(array, token_ids), array)
    return out, *pull_back(cotangent)


def compile_split(function, mesh, specs, out_spec, *args):
    split = functools.partial(function, axis="tensor")
    mapped = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=out_spec)
    step = jax.jit(functools.partial(with_gradient, mapped))
    return step.lower(*args).compile()


def sent(compiled, mesh):
    return {(item.kind, item.axes) for item in collectives(compiled, mesh)}


@pytest.mark.parametrize("sizes", MESHES)
def test_embedding_over_a_split_vocabulary_keeps_every_bit(sizes):
    mesh = make_mesh(**sizes)
    embedding, cotangent = normal((VOCAB, DIM), 1), normal((BATCH, SEQ, DIM), 2)
    rows = P(batch_axes(mesh))
    specs = (P("tensor"), rows)
    args = (embedding, ids(), cotangent)
    compiled = compile_split(embed_split_vocab, mesh, specs, rows, *args)
    out, gradient = compiled(*args)
    expected_out, expected_gradient = with_gradient(lambda x, i: x[i], *args)
    np.testing.assert_array_equal(expected_out, np.asarray(embedding)[ids()])
    np.testing.assert_array_equal(out, expected_out)
    np.testing.assert_allclose(gradient, expected_gradient, 1e-6, 1e-6)
    by_hand = np.zeros((VOCAB, DIM))
    np.add.at(by_hand, np.asarray(ids()), np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(gradient, by_hand, 1e-6, 1e-6)
    assert ("all-reduce", ("tensor",)) in sent(compiled, mesh)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("sizes", MESHES)
def test_loss_over_a_split_vocabulary_equals_the_plain_one(sizes, scale):
    mesh = make_mesh(**sizes)
    logits, cotangent = normal((BATCH, SEQ, VOCAB), 1, scale), normal((BATCH, SEQ), 2)
    rows = P(batch_axes(mesh))
    specs = (P(batch_axes(mesh), None, "tensor"), rows)
    args = (logits, ids(), cotangent)
    compiled = compile_split(cross_entropy_split_vocab, mesh, specs, rows, *args)
    out, gradient = compiled(*args)
    plain = functools.partial(cross_entropy_split_vocab, axis=None)
    expected_out, expected_gradient = with_gradient(plain, *args)
    np.testing.assert_allclose(out, expected_out, 1e-6, 1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, 1e-6, 1e-6)
    # Only sums over the vocabulary travel, one number a token each.
    assert sent(compiled, mesh) == {("all-reduce", ("tensor",))}
    tokens = BATCH * SEQ // (mesh.size // mesh.shape["tensor"])
    assert max(item.num_bytes for item in collectives(compiled, mesh)) <= 3 * 4 * tokens


def test_the_plain_loss_is_the_negative_log_probability():
    logits, targets = normal((BATCH, SEQ, VOCAB), 1, 30.0), ids()
    exact = np.asarray(logits, np.float64)
    exact = np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1)) + exact.max(-1)
    chosen = np.take_along_axis(
        np.asarray(logits, np.float64), np.asarray(targets)[..., None], -1
    )
    nats = cross_entropy_split_vocab(logits, targets, None)
    np.testing.assert_allclose(nats, exact - chosen[..., 0], 1e-6, 1e-5)
