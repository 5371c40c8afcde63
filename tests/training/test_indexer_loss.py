"""The indexers' loss against the formula, in float64."""

import dataclasses
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.attention.divergence import divergence, head_sums
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from dsv4_eqx.kernels.attend import attend
from dsv4_eqx.kernels.entries import Entries
from dsv4_eqx.kernels.form import FORMS
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from tests.models import (
    DIVISIBLE,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)
from tests.sharded import assert_equal_gradients, make_mesh
from tests.tiers import tiers

RATIO, WINDOW, HEADS = 4, 5, 3


def normal(seed, *shape):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32))


def wide(x):
    return np.asarray(x, "f8")


def masked_softmax(x, seen):
    """Over the last dimension; zeros where nothing is seen."""
    x = np.exp(np.where(seen, x, -np.inf))
    return x / np.maximum(x.sum(axis=-1, keepdims=True), 1e-300)


def teacher(queries, window_keys, sinks, values, chosen, *, sees_window=True):
    """T by the formula; without the window and the sink if they are not seen."""
    queries, window_keys, values = map(wide, (queries, window_keys, values))
    scale, seq = queries.shape[-1] ** -0.5, queries.shape[1]
    c = scale * np.einsum("bqhc,bjc->bqhj", queries, values)
    w = scale * np.einsum("bqhc,bkc->bqhk", queries, window_keys)
    distance = np.arange(seq)[:, None] - np.arange(seq)
    in_window = (distance >= 0) & (distance < WINDOW)
    w = np.where(in_window[None, :, None], w, -np.inf)
    sink = np.broadcast_to(wide(sinks)[:, None], (*c.shape[:3], 1))
    others = np.concatenate([w, sink], axis=3)
    p = np.exp(np.where(chosen[:, :, None], c, -np.inf))
    total = p.sum(axis=3) + (np.exp(others).sum(axis=3) if sees_window else 0)
    p = (p / np.maximum(total, 1e-300)[..., None]).sum(axis=2)
    return p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)


def expected_kl(target, scores, chosen):
    """KL(T || softmax(I)) and KL(T || uniform)."""
    index = masked_softmax(scores, chosen)
    num = chosen.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(target > 0, target * np.log(target / index), 0).sum(axis=-1)
        uniform = np.where(target > 0, target * np.log(target * num), 0).sum(axis=-1)
    return kl, uniform


def test_gradient_in_the_scores_is_softmax_minus_the_teacher():
    seq, entries = 23, 5
    queries, keys = 2 * normal(1, 1, seq, HEADS, 8), 2 * normal(2, 1, seq, 8)
    sinks, values = normal(3, HEADS), 2 * normal(4, 1, entries, 8)
    scores = 2 * normal(5, 1, seq, entries)
    positions = jnp.arange(seq)[None]
    own = Entries(values, (jnp.arange(entries) * RATIO + RATIO - 1)[None])
    chosen = own.last_positions[:, None] <= positions[..., None]

    @quick_jit
    def step(scores):
        before = jnp.pad(keys, ((0, 0), (WINDOW - 1, 0), (0, 0)))
        _, log_sum_exp = attend(queries, positions, before, sinks, own)
        sums = head_sums(queries, log_sum_exp, own)

        def loss(scores):
            return jnp.sum(divergence(sums, scores, chosen).kl)

        return jax.grad(loss)(scores)

    index = masked_softmax(wide(scores), chosen)
    target = teacher(queries, keys, sinks, values, chosen)
    np.testing.assert_allclose(step(scores), index - target, 0, 1e-6)
    # Heads that give the entries different shares make another teacher than a softmax
    # over the entries alone.
    alone = teacher(queries, keys, sinks, values, chosen, sees_window=False)
    assert np.abs(alone - target).max() > 0.05


def make_attention(topk, heads=HEADS, groups=1):
    keys = jax.random.split(jax.random.key(0), 4)
    rope = dsv4.RotaryEmbedding(4)
    options = dict(overlap=True, rope=rope, std=0.6)
    indexer = dsv4.Indexer(
        7,
        6,
        2,
        topk,
        compressor=dsv4.Compressor(7, 10, RATIO, key=keys[0], **options),
        std=0.6,
        key=keys[1],
    )
    attention = dsv4.Attention(
        7,
        heads,
        8,
        q_rank=6,
        num_groups=groups,
        out_per_group=5,
        window=WINDOW,
        rope=rope,
        compressor=dsv4.Compressor(7, 8, RATIO, key=keys[2], **options),
        indexer=indexer,
        std=0.6,
        key=keys[3],
    )
    sinks = jnp.linspace(-1, 2, heads)
    return eqx.tree_at(lambda attention: attention.sinks, attention, sinks)


def plain_scores(indexer, x, latent, positions):
    """Eq. 16 for all entries, with a gradient."""
    queries = jnp.einsum("bsr,hcr->bshc", latent, indexer.query_up)
    queries = indexer.compressor.rope(queries, positions[..., None])
    products = jnp.einsum("bshc,bec->bshe", queries, indexer.compressor(x).values)
    heads, dim = queries.shape[2:]
    weights = x @ indexer.head_weights.T / np.float32(np.sqrt(heads * dim))
    return jnp.einsum("bsh,bshe->bse", weights, jax.nn.relu(products))


# An index list, a mask, all entries; of several blocks of queries and tiles.
@pytest.mark.slow
@pytest.mark.parametrize(
    "seq, topk, tile",
    tiers(
        [(41, 2, 256), (41, 4, 256), (21, 5, 256), (93, 22, 9)],
        quick=[(41, 2, 256), (93, 22, 9)],
        in_ci=[(41, 4, 256), (21, 5, 256)],
    ),
)
def test_divergence_and_gradients_equal_the_formula(seq, topk, tile, monkeypatch):
    form = dataclasses.replace(FORMS["cpu"], entry_tile=tile)
    monkeypatch.setitem(FORMS, "cpu", form)
    attention, x = make_attention(topk), normal(1, 2, seq, 7)
    positions = jnp.broadcast_to(jnp.arange(seq), x.shape[:2])
    cotangent = normal(2, 2, seq)

    @quick_jit
    def step(attention, x):
        def loss(attention, x):
            _, values = attention.observe(x, positions)
            return jnp.vdot(values.divergence.kl, cotangent), values

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(attention, x)

    (gradients, d_x), values = step(attention, x)
    found = values.divergence
    latent = attention.project_latent(x)
    queries = attention.project_queries(latent, positions)
    keys = attention.project_keys(x, positions)
    windows = np.asarray(values.indexer.windows)
    chosen = (windows[..., None] == np.arange(seq // RATIO)).any(axis=2)
    entries = attention.compressor(x).values
    target = teacher(queries, keys, attention.sinks, entries, chosen)
    scores, pull = jax.vjp(
        lambda indexer: plain_scores(indexer, x, latent, positions), attention.indexer
    )
    kl, uniform = expected_kl(target, wide(scores), chosen)
    np.testing.assert_array_equal(found.num_entries, chosen.sum(axis=-1))
    np.testing.assert_allclose(found.kl, kl, 1e-5, 2e-6)
    np.testing.assert_allclose(found.kl_uniform, uniform, 1e-5, 2e-6)
    assert not found.kl[:, : RATIO - 1].any() and kl.max() > 0.3
    d_scores = wide(cotangent)[..., None] * (
        masked_softmax(wide(scores), chosen) - target
    )
    (expected,) = pull(jnp.asarray(d_scores, jnp.float32))
    assert_equal_gradients(gradients.indexer, expected, 1e-5)
    assert all(jnp.any(x) for x in jax.tree.leaves(expected))
    rest = eqx.tree_at(lambda attention: attention.indexer, gradients, None)
    assert not any(jnp.any(x) for x in jax.tree.leaves((rest, d_x)))


def test_no_product_of_a_long_row_is_held():
    seq, heads = 1024, 48
    attention = jax.eval_shape(lambda: make_attention(1 << 20, heads))
    x = jax.ShapeDtypeStruct((1, seq, 7), jnp.float32)

    def loss(attention, x):
        positions = jnp.arange(seq)[None]
        return jnp.sum(attention.observe(x, positions)[1].divergence.kl)

    compiled = quick_jit(jax.grad(loss)).lower(attention, x).compile()
    products = 4 * seq * heads * (seq // RATIO)
    assert compiled.memory_analysis().temp_size_in_bytes < products / 3


@pytest.mark.parametrize("topk", [2, 1 << 20])
def test_documents_have_the_divergence_that_they_have_alone(topk):
    lengths, attention = (37, 3, 37), make_attention(topk)
    x, ids = normal(1, 1, sum(lengths), 7), np.repeat([[7, 2, 5]], lengths, axis=1)
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    observe = quick_jit(lambda *args: attention.observe(*args)[1].divergence)
    together = observe(x, positions, jnp.asarray(ids))
    both = jnp.concatenate([x[:, :37], x[:, 40:]])
    alone = observe(both, jnp.broadcast_to(jnp.arange(37), (2, 37)))
    assert not together.num_entries[:, 37:40].any() and alone.kl.any()
    for found, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        assert not found[:, 37:40].any()
        found = jnp.concatenate([found[:, :37], found[:, 40:]])
        np.testing.assert_allclose(found, wanted, 1e-5, 2e-6)


def test_a_divergence_that_is_not_used_is_not_computed():
    attention, x = jax.eval_shape(lambda: make_attention(2)), normal(1, 1, 93, 7)
    positions = jnp.arange(93)[None]

    def flops(output):
        step = quick_jit(jax.grad(lambda attention: jnp.sum(output(attention))))
        return step.lower(attention).compile().cost_analysis()["flops"]

    plain = flops(lambda attention: attention(x, positions))
    unused = flops(lambda attention: attention.observe(x, positions)[0])

    def with_divergence(attention):
        out, values = attention.observe(x, positions)
        return jnp.sum(out) + jnp.sum(values.divergence.kl)

    assert abs(unused - plain) < 0.01 * plain
    assert flops(with_divergence) > 1.05 * plain


# Heads split, or tokens, or both, or both over the same devices.
SPLITS = {
    "heads": (dict(tensor=2), ()),
    "tokens": (dict(context=4), ("context",)),
    "both": (dict(context=2, tensor=2), ("context",)),
    "same": (dict(context=2, tensor=2), ("context", "tensor")),
}


@pytest.mark.parametrize(
    "split, topk",
    tiers(
        itertools.product(SPLITS, [2, 1 << 20]),
        quick=[("heads", 2), ("same", 1 << 20)],
        in_ci=[("tokens", 2), ("both", 1 << 20), ("same", 2)],
    ),
)
def test_split_heads_and_tokens_give_the_same(split, topk):
    (sizes, sequence), lengths = SPLITS[split], (29, 3, 8)
    attention = make_attention(topk, heads=4, groups=2)
    x, cotangent = normal(1, 2, 40, 7), normal(2, 2, 40)
    starts = np.repeat([[0, 29, 32]], lengths, axis=1).repeat(2, 0)
    operands = x, jnp.asarray(np.arange(40) - starts), jnp.asarray(starts)

    def gradients(observe):
        def loss(attention, *operands):
            found = observe(attention, *operands)[1].divergence
            return jnp.vdot(found.kl, cotangent), found

        return quick_jit(jax.grad(loss, has_aux=True))

    expected = gradients(dsv4.Attention.observe)(attention, *operands)
    mesh = make_mesh(**sizes)
    parallel = parallelize(attention, mesh, sequence)
    specs, tokens = dsv4.partition_specs(parallel, mesh=mesh), P(None, sequence or None)
    observe = jax.shard_map(
        lambda attention, *operands: attention.observe(*operands),
        mesh=mesh,
        in_specs=(specs, tokens, tokens, tokens),
        out_specs=tokens,
    )
    found = gradients(observe)(place(parallel, specs, mesh), *operands)
    np.testing.assert_array_equal(found[1].num_entries, expected[1].num_entries)
    np.testing.assert_allclose(found[1].kl, expected[1].kl, 1e-5, 2e-6)
    np.testing.assert_allclose(found[1].kl_uniform, expected[1].kl_uniform, 1e-5, 2e-6)
    assert_equal_gradients(found[0], expected[0], 1e-5)
    assert jnp.any(expected[1].kl) and not jnp.any(expected[1].kl[:, 29:32])


CONFIG = small_config(
    **DIVISIBLE,
    num_hidden_layers=2,
    layer_types=(CSA, CSA),
    compress_ratios=(4, 4),
    mlp_layer_types=(TOPK_MOE, TOPK_MOE),
    num_nextn_predict_layers=0,
    hc_sinkhorn_iters=2,
)
LENGTHS = 30, 3, 48, 7  # entries 7, 0, 12 and, of padding, 1
IDS = np.repeat([[5, 2, 9, -1]], LENGTHS, axis=1).repeat(2, 0)


@functools.cache
def model():
    """Its softmaxes are far from uniform."""

    def larger(path, x):
        name = jax.tree_util.keystr(path)
        is_query = "query_up" in name or "compressor.norm" in name
        return 4 * x if is_query else x

    return jax.tree_util.tree_map_with_path(larger, random_model(CONFIG, 1))


@functools.cache
def tokens():
    return random_tokens(1, sum(LENGTHS), 2, CONFIG)


@functools.cache
def step(is_dense):
    def loss(model, tokens, ids):
        model = dsv4.attend_densely(model) if is_dense else model
        _, layers = model.observe_streams(tokens, ids, remat=True)
        shown = [layer.attention.divergence for layer in layers]
        loss, parts = dsv4.indexer_loss(layers, ids, coefficient=0.5)
        return loss, (parts, shown)

    return quick_jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))


@functools.cache
def expected(is_dense):
    return step(is_dense)(model(), tokens(), IDS)


@pytest.mark.parametrize("is_dense", tiers([False, True], quick=[False], in_ci=[True]))
def test_loss_is_the_mean_over_queries_and_trains_indexers_alone(is_dense):
    (loss, (parts, shown)), gradients = expected(is_dense)
    for i, layer in enumerate(shown):
        counts = (np.asarray(layer.num_entries) > 0) & (IDS >= 0)
        visible = np.concatenate([(np.arange(n) + 1) // 4 for n in LENGTHS])
        topk = np.inf if is_dense else CONFIG.index_topk
        np.testing.assert_array_equal(layer.num_entries[1], np.minimum(visible, topk))
        np.testing.assert_allclose(parts.kl[i], layer.kl[counts].mean(), 1e-6)
        uniform = layer.kl_uniform[counts].mean()
        np.testing.assert_allclose(parts.kl_uniform[i], uniform, 1e-6)
    np.testing.assert_allclose(parts.captured, 1 - parts.kl / parts.kl_uniform, 1e-5)
    np.testing.assert_allclose(loss, 0.5 * parts.kl.sum(), 1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(model())
    marks = dsv4.indexer_mask(model())
    for mark, gradient in zip(jax.tree.leaves(marks), jax.tree.leaves(gradients)):
        if gradient.dtype != jax.dtypes.float0:
            assert np.any(gradient) == mark


@pytest.mark.slow
def test_loss_over_a_mesh_equals_that_of_one_device():
    (loss, (parts, _)), gradients = expected(False)
    mesh = make_mesh(data=2, context=2, tensor=2)
    sharded = dsv4.shard(model(), mesh, fsdp=True)
    (found, (found_parts, _)), found_gradients = step(False)(sharded, tokens(), IDS)
    np.testing.assert_allclose(found, loss, 1e-5)
    np.testing.assert_allclose(found_parts.captured, parts.captured, 1e-4)
    assert_equal_gradients(found_gradients.model, gradients, 1e-5)


def test_rows_too_short_for_an_entry_cost_nothing():
    x = normal(1, 2, RATIO - 1, 7)
    positions = jnp.broadcast_to(jnp.arange(RATIO - 1), x.shape[:2])
    values = make_attention(2).observe(x, positions)[1]
    layer = dsv4.LayerValues(jnp.zeros((2, RATIO - 1, 4, 7)), values, None)
    loss, parts = dsv4.indexer_loss([without_indexer(), layer])
    assert loss == 0 and not any(jnp.any(x) for x in jax.tree.leaves(parts))
    assert parts.captured.shape == (1,) and not values.divergence.num_entries.any()


def without_indexer():
    values = dsv4.AttentionValues(jnp.zeros((2, 9, 4)), None)
    return dsv4.LayerValues(jnp.zeros((2, 9, 4, 60)), values, None)


def with_indexer():
    zeros = jnp.zeros((2, 9))
    shown = dsv4.IndexerDivergence(zeros, zeros, zeros.astype(jnp.int32))
    values = dsv4.AttentionValues(jnp.zeros((2, 9, 4)), None, shown)
    return dsv4.LayerValues(jnp.zeros((2, 9, 4, 60)), values, None)


@pytest.mark.parametrize(
    "layers, options, message",
    [
        ((), {}, "0 layers without an Indexer"),
        ((without_indexer(),), {}, "1 layers without an Indexer"),
        ((with_indexer(),), dict(segment_ids=IDS), r"segment_ids of shape \(2, 88\)"),
        ((with_indexer(),), dict(coefficient=-0.1), "coefficient=-0.1"),
    ],
)
def test_what_shows_no_indexer_is_refused(layers, options, message):
    with pytest.raises(ValueError, match=f"indexer_loss.*{message}"):
        dsv4.indexer_loss(layers, **options)
