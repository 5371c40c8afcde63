"""Whole layers against transformers, and what must hold of any layer."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import Block
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.captured import captured, positions, reference_gradients, tokens
from tests.models import QUICKLY, pair, relative
from tests.tiers import tiers
from tests.tiny import tiny_config

# One layer of each kind of attention, hashed and routed by score.
SMALL = tiny_config(
    vocab_size=11,
    hidden_size=10,
    moe_intermediate_size=7,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=6,
    qk_rope_head_dim=4,
    q_lora_rank=5,
    o_groups=1,
    o_lora_rank=3,
    n_routed_experts=5,
    num_experts_per_tok=2,
    sliding_window=5,
    layer_types=(SLIDING, HCA, CSA),
    compress_ratios=(0, 5, 3),
    mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
    index_n_heads=16,
    index_head_dim=4,
    index_topk=2,
    hc_mult=3,
    hc_sinkhorn_iters=5,
    initializer_range=0.3,
)
LAYERS = range(3)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def run(block, streams, ids):
    return block(streams, ids, positions(ids))


@functools.partial(jax.jit, compiler_options=QUICKLY)
def run_with_gradients(block, streams, ids, cotangent):
    """The output, and the gradients of its product with `cotangent`."""

    def loss(block, streams):
        out = block(streams, ids, positions(ids))
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    (_, out), grads = grad(block, streams)
    return out, *grads


@functools.cache
def small_block(layer, dtype=jnp.float32):
    make = functools.partial(Block, SMALL, layer, dtype=dtype)
    compiled = jax.jit(lambda key: make(key=key), compiler_options=QUICKLY)
    return compiled(jax.random.key(layer))


def inputs(length, batch=2, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    streams = rng.standard_normal((batch, length, 3, SMALL.hidden_size))
    ids = rng.integers(0, SMALL.vocab_size, (batch, length)).astype(np.int32)
    return jnp.asarray(streams, dtype), jnp.asarray(ids)


def assert_finite(block, streams, ids):
    cotangent = np.cos(np.arange(streams.size)).reshape(streams.shape).astype("f4")
    out = run_with_gradients(block, streams, ids, cotangent)
    leaves = jax.tree.leaves(out)
    leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(leaves) > 20
    for leaf in leaves:
        assert jnp.isfinite(leaf.astype(jnp.float32)).all()


@pytest.mark.parametrize("length", [41, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", range(6))
def test_layer_equals_that_of_transformers(layer, length):
    call = captured(0, length)[f"{layer}"]
    out = run(pair(0)[1].layers[layer], call.x, jnp.asarray(tokens(0, length)))
    np.testing.assert_allclose(out, call.output, 2e-5, 2e-5)


@pytest.mark.parametrize("layer", range(4))  # sliding, both, sparse; hashed, by score
def test_gradients_equal_those_of_transformers(layer):
    call = captured(0)[f"{layer}"]
    cotangent = np.random.default_rng(0).standard_normal(call.output.shape)
    cotangent = cotangent.astype(np.float32)
    expected, d_x = reference_gradients(0, f"{layer}", call, cotangent)
    ours = pair(0)[1].layers[layer]
    _, found, ours_d_x = run_with_gradients(ours, call.x, tokens(0), cotangent)
    assert relative(ours_d_x, d_x) < 5e-4
    wanted = jax.tree_util.tree_leaves_with_path(expected.layers[layer])
    for (path, other), gradient in zip(wanted, jax.tree.leaves(found), strict=True):
        if jnp.issubdtype(other.dtype, jnp.floating):
            name = jax.tree_util.keystr(path)
            # The bias selects and has no gradient: transformers keeps it as a buffer.
            other = np.zeros_like(other) if name.endswith("router.bias") else other
            assert relative(gradient, other) < 5e-4, name


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_before_a_changed_token_keep_every_bit(layer):
    block, (streams, ids) = small_block(layer), inputs(17)
    before = run(block, streams, ids)
    for token in (0, 1, 4, 5, 14, 15, 16):
        changed = streams.at[:, token:].add(1.0)
        after = run(block, changed, ids.at[:, token:].set(3))
        np.testing.assert_array_equal(after[:, :token], before[:, :token])
        assert (after[:, token] != before[:, token]).any()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_does_not_depend_on_its_neighbours(layer):
    block, (streams, ids) = small_block(layer), inputs(17)
    before = run(block, streams, ids)
    after = run(block, streams.at[1].multiply(-2.0), ids.at[1].set(0))
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] != before[1]).any()
    alone = run(block, streams[1:], ids[1:])
    np.testing.assert_allclose(alone, before[1:], 1e-5, 1e-5)


@pytest.mark.parametrize(
    "layer, dtype",
    tiers(
        itertools.product(LAYERS, [jnp.float32, jnp.bfloat16]),
        quick=[(2, jnp.float32)],
        in_ci=[(0, jnp.float32), (1, jnp.float32), (2, jnp.bfloat16)],
    ),
)
def test_extremes_stay_finite(layer, dtype):
    block, (streams, ids) = small_block(layer, dtype), inputs(17, dtype=dtype)
    for sink in (-80.0, 80.0):
        sinks = jnp.full_like(block.attention.sinks, sink)
        changed = eqx.tree_at(lambda b: b.attention.sinks, block, sinks)
        assert_finite(changed, streams, ids)
    # Normalised activations are near 1: sums of ten of them times 200.
    weight = jnp.where(block.moe.router.weight > 0, 200.0, -200.0).astype(dtype)
    changed = eqx.tree_at(lambda b: b.moe.router.weight, block, weight)
    assert_finite(changed, streams, ids)
    equal = jnp.broadcast_to(streams[:, :1], streams.shape)
    assert_finite(block, equal, jnp.full_like(ids, 2))
    assert_finite(block, jnp.zeros_like(streams), ids)
    for scale in (1e-6, 1e4):
        assert_finite(block, streams * jnp.asarray(scale, dtype), ids)


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_streams_stay_bfloat16(layer):
    block, (streams, ids) = small_block(layer, jnp.bfloat16), inputs(17)
    out = run(block, streams.astype(jnp.bfloat16), ids)
    assert out.dtype == jnp.bfloat16
    for connection in (block.attention_connection, block.moe_connection):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(connection))
    assert block.moe.experts.down.dtype == jnp.bfloat16


@pytest.mark.parametrize("names", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_streams_of_another_dtype_than_the_weights_are_refused(names):
    streams, ids = inputs(5, dtype=jnp.dtype(names[0]))
    with pytest.raises(ValueError, match="x of dtype {}.*{}: cast".format(*names)):
        run(small_block(2, jnp.dtype(names[1])), streams, ids)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_a_block_of_no_tokens_is_refused(layer, batch, length):
    with pytest.raises(ValueError, match="batch and seq must be at least 1"):
        run(small_block(layer), *inputs(length, batch))


def test_a_block_works_with_64_bit_integers():
    block, (streams, ids) = small_block(2), inputs(41)

    def loss(block, streams, ids, at):
        return jnp.sum(block(streams, ids, at))

    with jax.enable_x64(True):
        ids = np.asarray(ids, np.int64)
        at = np.broadcast_to(np.arange(41), ids.shape)
        step = jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)
        abstract = jax.eval_shape(lambda *x: x, block, streams, ids, at)
        assert abstract[2].dtype == abstract[3].dtype == jnp.int64
        _, (_, d_streams) = jax.eval_shape(step, *abstract)
    assert d_streams.dtype == jnp.float32


def test_layers_are_of_the_kinds_in_the_schedule():
    for layer in LAYERS:
        block = small_block(layer)
        assert (block.attention.compressor is None) == (layer == 0)
        assert (block.attention.indexer is None) == (layer < 2)
        assert hasattr(block.moe.router, "table") == (layer == 0)


def test_the_prediction_block_slides_and_routes_by_score():
    block = small_block(3)
    assert block.attention.compressor is None
    assert not hasattr(block.moe.router, "table")


@pytest.mark.parametrize("layer", [-1, 4])
def test_there_are_no_other_layers(layer):
    with pytest.raises(ValueError, match=rf"layer={layer}\): there are layers 0 to 3"):
        Block(SMALL, layer, key=jax.random.key(0))
