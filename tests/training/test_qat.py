"""Quantisation-aware training against what is saved and loaded again, and meshes."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, SLIDING, TOPK_MOE
from dsv4_eqx.numerics.lora_weight import as_arrays
from dsv4_eqx.numerics.quantize import FP4, is_fake_quantized
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, dequantize, is_quantized
from dsv4_eqx.training.qat import _hadamard
from tests.config.raw import NANO
from tests.models import (
    forward_once,
    quick_jit,
    random_model,
    random_tokens,
    relative,
)
from tests.numerics.test_quantize import by_block
from tests.official import wide_config
from tests.sharded import assert_same_bits, make_mesh, random_module

WEIGHTS = dict(entries=None, indexer=None)
# Blocks end at most edges; an indexer whose channels are a power of two.
CONFIG = wide_config(
    index_head_dim=16,
    hc_sinkhorn_iters=2,
    layer_types=(CSA,) * 2,
    compress_ratios=(4,) * 2,
    mlp_layer_types=(TOPK_MOE,) * 2,
    num_hidden_layers=2,
)
TOKENS = random_tokens(0, length=41, config=CONFIG)


@functools.cache
def plain():
    return random_model(CONFIG)


def loss(trained, rest, tokens):
    return dsv4.next_token_loss(eqx.combine(trained, rest), tokens)[0]


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_it_computes_as_the_quantised_checkpoint_does(experts, tmp_path):
    model = dsv4.qat(plain(), experts=experts, **WEIGHTS)
    out = forward_once(model, TOKENS)
    packed = dsv4.pack_qat(model)
    assert is_quantized(packed.layers[1].moe.experts.down)
    dsv4.save_pretrained(packed, tmp_path / "release", official=True)
    for keep in (False, True):
        loaded = dsv4.from_pretrained(
            tmp_path / "release", dtype="float32", keep_quantized=keep
        )
        assert_same_bits(forward_once(loaded, TOKENS), out)
    assert_same_bits(loaded, packed)
    assert_same_bits(dequantize(model), dequantize(packed))
    assert relative(out, forward_once(plain(), TOKENS)) > 1e-3


@pytest.mark.slow
def test_a_release_computes_as_before():
    """Its numbers are those of its formats already."""
    packed = dsv4.from_pretrained(NANO, dtype="float32", keep_quantized=True)
    tokens = random_tokens(1, length=37, config=packed.config)
    model = dsv4.qat(packed, **WEIGHTS)
    assert not any(map(is_quantized, jax.tree.leaves(model, is_leaf=is_quantized)))
    assert_same_bits(dequantize(model), dequantize(packed))
    assert_same_bits(forward_once(model, tokens), forward_once(packed, tokens))
    again = dsv4.pack_qat(model)
    assert_same_bits(dequantize(again), dequantize(packed))


@pytest.mark.slow
def test_gradients_are_those_at_the_quantised_weights():
    model = dsv4.qat(plain(), **WEIGHTS)
    mask = dsv4.trainable(model)
    trained, rest = eqx.partition(model, mask)
    found = quick_jit(jax.grad(loss))(trained, rest, TOKENS)
    arrays = as_arrays(model)
    parts = eqx.partition(arrays, dsv4.trainable(arrays))
    expected = quick_jit(jax.grad(loss))(*parts, TOKENS)
    pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    assert all(relative(x, y) < 1e-5 for x, y in pairs)
    names = dsv4.describe_optimizer(trained)
    assert ".attention.query_up.weight " in names and "Muon" in names


def test_what_is_quantised_is_what_a_release_has_packed():
    for model in (dsv4.qat(plain()), dsv4.qat(plain(), experts=None, linears=None)):
        leaves = jax.tree.leaves(model, is_leaf=is_fake_quantized)
        faked = [x for x in leaves if is_fake_quantized(x)]
    assert faked == []
    block = dsv4.qat(plain()).layers.repeated[0]
    attention, moe = block.attention, block.moe
    for weight in (
        attention.query_down,
        attention.query_up,
        attention.key_value,
        attention.output_down.weight,
        attention.output_up,
        attention.indexer.query_up,
        moe.shared.gate_up,
        moe.shared.down,
        moe.experts.gate_up,
        moe.experts.down,
    ):
        assert is_fake_quantized(weight)
    others = attention.compressor.value, attention.indexer.head_weights
    assert not any(map(is_fake_quantized, (*others, moe.router.weight)))


def test_keys_and_entries_are_rounded_but_for_the_rotated_channels():
    attention = dsv4.qat(plain()).layers[0].attention
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 44)), jnp.float32)
    for norm in (attention.key_value_norm, attention.compressor.norm):
        out, pullback = jax.vjp(norm, x)
        exact, expected = jax.vjp(norm.norm, x)
        rows = np.asarray(exact).reshape(6, 44)[:, :36]
        rounded = by_block(rows, dsv4.numerics.quantize.FP8, (1, 64))
        np.testing.assert_array_equal(np.reshape(out, (6, 44))[:, :36], rounded)
        np.testing.assert_array_equal(out[..., 36:], exact[..., 36:])
        np.testing.assert_allclose(pullback(x)[0], expected(x)[0], rtol=1e-6)


def test_the_indexers_queries_and_keys_are_rounded_in_a_basis_of_their_own():
    np.testing.assert_allclose(_hadamard(16) @ _hadamard(16).T, np.eye(16), atol=1e-12)
    attention = dsv4.qat(plain()).layers[0].attention
    rotation = attention.indexer.compressor.rope
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((2, 3, 16)), jnp.float32)
    positions = jnp.asarray([[0, 1, 2], [3, 4, 5]])
    out = rotation(x, positions)
    exact = rotation.rope(x, positions) @ jnp.asarray(_hadamard(16), jnp.float32).T
    assert 0.01 < relative(out, exact) < 0.2
    expected = by_block(np.asarray(exact).reshape(6, 16), FP4, (1, 32))
    np.testing.assert_allclose(np.reshape(out, (6, 16)), expected, atol=1e-6)


def test_all_of_it_runs_and_is_packed_without_rounded_activations():
    model = dsv4.qat(plain())
    out = forward_once(model, TOKENS)
    assert np.isfinite(out).all()
    only_weights = forward_once(dsv4.qat(plain(), **WEIGHTS), TOKENS)
    assert 1e-4 < relative(out, only_weights)
    packed = dsv4.pack_qat(model)
    assert_same_bits(packed, dsv4.pack_qat(dsv4.qat(plain(), **WEIGHTS)))
    assert jax.tree.structure(dequantize(packed)) == jax.tree.structure(plain())


MESH_CONFIG = dataclasses.replace(
    dsv4.Config.tiny(),
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    head_dim=64,
    o_groups=2,
    o_lora_rank=128,
    moe_intermediate_size=256,
    layer_types=(SLIDING,),
    compress_ratios=(0,),
    mlp_layer_types=(TOPK_MOE,),
    hc_sinkhorn_iters=2,
    num_nextn_predict_layers=0,
)


@pytest.mark.slow
def test_over_a_mesh_that_splits_no_block_it_is_the_same():
    model = random_module(lambda _, key: dsv4.DeepSeekV4(MESH_CONFIG, key=key))
    tokens = random_tokens(2, length=24, batch=4, config=MESH_CONFIG)
    expected = forward_once(dsv4.qat(model), tokens)
    mesh = make_mesh(data=2, expert=2, tensor=2)
    over = dsv4.qat(dsv4.shard(model, mesh, fsdp=True))
    assert over.fsdp and over.mesh is mesh
    run = quick_jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(run(over, tokens), expected, rtol=2e-5, atol=2e-5)


def test_a_mesh_that_splits_blocks_is_refused():
    config = dataclasses.replace(MESH_CONFIG, o_lora_rank=32)
    model = random_module(lambda _, key: dsv4.DeepSeekV4(config, key=key))
    over = dsv4.qat(dsv4.shard(model, make_mesh(tensor=2)))
    tokens = random_tokens(2, length=24, batch=4, config=config)
    with pytest.raises(ValueError, match="split into parts of .*choose another mesh"):
        quick_jit(lambda model, tokens: model(tokens))(over, tokens)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(experts="int4"), "experts='int4'.*'fp4', 'fp8'"),
        (dict(linears="fp4"), "linears='fp4'"),
        (dict(entries="fp4"), "entries='fp4'"),
        (dict(indexer="fp8"), "indexer='fp8'"),
    ],
)
def test_other_formats_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dsv4.qat(plain(), **options)


def test_other_models_are_refused(tmp_path):
    model = dsv4.qat(plain())
    with pytest.raises(ValueError, match="the model is one from qat"):
        dsv4.qat(model)
    with pytest.raises(ValueError, match="the model is one from qat.*pack_qat"):
        dsv4.lora(model, key=jax.random.key(0))
    with pytest.raises(ValueError, match="has adapters already"):
        dsv4.qat(dsv4.lora(plain(), key=jax.random.key(0)))
    with pytest.raises(ValueError, match="no weight is in training"):
        dsv4.pack_qat(plain())
    with pytest.raises(ValueError, match="pack_qat"):
        dsv4.save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match="12 channels.*indexer=None"):
        dsv4.qat(random_model(wide_config()))
    broken = eqx.tree_at(
        lambda m: m.layers.repeated[0].attention.query_down,
        plain(),
        replace_fn=lambda x: x.at[1, 2, 3].set(jnp.nan),
    )
    with pytest.raises(ValueError, match="query_down has numbers that are not finite"):
        dsv4.pack_qat(dsv4.qat(broken))


def with_scales(change):
    """The model packed, with other scales of the first layer's experts."""
    model = dsv4.pack_qat(dsv4.qat(plain(), **WEIGHTS))
    down = model.layers.repeated[0].moe.experts.down
    scales, codes = np.full(down.scales.shape, 120, np.uint8), np.array(down.codes)
    codes[codes == 0] = 0x22
    change(scales, codes)
    new = QuantizedWeight(jnp.asarray(codes), jnp.asarray(scales), FP4, down.dtype)
    return eqx.tree_at(lambda m: m.layers.repeated[0].moe.experts.down, model, new)


def test_scales_of_a_block_may_differ_by_two_to_the_fourteenth():
    def change(scales, codes):
        scales[0, 1, 127, 0], scales[0, 1, 0, 0] = 130, 116  # of one block
        scales[0, 2, 3, 0], scales[0, 2, 4, 0] = 130, 115
        scales[1, 3, 127, 0], scales[1, 3, 128, 0] = 130, 100  # of two blocks
        scales[1, 4, 5, 0], codes[1, 4, 5, :4] = 90, 0x80  # zeros, of either sign

    found = dsv4.fp8_exactness(with_scales(change))
    assert len(found) == 2 * 6 * 3
    expected = {(0, 1): 14, (0, 2): 15, (1, 3): 20, (1, 4): 0, (1, 5): 0}
    for (layer, expert), spread in expected.items():
        name = f"layers.{layer}.ffn.experts.{expert}.w2.weight"
        assert found[name] == (spread, spread <= 14), name


def test_the_rule_is_that_of_the_formats():
    """Every code of FP4 times 2^k, for k of 15 exponents and of 16."""
    values = np.array([0.5, 1, 1.5, 2, 3, 4, 6])

    def is_exact(spread):
        for below in range(spread + 1):
            numbers = np.float32(values * 2.0 ** (6 - below))
            rounded = numbers.astype(dsv4.numerics.quantize.FP8).astype(np.float32)
            if (numbers != rounded).any():
                return False
        return True

    assert is_exact(14) and not is_exact(15)


def test_every_matrix_in_fp4_has_a_verdict():
    model = dsv4.from_pretrained(NANO, dtype="float32", keep_quantized=True)
    found = dsv4.fp8_exactness(model)
    assert len(found) == 6 * 6 * 3 and "mtp.0.ffn.experts.5.w3.weight" in found
    with pytest.raises(ValueError, match="no weight is packed in FP4"):
        dsv4.fp8_exactness(plain())
