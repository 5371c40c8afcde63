"""The real rates, window and index_topk at tiny widths, and depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv4_eqx import Config
from dsv4_eqx.config.kinds import KIND_OF_RATIO
from dsv4_eqx.model.model import abstract_model
from tests.compiling import OPTIMIZED
from tests.models import M, forward, forward_once, pair, random_tokens, streams_by_layer
from tests.tiers import tiers
from tests.tiny import tiny_config

LENGTH = 2304
# Around one CSA entry, the window and one HCA entry, and as many CSA entries as are
# selected.
BOUNDARIES = (1, 4, 127, 128, 129, 257, 2048, 2051, 2052)
MORE = (2, 3, 5, 7, 8, 9, 131, 132, 133, 255, 256, 511, 512, 513, 2047, 2049)
SHORTER = (1, 129, 2051, 2052)  # a program for each
SEEDS = (0, 1, 2, 3, 5)  # without close choices, as the first test checks


by_layer = jax.jit(streams_by_layer)
extend = jax.jit(
    lambda model, *args: model.extend(*args),
    donate_argnums=2,
    compiler_options=OPTIMIZED,
)


@functools.cache
def tokens(seed=0):
    return random_tokens(seed, length=LENGTH, batch=1)


@functools.cache
def whole(seed=0):
    return np.asarray(forward(pair(seed, M)[1], tokens(seed)))


@pytest.mark.parametrize("seed", tiers(SEEDS, in_ci=[0, 1]))
def test_long_logits_and_layers_equal_those_of_transformers(seed):
    reference, model = pair(seed, M)
    gaps, layers = [], []
    handles = [
        layer.register_forward_hook(lambda module, inputs, out: layers.append(out))
        for layer in reference.model.layers
    ]
    handles += [
        layer.self_attn.compressor.indexer.scorer.register_forward_hook(
            lambda module, inputs, scores: gaps.append(selection_gap(scores[0]))
        )
        for layer in reference.model.layers[2:]
    ]
    with torch.no_grad():
        expected = reference(torch.tensor(tokens(seed)).long()).logits.numpy()
    for handle in handles:
        handle.remove()
    # Otherwise noise decides what is attended to, and equality says nothing.
    assert len(gaps) == 2 and min(gaps) > 2e-6, gaps
    np.testing.assert_allclose(whole(seed), expected, rtol=0, atol=5e-5)
    for found, wanted in zip(by_layer(model, tokens(seed)), layers, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=2e-5)


def selection_gap(scores):
    """Smallest difference between the last selected score and the next one."""
    smallest = np.inf
    for query in range(4 * M.index_topk + 3, LENGTH):
        best = scores[query, : (query + 1) // 4].sort(descending=True).values
        gap = best[M.index_topk - 1] - best[M.index_topk]
        smallest = min(smallest, float(gap))
    return smallest


@pytest.mark.parametrize("length", tiers(BOUNDARIES + MORE, in_ci=SHORTER))
def test_truncating_long_tokens_truncates_the_logits(length):
    part = np.asarray(forward_once(pair(0, M)[1], tokens()[:, :length]))
    np.testing.assert_allclose(part, whole()[:, :length], rtol=0, atol=5e-5)


@pytest.mark.parametrize("changed", tiers(BOUNDARIES + MORE, in_ci=BOUNDARIES))
def test_long_logits_before_a_changed_token_keep_every_bit(changed):
    other = tokens().copy()
    other[:, changed] = (other[:, changed] + 1) % M.vocab_size
    after = np.asarray(forward(pair(0, M)[1], other))
    np.testing.assert_array_equal(after[:, :changed], whole()[:, :changed])
    assert (after[:, changed] != whole()[:, changed]).any()


def parts_of(length, most):
    """A prompt of this length, two tokens alone and the rest, by at most some."""
    sizes = length, 1, 1, LENGTH - length - 2
    return [min(most, size - i) for size in sizes for i in range(0, size, most)]


@pytest.mark.slow
def test_long_prompts_and_what_follows_give_what_the_whole_gives():
    """One row for each length of prompt: the rows are never in phase."""
    model, most, batch = pair(0, M)[1], 288, len(BOUNDARIES)
    parts = [parts_of(length, most) for length in BOUNDARIES]
    assert {len(part) for part in parts} == {11}
    cache, done = model.init_cache(batch, LENGTH), np.zeros(batch, int)
    hidden = np.full((batch, LENGTH, M.hidden_size), np.nan, np.float32)
    for counts in np.array(parts).T:
        padded = np.full((batch, most), -1, np.int32)
        for row, (first, count) in enumerate(zip(done, counts)):
            padded[row, :count] = tokens()[0, first : first + count]
        out, cache = extend(model, padded, cache, counts.astype(np.int32))
        for row, (first, count) in enumerate(zip(done, counts)):
            hidden[row, first : first + count] = out[row, :count]
        done += counts
    np.testing.assert_array_equal(done, LENGTH)
    logits = np.asarray(jax.jit(lambda model, x: model.unembed(x))(model, hidden))
    expected = np.broadcast_to(whole(), logits.shape)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)


def pro_program(num_layers):
    """The lowered program of Pro's schedule, cut to this many layers."""
    ratios = Config.pro().compress_ratios[:num_layers]
    config = tiny_config(
        num_hidden_layers=num_layers,
        layer_types=tuple(KIND_OF_RATIO[ratio] for ratio in ratios),
        compress_ratios=ratios,
        mlp_layer_types=Config.pro().mlp_layer_types[:num_layers],
    )
    model = abstract_model(config, jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    return jax.jit(lambda model, ids: model(ids)).lower(model, ids).as_text()


@pytest.mark.slow
def test_programs_do_not_grow_with_depth():
    short, deep = pro_program(9), pro_program(61)
    assert deep.count("stablehlo.while") == short.count("stablehlo.while") > 0
    assert len(deep.splitlines()) <= 1.5 * len(short.splitlines())
