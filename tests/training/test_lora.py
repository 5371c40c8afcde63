"""Adapters: what they compute, what is trained, on packed weights and over meshes."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import SLIDING, TOPK_MOE
from dsv4_eqx.kernels.form import use_kernels
from dsv4_eqx.numerics.lora_weight import LoRAWeight, is_lora
from dsv4_eqx.numerics.quantized_weight import is_quantized
from tests.config.raw import NANO
from tests.models import (
    forward_once,
    quick_jit,
    random_model,
    random_tokens,
    relative,
    small_config,
)
from tests.sharded import assert_same_bits, make_mesh, random_module

ALL = (*dsv4.DEFAULT_TARGETS, "attention.output_down", "shared", "experts")
# A stack of two layers: one block to compile.
CONFIG = small_config(
    num_hidden_layers=2,
    layer_types=(SLIDING,) * 2,
    compress_ratios=(0,) * 2,
    mlp_layer_types=(TOPK_MOE,) * 2,
    hc_sinkhorn_iters=2,
)
KEY = jax.random.key(7)
TOKENS = random_tokens(0, config=CONFIG)


@functools.cache
def base():
    return random_model(CONFIG)


@functools.cache
def fresh(targets=ALL, rank=3):
    return dsv4.lora(base(), targets=targets, rank=rank, alpha=7.5, key=KEY)


def trained(model, seed=0, scale=0.1):
    """Adapters as after some steps: B is not 0."""
    adapters, rest = eqx.partition(model, dsv4.lora_mask(model))
    generator = np.random.default_rng(seed)

    def moved(x):
        return x + scale * jnp.asarray(generator.standard_normal(x.shape), x.dtype)

    return eqx.combine(jax.tree.map(moved, adapters), rest)


def loss(adapters, rest, tokens):
    return dsv4.next_token_loss(eqx.combine(adapters, rest), tokens)[0]


def merged_loss(adapters, rest, tokens):
    model = dsv4.merge_lora(eqx.combine(adapters, rest))
    return dsv4.next_token_loss(model, tokens)[0]


def test_fresh_adapters_change_no_bit():
    model = fresh()
    assert type(model) is dsv4.DeepSeekV4
    assert_same_bits(forward_once(model, TOKENS), forward_once(base(), TOKENS))


def test_each_stacked_layer_group_and_expert_has_an_adapter_of_its_own():
    block = fresh().layers.repeated[0]
    query, output = block.attention.query_up, block.attention.output_down.weight
    assert query.a.shape == (2, 3, 22) and query.b.shape == (2, 6, 20, 3)
    assert output.a.shape == (2, 3, 3, 40) and output.b.shape == (2, 3, 14, 3)
    experts = block.moe.experts.gate_up
    assert experts.a.shape == (2, 7, 3, 60) and experts.b.shape == (2, 7, 2, 28, 3)
    for weight in (query, output, experts):
        rows = np.asarray(weight.a).reshape(-1, weight.a.shape[-1])
        assert len(np.unique(rows, axis=0)) == len(rows)
        assert np.abs(rows).max() <= weight.a.shape[-1] ** -0.5
    up = block.attention.output_up  # sums over two dimensions
    assert up.a.shape == (2, 3, 3, 14) and np.abs(up.a).max() <= 42**-0.5


def test_the_default_targets_are_four_matrices_of_every_layer():
    model = dsv4.lora(base(), key=KEY)
    found = [x for x in jax.tree.leaves(model, is_leaf=is_lora) if is_lora(x)]
    assert len(found) == 4 and all(x.rank == 8 and x.scale == 4.0 for x in found)
    assert not any(map(is_lora, jax.tree.leaves(model.mtp, is_leaf=is_lora)))


def test_merged_equals_unmerged_and_has_plain_arrays():
    model = trained(fresh())
    merged = dsv4.merge_lora(model)
    assert jax.tree.structure(merged) == jax.tree.structure(base())
    out, expected = forward_once(model, TOKENS), forward_once(merged, TOKENS)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(out - forward_once(base(), TOKENS)).max() > 0.1
    for name in ("query_up", "output_up"):  # as the formula has it, in float64
        weight = getattr(model.layers[1].attention, name)
        a, b = (np.asarray(x, "f8") for x in (weight.a, weight.b))
        rank = weight.rank
        delta = b.reshape(-1, rank) @ a.reshape(rank, -1) * 7.5 / rank
        expected = np.asarray(weight.base, "f8") + delta.reshape(weight.shape)
        found = getattr(merged.layers[1].attention, name)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "tpu"])
def test_gradients_are_those_through_the_merged_weights(form):
    adapters, rest = eqx.partition(trained(fresh()), dsv4.lora_mask(fresh()))
    with use_kernels(form):
        found = quick_jit(jax.grad(loss))(adapters, rest, TOKENS)
    expected = quick_jit(jax.grad(merged_loss))(adapters, rest, TOKENS)
    for gradient, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative(gradient, other) < 2e-5 and np.abs(other).max() > 0


def test_frozen_weights_have_no_gradient():
    model = trained(fresh())
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    gradients = quick_jit(jax.grad(loss))(floats, rest, TOKENS)
    bases = [x for x in jax.tree.leaves(gradients, is_leaf=is_lora) if is_lora(x)]
    assert len(bases) == 9
    assert all((x.base == 0).all() and np.abs(x.a).max() > 0 for x in bases)
    marks = dsv4.trainable(model)
    marked = [x for x in jax.tree.leaves(marks, is_leaf=is_lora) if is_lora(x)]
    assert len(marked) == len(bases)
    assert all((x.base, x.a, x.b) == (False, True, True) for x in marked)


@pytest.mark.slow
def test_decoding_runs_the_adapters_of_stacked_layers():
    model = trained(fresh())
    merged = dsv4.merge_lora(model)

    @quick_jit
    def decode(model):
        cache = model.init_cache(2, 16)
        logits, cache = model.extend(TOKENS[:, :9], cache)
        return logits, model.extend(TOKENS[:, 9:12], cache)[0]

    for found, expected in zip(decode(model), decode(merged), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def step(model, chosen, tokens, steps=2):
    """The model after some steps of the optimizer, `chosen` marking layers."""
    optax = pytest.importorskip("optax")
    adapters, rest = eqx.partition(model, dsv4.lora_mask(model))
    transformation = dsv4.optimizer(adapters, 1e-2)
    state = transformation.init(adapters)
    num_moments = 2 * len(jax.tree.leaves(adapters))
    assert sum(np.ndim(x) > 0 for x in jax.tree.leaves(state)) == num_moments

    @quick_jit
    def one(adapters, state):
        gradients = jax.grad(loss)(adapters, rest, tokens)
        updates, state = transformation.update(gradients, state, adapters)
        return optax.apply_updates(adapters, dsv4.apply_mask(chosen, updates)), state

    for _ in range(steps):
        adapters, state = one(adapters, state)
    return eqx.combine(adapters, rest)


@pytest.mark.slow
def test_only_adapters_of_chosen_layers_change_in_steps_of_the_optimizer():
    model = fresh()
    after = step(model, dsv4.layer_mask(model, [1]), TOKENS, steps=20)
    assert_same_bits(*bases(model, after))
    for layer in range(2):
        pair = (dsv4.lora_mask(x.layers[layer]) for x in (model, after))
        before, now = (
            eqx.filter(x.layers[layer], mask) for x, mask in zip((model, after), pair)
        )
        leaves = zip(*map(jax.tree.leaves, (before, now)), strict=True)
        assert {bool((x == y).all()) for x, y in leaves} == {layer == 0}


@functools.cache
def nano(**options):
    return dsv4.from_pretrained(NANO, dtype="float32", **options)


def nano_tokens():
    return random_tokens(1, length=37, config=nano(keep_quantized=True).config)


@pytest.mark.slow
def test_packed_weights_stay_packed_below_their_adapters():
    packed, tokens = nano(keep_quantized=True), nano_tokens()
    model = dsv4.lora(packed, targets=ALL, rank=2, key=KEY)
    attention, experts = model.layers[3].attention, model.layers[3].moe.experts
    assert is_quantized(attention.query_up.base) and is_quantized(experts.down.base)
    assert_same_bits(forward_once(model, tokens), forward_once(packed, tokens))
    after = step(model, jax.tree.map(lambda _: True, model), tokens)
    assert_same_bits(*bases(model, after))
    merged = dsv4.merge_lora(after)
    assert not is_quantized(merged.layers[3].attention.query_up)
    assert is_quantized(merged.layers[4].attention.indexer.query_up)
    out, expected = forward_once(after, tokens), forward_once(merged, tokens)
    assert relative(out, expected) < 5e-6  # five layers of float32's rounding
    assert relative(out, forward_once(packed, tokens)) > 1e-3


@pytest.mark.exhaustive  # layers of every kind, forward and backward, twice
def test_packed_bases_give_adapters_the_gradients_of_arrays():
    packed, arrays = (
        trained(dsv4.lora(nano(keep_quantized=keep), targets=ALL, rank=2, key=KEY))
        for keep in (True, False)
    )
    found, expected = (
        quick_jit(jax.grad(loss))(
            *eqx.partition(model, dsv4.lora_mask(model)), nano_tokens()
        )
        for model in (packed, arrays)
    )
    pairs = [*zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    assert len(pairs) > 20
    for gradient, other in pairs:
        assert relative(gradient, other) < 2e-5 and np.abs(other).max() > 0


def bases(*models):
    """The models without adapters."""
    return (
        jax.tree.map(lambda x: x.base if is_lora(x) else x, model, is_leaf=is_lora)
        for model in models
    )


@pytest.mark.slow
def test_bfloat16_weights_have_adapters_in_float32():
    half = jax.tree.map(
        lambda x, y: x.astype(y.dtype),
        base(),
        dsv4.model.model.abstract_model(CONFIG, jnp.bfloat16),
    )
    model = trained(dsv4.lora(half, targets=ALL, key=KEY), scale=0.02)
    assert model.layers[0].attention.query_up.a.dtype == jnp.float32
    out = forward_once(model, TOKENS)
    expected = forward_once(dsv4.merge_lora(model), TOKENS)
    assert relative(out, expected) < 0.02


LAYERS = dataclasses.replace(
    dsv4.Config.tiny(),
    num_hidden_layers=2,
    layer_types=(SLIDING,) * 2,
    compress_ratios=(0,) * 2,
    mlp_layer_types=(TOPK_MOE,) * 2,
    hc_sinkhorn_iters=2,
    num_nextn_predict_layers=0,
)


@functools.cache
def of_mesh():
    """A model with adapters, tokens, and its logits and gradients on one device."""
    model = random_module(lambda _, key: dsv4.DeepSeekV4(LAYERS, key=key))
    model = trained(dsv4.lora(model, targets=ALL, rank=3, key=KEY))
    tokens = random_tokens(2, length=24, batch=8, config=LAYERS)
    return model, tokens, *logits_and_gradients(model, tokens)


def logits_and_gradients(model, tokens):
    parts = eqx.partition(model, dsv4.lora_mask(model))
    logits = quick_jit(lambda model, tokens: model(tokens))(model, tokens)
    return logits, quick_jit(jax.grad(loss))(*parts, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, fsdp",
    [
        (dict(data=2, expert=2, tensor=2), True),
        (dict(context=2, tensor=4), False),
    ],
    ids=str,
)
def test_over_a_mesh_it_is_the_same(sizes, fsdp):
    model, tokens, logits, gradients = of_mesh()
    over = dsv4.shard(model, make_mesh(**sizes), fsdp=fsdp)
    attention = over.model.layers.repeated[0].attention
    b = attention.query_up.b
    assert b.sharding.shard_shape(b.shape)[1] == b.shape[1] // sizes["tensor"]
    a = attention.output_up.a
    assert a.sharding.shard_shape(a.shape)[2] == a.shape[2] // sizes["tensor"]
    found, d_found = logits_and_gradients(over, tokens)
    np.testing.assert_allclose(found, logits, rtol=2e-5, atol=2e-5)
    pairs = zip(*map(jax.tree.leaves, (d_found, gradients)), strict=True)
    assert all(relative(x, y) < 1e-4 for x, y in pairs)


def test_a_sharded_model_is_adapted_and_merged_where_it_lies():
    model, *_ = of_mesh()
    plain = next(iter(bases(model)))
    mesh = make_mesh(data=2, tensor=2)
    over = dsv4.lora(dsv4.shard(plain, mesh, fsdp=True), rank=3, key=KEY)
    expected = dsv4.shard(dsv4.lora(plain, rank=3, key=KEY), mesh, fsdp=True)
    assert over.leaf_specs == expected.leaf_specs and over.fsdp
    assert_same_bits(over, expected)
    merged = dsv4.merge_lora(over)
    assert merged.leaf_specs == dsv4.shard(plain, mesh, fsdp=True).leaf_specs
    assert_same_bits(merged.model.embedding, plain.embedding)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(targets=["attention.q_proj"]), "'attention.q_proj' matches no weight.*"),
        (dict(targets=["wq_a"]), "there are attention.query_down, .*experts.down"),
        (dict(targets=["attention.indexer"]), "matches no weight"),
        (dict(targets=["query_up", "router"]), "'router' matches no weight"),
        (dict(targets="experts"), "targets='experts'.*must be texts"),
        (dict(targets=[]), "targets=.*at least one"),
        (dict(rank=0), "rank=0"),
        (dict(alpha=float("nan")), "alpha=nan"),
        (dict(alpha=0), "alpha=0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dsv4.lora(base(), **(dict(key=KEY) | options))


def test_a_second_adapter_and_a_missing_one_are_refused():
    with pytest.raises(ValueError, match="has adapters already.*merge_lora"):
        dsv4.lora(fresh(), key=KEY)
    for call in (dsv4.merge_lora, dsv4.lora_mask):
        with pytest.raises(ValueError, match=f"{call.__name__}: .*no adapters"):
            call(base())


@pytest.mark.usefixtures("without_shape_checks")
def test_arguments_of_wrong_types_are_refused():
    for options in (dict(rank=2.5), dict(key=3), dict(alpha="x")):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            dsv4.lora(base(), **(dict(key=KEY) | options))
    with pytest.raises(ValueError, match="must be a DeepSeekV4"):
        dsv4.lora(base().layers, key=KEY)


def test_a_model_with_adapters_is_not_saved_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match="merge_lora"):
        dsv4.save_pretrained(fresh(), tmp_path / "model")


def test_no_array_is_made_of_one_by_accident():
    weight = fresh().layers[0].attention.query_down
    assert isinstance(weight, LoRAWeight) and weight.size == weight.base.size
    with pytest.raises(TypeError, match="as_arrays"):
        np.asarray(weight)
