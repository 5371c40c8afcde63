"""What a model shows of its layers, against the formulas."""

import functools
import pathlib
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import from_pretrained, layer_mask, use_kernels
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.numerics.quantized_weight import dequantize
from tests.models import QUICKLY, quick_jit, random_model, random_tokens, relative
from tests.tiers import tiers
from tests.tiny import tiny_config

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"
pytestmark = pytest.mark.slow
# A layer that hashes, and a unit that repeats.
CONFIG = tiny_config(
    num_hidden_layers=5,
    layer_types=(SLIDING, HCA, CSA, HCA, CSA),
    compress_ratios=(0, 16, 4, 16, 4),
    mlp_layer_types=(HASH_MOE,) + (TOPK_MOE,) * 4,
    num_nextn_predict_layers=0,
)
LENGTH = 41  # ten CSA entries for an index_topk of 5
observe = quick_jit(lambda model, *args: model.observe(*args))
hidden = quick_jit(lambda model, *args: model.hidden(*args))


@functools.cache
def model():
    return random_model(CONFIG, seed=4)


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def wide(x):
    return np.asarray(x, "f8")


def expected_routing(router, x, tokens):
    """Experts, and the scores of all, by the formula in float64."""
    scores = np.sqrt(np.log1p(np.exp(wide(x) @ wide(router.weight).T)))
    if hasattr(router, "table"):
        return np.asarray(router.table)[tokens], scores
    order = np.argsort(-(scores + wide(router.bias)), axis=-1, kind="stable")
    return order[..., : CONFIG.num_experts_per_tok], scores


def expected_selection(indexer, x, latent):
    """Of each query the windows and their scores, in the windows' order; eq. 16."""
    positions = np.arange(x.shape[1])
    keys = indexer.compressor(x).values
    queries = jnp.einsum("bsr,hcr->bshc", latent, indexer.query_up)
    queries = indexer.compressor.rope(queries, jnp.asarray(positions)[:, None])
    products = np.einsum("bshc,bec->bshe", wide(queries), wide(keys))
    heads, dim = queries.shape[2:]
    weights = wide(x) @ wide(indexer.head_weights).T / np.sqrt(dim * heads)
    scores = np.einsum("bshe,bsh->bse", np.maximum(products, 0), weights)
    ends = np.arange(keys.shape[1]) * 4 + 3
    scores = np.where(ends <= positions[:, None], scores, -np.inf)
    windows = np.argsort(-scores, axis=-1, kind="stable")[..., : CONFIG.index_topk]
    found = np.take_along_axis(scores, windows, axis=-1)
    windows = np.where(found > -np.inf, windows, 99)  # last
    order = np.argsort(windows, axis=-1, kind="stable")
    windows, found = (np.take_along_axis(y, order, axis=-1) for y in (windows, found))
    return np.where(windows == 99, -1, windows), found


def expected_log_sum_exp(attention, x, selected):
    """Over the window, the entries that are seen, and the sink."""
    positions = np.arange(x.shape[1])
    in_rows = jnp.broadcast_to(positions, x.shape[:2])
    queries = attention.project_queries(attention.project_latent(x), in_rows)
    queries, keys = wide(queries), wide(attention.project_keys(x, in_rows))
    distance = positions[:, None] - positions
    sees = np.broadcast_to(
        (distance >= 0) & (distance < CONFIG.sliding_window),
        (len(x), len(positions), len(positions)),
    )
    if attention.compressor is not None:
        entries = wide(attention.compressor(x).values)
        ratio, every = attention.compressor.ratio, np.arange(entries.shape[1])
        is_complete = every * ratio + ratio - 1 <= positions[:, None]
        if selected is not None:
            is_complete = is_complete & (selected[..., None] == every).any(axis=2)
        more = np.broadcast_to(is_complete, (len(x), *is_complete.shape[-2:]))
        keys = np.concatenate([keys, entries], axis=1)
        sees = np.concatenate([sees, more], axis=2)
    logits = np.einsum("bshc,bkc->bshk", queries, keys) / np.sqrt(keys.shape[2])
    total = np.where(sees[:, :, None], np.exp(logits), 0).sum(axis=-1)
    return np.log(total + np.exp(wide(attention.sinks)))


@pytest.mark.parametrize("length", tiers([3, 13, LENGTH], in_ci=[13, LENGTH]))
def test_values_equal_the_formulas(length):
    tokens = random_tokens(1, length, config=CONFIG)
    out, values = observe(model(), tokens)
    assert relative(out, hidden(model(), tokens)) <= 1e-6
    assert len(values) == CONFIG.num_hidden_layers
    streams = model().embed(jnp.asarray(tokens))
    for block, value in zip(map(model().layers.__getitem__, range(5)), values):
        x, mixing = block.attention_connection.read(streams)
        x = block.attention_norm(x)
        selected, shown = None, value.attention.indexer
        assert (shown is None) == (block.attention.indexer is None)
        if shown is not None:
            latent = block.attention.project_latent(x)
            selected, scores = expected_selection(block.attention.indexer, x, latent)
            np.testing.assert_array_equal(shown.windows, selected)
            np.testing.assert_allclose(shown.scores, scores, 1e-4, 1e-5)
        log_sum = expected_log_sum_exp(block.attention, x, selected)
        np.testing.assert_allclose(value.attention.log_sum_exp, log_sum, 1e-5, 1e-5)
        x = block.attention(x, positions_of(tokens))
        streams = block.attention_connection.write(streams, x, mixing)
        x, mixing = block.moe_connection.read(streams)
        x = block.moe_norm(x)
        experts, scores = expected_routing(block.moe.router, x, tokens)
        np.testing.assert_allclose(value.routing.scores, scores, 1e-5, 1e-5)
        np.testing.assert_array_equal(value.routing.experts, experts)
        np.testing.assert_allclose(value.routing.weights.sum(axis=-1), 1.5, 1e-5)
        counts = np.bincount(experts.ravel(), minlength=CONFIG.n_routed_experts)
        np.testing.assert_array_equal(value.routing.counts, counts)
        streams = block.moe_connection.write(streams, block.moe(x, tokens), mixing)
        assert relative(value.streams, streams) <= 1e-5


def test_values_are_those_of_each_document():
    lengths = 17, 3, 21
    tokens = random_tokens(2, sum(lengths), batch=1, config=CONFIG)
    segment_ids = np.repeat([5, 0, 7], lengths)[None]
    _, together = observe(model(), tokens, segment_ids)
    start = 0
    for length in lengths:
        end = start + length
        _, alone = observe(model(), tokens[:, start:end])
        for one, all_documents in zip(alone, together):
            if one.attention.indexer is not None:
                shown = all_documents.attention.indexer
                windows = one.attention.indexer.windows
                own = np.asarray(shown.windows[:, start:end])
                np.testing.assert_array_equal(own[..., : windows.shape[2]], windows)
                assert (own[..., windows.shape[2] :] == -1).all()
            for get in (
                lambda value: value.streams,
                lambda value: value.attention.log_sum_exp,
                lambda value: value.routing.scores,
            ):
                assert relative(get(all_documents)[:, start:end], get(one)) <= 1e-5
        start = end


@pytest.mark.parametrize("remat", tiers([False, True], in_ci=[True]))
def test_values_come_out_of_gradients_and_have_gradients(remat):
    tokens = random_tokens(3, LENGTH, config=CONFIG)
    trained, rest = eqx.partition(model(), layer_mask(model(), [2, 4]))

    def loss(trained, weight):
        out, values = eqx.combine(trained, rest).observe(tokens, remat=remat)
        log_sums = sum(jnp.mean(x.attention.log_sum_exp**2) for x in values)
        scores = sum(jnp.mean(x.routing.scores**2) for x in values)
        return jnp.sum(out) + weight * (log_sums + scores), values

    step = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, values), plain = step(trained, 0.0)
    (total, _), with_values = step(trained, 1.0)
    _, expected = observe(model(), tokens)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), values, expected
    )
    # Along the gradient, the loss changes as the gradient says.
    size = sum(jnp.sum(x**2) for x in jax.tree.leaves(with_values))
    moved = jax.tree.map(lambda x, g: x + 1e-2 * g / size, trained, with_values)
    back = jax.tree.map(lambda x, g: x - 1e-2 * g / size, trained, with_values)
    change = step(moved, 1.0)[0][0] - step(back, 1.0)[0][0]
    np.testing.assert_allclose(change, 2e-2, 0.02)
    differ = jax.tree.map(lambda x, y: relative(x, y) > 1e-6, plain, with_values)
    assert differ.layers.repeated[1].attention.query_up


def test_what_is_not_used_is_not_kept():
    tokens = random_tokens(4, 130, config=CONFIG)

    def compiled(call):
        lowered = jax.jit(call, compiler_options=QUICKLY).lower(model(), tokens)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    plain = compiled(lambda model, tokens: model.hidden(tokens))
    unused = compiled(lambda model, tokens: model.observe(tokens)[0])
    used = compiled(lambda model, tokens: model.observe(tokens))
    assert unused <= 1.05 * plain < used


class Doubled(eqx.Module):
    """A mixture of one's own that shows nothing."""

    def __call__(self, x, token_ids):
        return 2 * x


class Loud(Doubled):
    """One that shows the largest channel of each token."""

    def observe(self, x, token_ids):
        return 2 * x, {"largest": x.max(axis=-1)}


class Total(Doubled):
    """One that shows what is no array over tokens."""

    def observe(self, x, token_ids):
        return 2 * x, x.sum(axis=(0, 1))


class Chosen(NamedTuple):
    experts: jax.Array
    weights: jax.Array


class FirstExperts(eqx.Module):
    """A router of one's own, which gives no scores."""

    weight: jax.Array

    def __call__(self, x, token_ids):
        experts = jnp.zeros((len(x), 3), jnp.int32) + jnp.arange(3)[None]
        return Chosen(experts, jnp.ones((len(x), 3)))


def with_mixture(part):
    return eqx.tree_at(lambda m: m.layers.first[0].moe, model(), part)


def test_a_part_of_ones_own_shows_what_it_has():
    tokens = random_tokens(5, 9, config=CONFIG)
    _, values = observe(with_mixture(Doubled()), tokens)
    assert values[0].routing is None and values[0].attention is not None
    assert values[1].routing is not None
    _, values = observe(with_mixture(Loud()), tokens)
    assert values[0].routing["largest"].shape == tokens.shape
    with pytest.raises(ValueError, match=r"Total.observe shows .* \(60,\): each must"):
        with_mixture(Total()).observe(tokens)
    moe = model().layers[0].moe
    moe = eqx.tree_at(lambda m: m.router, moe, FirstExperts(moe.router.weight))
    _, values = observe(with_mixture(moe), tokens)
    assert values[0].routing.experts.shape == (*tokens.shape, 3)
    with pytest.raises(ValueError, match="counts: the router gives no scores"):
        _ = values[0].routing.counts


@pytest.mark.exhaustive
def test_values_are_seen_in_float64():
    with jax.enable_x64(True), use_kernels("reference"):
        exact = jax.tree.map(
            lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, model()
        )
        _, values = observe(exact, random_tokens(1, 29, config=CONFIG))
    _, expected = observe(model(), random_tokens(1, 29, config=CONFIG))
    assert values[2].attention.log_sum_exp.dtype == jnp.float64
    for one, other in zip(values, expected):
        np.testing.assert_allclose(
            one.attention.log_sum_exp, other.attention.log_sum_exp, 1e-5, 1e-5
        )
    shown, wanted = (x[2].attention.indexer.windows for x in (values, expected))
    np.testing.assert_array_equal(shown, wanted)


def test_values_are_seen_of_quantized_weights_and_in_bfloat16():
    tokens = jnp.asarray(random_tokens(1, 29))
    streams = np.random.default_rng(0).standard_normal((2, 29, 4, 128))
    streams = jnp.asarray(streams.astype(np.float32))

    @quick_jit
    def observe_layer(block, streams):
        return block.observe(streams, tokens, positions_of(tokens))[1]

    packed = from_pretrained(NANO, dtype="float32", keep_quantized=True).layers[4]
    expected = observe_layer(dequantize(packed), streams)
    values = observe_layer(packed, streams)
    for one, other in zip(jax.tree.leaves(values), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, 1e-5, 1e-5)
    half = from_pretrained(NANO, dtype="bfloat16", keep_quantized=True).layers[4]
    values = observe_layer(half, streams.astype(jnp.bfloat16))
    assert values.streams.dtype == jnp.bfloat16
    for name, found, wanted in (
        ("streams", values.streams, expected.streams),
        ("sums", values.attention.log_sum_exp, expected.attention.log_sum_exp),
        ("scores", values.routing.scores, expected.routing.scores),
    ):
        assert relative(found.astype(jnp.float32), wanted) <= 0.03, name
