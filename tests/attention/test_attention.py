"""Attention of all three kinds against transformers, part by part and whole."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx import Attention, Compressor, Indexer, RotaryEmbedding
from dsv4_eqx.config.kinds import CSA, HCA, SLIDING
from dsv4_eqx.kernels.entries import visible
from dsv4_eqx.kernels.form import FORMS
from dsv4_eqx.model.parts import make_attention
from tests.captured import captured, positions, reference_gradients
from tests.models import QUICKLY, T, pair, relative
from tests.tiers import tiers
from tests.tiny import tiny_config

LAYERS = {SLIDING: 0, HCA: 1, CSA: 2}
RATIOS = {SLIDING: 0, HCA: 16, CSA: 4}
SEVERAL = 4 * FORMS["cpu"].query_block  # queries in whole blocks


@functools.partial(jax.jit, compiler_options=QUICKLY)
def attend(attention, x):
    return attention(x, positions(x))


@functools.cache
def small_attention(kind, seed=0, dtype=jnp.float32):
    """Without the oracle's weights; large enough ones to matter."""
    config = tiny_config(initializer_range=0.3)
    make = functools.partial(make_attention, config, kind, RATIOS[kind], dtype=dtype)
    compiled = jax.jit(lambda key: make(key=key), compiler_options=QUICKLY)
    made = compiled(jax.random.key(seed))
    sinks = jax.random.normal(jax.random.key(seed + 1), made.sinks.shape)
    return eqx.tree_at(lambda m: m.sinks, made, sinks)


def activations(length, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, length, T.hidden_size))
    return jnp.asarray(x, jnp.float32)


# 41: a mask over the entries; 100: indices of some, two blocks of queries.
@pytest.mark.parametrize("length", [41, 100])
@pytest.mark.parametrize("layer", range(6))
def test_output_equals_that_of_transformers(layer, length):
    call = captured(0, length)[f"{layer}.self_attn"]
    out = attend(pair(0)[1].layers[layer].attention, call.x)
    np.testing.assert_allclose(out, call.output[0], 1e-5, 1e-5)


@pytest.mark.parametrize(
    "kind, length",
    tiers(
        itertools.product([SLIDING, HCA], [SEVERAL - 1, SEVERAL, SEVERAL + 45]),
        quick=[(SLIDING, SEVERAL - 1), (HCA, SEVERAL + 45)],
        in_ci=[(SLIDING, SEVERAL + 45), (HCA, SEVERAL)],
    ),
)
def test_output_equals_that_of_transformers_across_blocks(kind, length):
    layer = LAYERS[kind]
    call = captured(0, SEVERAL + 45)[f"{layer}.self_attn"]
    x, expected = call.x[:, :length], call.output[0][:, :length]
    out = attend(pair(0)[1].layers[layer].attention, x)
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_equal_those_of_transformers(kind):
    layer = LAYERS[kind]
    name = f"{layer}.self_attn"
    call = captured(0)[name]
    ours = pair(0)[1].layers[layer].attention
    rng = np.random.default_rng(0)
    cotangent = rng.standard_normal(call.output[0].shape).astype(np.float32)
    expected, d_x = reference_gradients(0, name, call, cotangent)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradients(attention, x):
        def loss(attention, x):
            return jnp.sum(attention(x, positions(x)) * cotangent)

        return jax.grad(loss, argnums=(0, 1))(attention, x)

    found, ours_d_x = gradients(ours, call.x)
    assert relative(ours_d_x, d_x) < 5e-4
    wanted = jax.tree_util.tree_leaves_with_path(expected.layers[layer].attention)
    for (path, other), gradient in zip(wanted, jax.tree.leaves(found), strict=True):
        assert relative(gradient, other) < 5e-4, jax.tree_util.keystr(path)


def test_parts_equal_those_of_transformers():
    call = captured(0)["0.self_attn"]
    ours, theirs = (
        pair(0)[1].layers[0].attention,
        pair(0)[0].model.layers[0].self_attn,
    )
    cos, sin = call.named["position_embeddings"]["main"]
    with torch.no_grad():
        latent = theirs.q_a_norm(theirs.q_a_proj(call.first))
        queries = theirs.q_b_proj(latent).unflatten(-1, (6, 20)).transpose(1, 2)
        queries = hf.apply_rotary_pos_emb(theirs.q_b_norm(queries), cos, sin)
        keys = theirs.kv_norm(theirs.kv_proj(call.first)).unsqueeze(1)
        keys = hf.apply_rotary_pos_emb(keys, cos, sin)[:, 0]
    at = positions(call.x)
    our_latent = ours.project_latent(call.x)
    found = (
        our_latent,
        ours.project_queries(our_latent, at),
        ours.project_keys(call.x, at),
    )
    for part, expected in zip(found, (latent, queries.transpose(1, 2), keys)):
        np.testing.assert_allclose(part, expected, 1e-5, 1e-5)


def test_project_output_equals_that_of_transformers():
    ours = pair(0)[1].layers[0].attention
    theirs = pair(0)[0].model.layers[0].self_attn
    cos, sin = captured(0)["0.self_attn"].named["position_embeddings"]["main"]
    rng = np.random.default_rng(0)
    out = rng.standard_normal((2, 41, 6, 20)).astype(np.float32)
    with torch.no_grad():
        # As at the end of `DeepseekV4Attention.forward`.
        tensor = torch.tensor(out).transpose(1, 2)
        turned = hf.apply_rotary_pos_emb(tensor, cos, -sin).transpose(1, 2)
        grouped = theirs.o_a_proj(turned.reshape(2, 41, T.o_groups, -1))
        expected = theirs.o_b_proj(grouped.flatten(2))
    found = ours.project_output(jnp.asarray(out), positions(out))
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def test_each_kind_has_its_parts_and_its_rotation():
    for kind, base, yarn in (
        (SLIDING, T.rope_theta, None),
        (HCA, T.compress_rope_theta, T.rope_scaling),
        (CSA, T.compress_rope_theta, T.rope_scaling),
    ):
        made = small_attention(kind)
        assert (made.compressor is None) == (kind == SLIDING)
        assert (made.indexer is not None) == (kind == CSA)
        assert made.rope.base == base and made.rope.yarn == yarn
        if made.compressor is not None:
            assert made.compressor.position_bias.shape[:2] == (
                RATIOS[kind],
                2 if kind == CSA else 1,
            )


@pytest.mark.exhaustive  # as those of whole layers
@pytest.mark.parametrize("kind", LAYERS)
def test_truncating_the_input_truncates_the_output(kind):
    ours, x = small_attention(kind), activations(70)
    whole = attend(ours, x)
    for length in (1, 3, 4, 9, 16, 17, 64, 65):
        part = attend(ours, x[:, :length])
        np.testing.assert_allclose(part, whole[:, :length], 5e-5, 5e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_before_a_changed_token_keep_every_bit(kind):
    ours, x = small_attention(kind), activations(100)
    before = attend(ours, x)
    for token in (0, 15, 16, 63, 64, 99):
        after = attend(ours, x.at[:, token:].add(1.0))
        np.testing.assert_array_equal(after[:, :token], before[:, :token])
        assert (after[:, token] != before[:, token]).any()


def test_a_sliding_layer_does_not_look_beyond_its_window():
    ours, x = small_attention(SLIDING), activations(100)
    changed = attend(ours, x.at[:, 30].add(1.0)) != attend(ours, x)
    seen = np.asarray(changed.any(axis=(0, 2)))
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(30, 30 + 9))


@pytest.mark.parametrize("kind", [HCA, CSA])
def test_compressed_layers_see_beyond_the_window(kind):
    ours, x = small_attention(kind), activations(40)
    changed = attend(ours, x.at[:, 3].add(1.0)) != attend(ours, x)
    seen = np.asarray(changed.any(axis=(0, 2)))
    assert seen[3 + T.sliding_window :].any() and not seen[:3].any()
    if kind == HCA:  # every query after the window's last token sees its entry
        assert seen[15:].all() and not seen[12:15].any()


@pytest.mark.exhaustive  # as those of whole layers
@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_does_not_depend_on_its_neighbours(kind):
    ours, x = small_attention(kind), activations(70, batch=3)
    before = attend(ours, x)
    after = attend(ours, x.at[1].multiply(-2.0))
    np.testing.assert_array_equal(after[::2], before[::2])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sink", [-80.0, 80.0])
def test_extreme_sinks_stay_finite(kind, sink):
    ours, x = small_attention(kind), activations(41)
    ours = eqx.tree_at(lambda m: m.sinks, ours, jnp.full(6, sink))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradients(attention, x):
        def loss(attention, x):
            return jnp.sum(jnp.sin(attention(x, positions(x))))

        return jax.value_and_grad(loss, argnums=(0, 1))(attention, x)

    out = gradients(ours, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_keeps_the_dtype_and_float32_parts(kind):
    ours = small_attention(kind, dtype=jnp.bfloat16)
    assert ours.sinks.dtype == ours.query_norm.weight.dtype == jnp.float32
    assert ours.query_up.dtype == ours.output_down.weight.dtype == jnp.bfloat16
    x = activations(41).astype(jnp.bfloat16)
    out = attend(ours, x)
    assert out.dtype == jnp.bfloat16
    if kind == CSA:  # which entries it selects may differ
        assert jnp.isfinite(out.astype(jnp.float32)).all()
        return
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), ours)
    expected = attend(wide, x.astype(jnp.float32))
    assert relative(out.astype(jnp.float32), expected) < 2e-2


def test_documents_of_queries_alone_are_refused():
    ours, x = small_attention(HCA), activations(40)
    entries, at = ours.compressor(x), positions(x)
    with pytest.raises(ValueError, match="only the queries have segment_ids"):
        visible(entries, at, segment_ids=at)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(num_groups=4), r"num_groups=4\): must be a divisor of num_heads=6"),
        (dict(window=0), r"window=0\): must be an integer, at least 1"),
        (dict(rope=RotaryEmbedding(10)), "rotates 10 channels and head_dim is 8"),
        (dict(compressor=7), "compressor's head_dim is 7, it must be head_dim=8"),
        (dict(indexer=(3, 5)), "an indexer selects entries: give a compressor"),
        (dict(compressor=8, indexer=(2, 5)), "are 2 and 5; they must be.* 3 and 5"),
        (dict(compressor=8, indexer=(3, 4)), "are 3 and 4; they must be.* 3 and 5"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(changes, match):
    key, rope = jax.random.key(0), RotaryEmbedding(4)
    if "compressor" in changes:
        changes["compressor"] = Compressor(
            7, changes["compressor"], 3, rope=rope, key=key
        )
    if "indexer" in changes:
        ratio, q_rank = changes["indexer"]
        own = Compressor(7, 6, ratio, overlap=True, rope=rope, key=key)
        changes["indexer"] = Indexer(7, q_rank, 2, 4, compressor=own, key=key)
    sizes = dict(q_rank=5, num_groups=3, out_per_group=4, window=9, rope=rope, key=key)
    with pytest.raises(ValueError, match=match):
        Attention(7, 6, 8, **sizes | changes)


REFUSED = (ValueError, jaxtyping.TypeCheckError)  # the latter under the type checker


def test_what_does_not_fit_attention_is_refused():
    ours, x = small_attention(SLIDING), activations(5)
    at = positions(x)
    for args, text in [
        ((x[..., :59], at), r"\(batch, seq, dim\), where dim is 60"),
        ((x[0], at), r"\(batch, seq, dim\)|Array"),
        ((x.astype(jnp.int32), at), "x of dtype int32, its weights are float32|Array"),
        ((x.astype(jnp.bfloat16), at), "x of dtype bfloat16, its weights are float32"),
        ((x, at[:1]), r"positions of shape \(1, 5\).*of shape \(2, 5\)|Array"),
        ((x, at[:, :1]), r"positions of shape \(2, 1\).*of shape \(2, 5\)|Array"),
        ((x, at[0]), r"positions of shape \(5,\).*of shape \(2, 5\)|Array"),
        ((x, at > 0), "dtype bool: they must be integers|Array"),
    ]:
        with pytest.raises(REFUSED, match=text):
            ours(*args)


def test_positions_that_do_not_start_at_0_are_refused():
    ours, x = small_attention(SLIDING), activations(5)
    with pytest.raises(ValueError, match=r"position 3 at \[0, 0\].*give 0, 1, 2"):
        ours(x, positions(x) + 3)


def test_the_cache_of_another_kind_is_refused():
    sliding, csa = small_attention(SLIDING), small_attention(CSA)
    lengths = jnp.full(2, 5)
    for ours, other, has in ((csa, sliding, "attention"), (sliding, csa, "cache")):
        cache = other.init_cache(2, 16, jnp.float32)
        with pytest.raises(ValueError, match=f"the {has} has a part for the compress"):
            ours.extend(activations(5), cache, jnp.zeros(2, int), lengths)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_attention_to_nothing_is_refused(kind, batch, length):
    with pytest.raises(ValueError, match="batch and seq must be at least 1"):
        attend(small_attention(kind), activations(length, batch))


def temporaries(kind, seq, backward):
    """Bytes that 64 heads of 64 take, compiled; nothing is run."""
    config = tiny_config(
        hidden_size=256,
        num_attention_heads=64,
        head_dim=64,
        q_lora_rank=128,
        o_groups=8,
        o_lora_rank=32,
        sliding_window=128,
        index_topk=128,
    )
    make = functools.partial(make_attention, config, kind, RATIOS[kind])
    attention = eqx.filter_eval_shape(lambda key: make(key=key), jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, seq, 256), jnp.float32)

    def run(attention, x):
        return jnp.sum(attention(x, positions(x)))

    run = jax.grad(run, argnums=(0, 1)) if backward else run
    compiled = jax.jit(run).lower(attention, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_memory_is_linear_in_the_sequence(kind, backward):
    # 64 heads x 4,096 x 4,096 in float32 alone would be 4.3 GB, with a quarter of the
    # keys 1.1 GB.
    short, long = (temporaries(kind, seq, backward) for seq in (4096, 16384))
    assert short <= 600e6
    assert long <= 4.5 * short
