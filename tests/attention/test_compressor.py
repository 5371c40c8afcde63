"""Compressors of all kinds against transformers, and what an entry is made of."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import Compressor, RotaryEmbedding
from dsv4_eqx.attention.compressor import _windows
from tests.captured import captured, reference_gradients
from tests.models import QUICKLY, T, pair, relative

HCA_LAYERS, CSA_LAYERS = (1, 3), (2, 4, 5)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def compress(compressor, x):
    return compressor(x)


def compressor(ratio, overlap, seed=0, dtype=jnp.float32):
    """With weights of size one: gates that differ."""
    made = Compressor(
        7,
        5,
        ratio,
        overlap=overlap,
        rope=RotaryEmbedding(4),
        std=0.5,
        key=jax.random.key(seed),
        dtype=dtype,
    )
    bias = jax.random.normal(jax.random.key(seed + 1), made.position_bias.shape)
    return eqx.tree_at(lambda m: m.position_bias, made, bias)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("ratio", [0, -4, True])
def test_ratios_that_are_none_are_refused(ratio, without_shape_checks):
    with pytest.raises(ValueError, match=rf"Compressor\(ratio={ratio}\).*at least 1"):
        compressor(ratio, False)


def test_an_embedding_of_more_channels_than_an_entry_is_refused():
    with pytest.raises(ValueError, match="rotates 6 channels and head_dim is 5"):
        Compressor(7, 5, 3, rope=RotaryEmbedding(6), key=jax.random.key(0))


@pytest.mark.parametrize("length", [41, 100])
@pytest.mark.parametrize("layer", HCA_LAYERS + CSA_LAYERS)
def test_entries_equal_those_of_transformers(layer, length):
    call = captured(0, length)[f"{layer}.self_attn.compressor"]
    ours = pair(0)[1].layers[layer].attention.compressor
    entries = compress(ours, call.x)
    expected, _ = call.output
    assert entries.values.shape == expected[:, 0].shape
    np.testing.assert_allclose(entries.values, expected[:, 0], 1e-5, 1e-5)


@pytest.mark.parametrize("layer", CSA_LAYERS)
def test_indexer_keys_equal_those_of_transformers(layer):
    calls = captured(0)
    # What the scorer is given: queries, compressed keys, activations.
    keys = calls[f"{layer}.self_attn.compressor.indexer.scorer"].rest[0]
    x = calls[f"{layer}.self_attn.compressor.indexer"].x
    ours = pair(0)[1].layers[layer].attention.indexer.compressor
    np.testing.assert_allclose(compress(ours, x).values, keys, 1e-5, 1e-5)


@pytest.mark.parametrize("layer", (1, 2))
def test_gradients_equal_those_of_transformers(layer):
    name = f"{layer}.self_attn.compressor"
    call = captured(0)[name]
    ours = pair(0)[1].layers[layer].attention.compressor
    cotangent = np.random.default_rng(0).standard_normal(call.output[0].shape)
    cotangent = cotangent.astype(np.float32)
    expected, d_x = reference_gradients(0, name, call, cotangent)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradients(compressor, x):
        def loss(compressor, x):
            return jnp.sum(compressor(x).values * cotangent[:, 0])

        return jax.grad(loss, argnums=(0, 1))(compressor, x)

    ours_grads, ours_d_x = gradients(ours, call.x)
    assert relative(ours_d_x, d_x) < 5e-4
    wanted = jax.tree.leaves(expected.layers[layer].attention.compressor)
    found = jax.tree.leaves(ours_grads)
    assert len(wanted) == len(found) == 4
    for gradient, other in zip(found, wanted):
        assert relative(gradient, other) < 5e-4


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ratio", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 11])
def test_every_complete_window_has_one_entry(overlap, ratio, length):
    entries = jax.eval_shape(compressor(ratio, overlap), normal((2, length, 7)))
    assert entries.values.shape == (2, length // ratio, 5)
    assert entries.last_positions.shape == (2, length // ratio)


def test_last_positions_are_those_of_the_windows_last_tokens():
    entries = compress(compressor(3, True), normal((2, 11, 7)))
    np.testing.assert_array_equal(entries.last_positions, [[2, 5, 8]] * 2)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_entry_pools_its_window_and_with_overlap_the_one_before(overlap):
    ours, x = compressor(3, overlap), normal((2, 14, 7))
    before = np.asarray(compress(ours, x).values)
    for token in range(14):
        after = np.asarray(compress(ours, x.at[:, token].add(1.0)).values)
        changed = (after != before).any(axis=(0, 2))
        window = np.arange(4)
        expected = window == token // 3
        if overlap:
            expected |= window == token // 3 + 1
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_pooling_equals_a_plain_softmax(overlap):
    ours, x = compressor(3, overlap), np.asarray(normal((2, 11, 7)), np.float64)
    values = np.einsum("bsd,ncd->bsnc", x, np.asarray(ours.value, np.float64))
    gates = np.einsum("bsd,ncd->bsnc", x, np.asarray(ours.gate, np.float64))
    bias = np.asarray(ours.position_bias, np.float64)
    current = 1 if overlap else 0
    for window in range(3):
        own = slice(3 * window, 3 * window + 3)
        logits, pooled = gates[:, own, current] + bias[:, current], values[:, own]
        pooled = pooled[:, :, current]
        if overlap and window > 0:
            other = slice(3 * window - 3, 3 * window)
            logits = np.concatenate([gates[:, other, 0] + bias[:, 0], logits], axis=1)
            pooled = np.concatenate([values[:, other, 0], pooled], axis=1)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected = (weights * pooled).sum(axis=1)
        projected = ours.project(normal((2, 11, 7))[:, :9])
        found = ours.pool(*(_windows(part, 3) for part in projected))[:, window]
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def test_entries_rotate_to_their_windows_first_token():
    ours = compressor(3, False)
    pooled = normal((2, 4, 5))
    first = jnp.arange(4)[None] * 3 + jnp.zeros((2, 1), jnp.int32)
    entries = ours.finish(pooled, first)
    expected = RotaryEmbedding(4)(ours.norm(pooled), jnp.array([0, 3, 6, 9]))
    np.testing.assert_array_equal(entries.values, expected)
    np.testing.assert_array_equal(entries.last_positions, first + 2)


def test_truncation_keeps_the_entries_of_complete_windows():
    ours, x = compressor(4, True), normal((2, 15, 7))
    whole = compress(ours, x).values
    for length in (4, 7, 8, 13):
        part = compress(ours, x[:, :length]).values
        np.testing.assert_allclose(part, whole[:, : length // 4], 1e-6, 1e-6)


@pytest.mark.parametrize("overlap", [False, True])
def test_wide_gates_stay_finite(overlap):
    ours = compressor(3, overlap)
    ours = eqx.tree_at(lambda m: m.gate, ours, ours.gate * 1e3)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradients(ours, x):
        def loss(ours, x):
            return jnp.sum(jnp.sin(ours(x).values))

        return jax.value_and_grad(loss, argnums=(0, 1))(ours, x)

    for length in (2, 3, 7):
        out = gradients(ours, normal((2, length, 7)))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_bfloat16_is_pooled_in_float32():
    ours = compressor(3, True, dtype=jnp.bfloat16)
    assert ours.position_bias.dtype == ours.norm.weight.dtype == jnp.float32
    x = normal((2, 11, 7)).astype(jnp.bfloat16)
    values, gates = ours.project(x)
    assert values.dtype == gates.dtype == jnp.float32
    entries = compress(ours, x)
    assert entries.values.dtype == jnp.bfloat16
    arrays = (ours.value, ours.gate)
    wide = eqx.tree_at(
        lambda m: (m.value, m.gate), ours, tuple(a.astype("f4") for a in arrays)
    )
    expected = compress(wide, x.astype(jnp.float32)).values
    # Rounded when pooled, after the norm, and by the rotation.
    error = jnp.abs(entries.values.astype(jnp.float32) - expected).max()
    assert error < 3 * 2**-8 * jnp.abs(expected).max()


def test_layers_of_one_kind_share_the_rotation():
    reference, ours = pair(0)
    for layer in HCA_LAYERS + CSA_LAYERS:
        rope = ours.layers[layer].attention.compressor.rope
        theirs = reference.model.layers[layer].self_attn.compressor.rotary_emb
        expected = theirs.compress_inv_freq.numpy()
        np.testing.assert_array_equal(rope.inv_freq, expected)
        assert rope.base == T.compress_rope_theta and rope.yarn == T.rope_scaling
