"""The indexer's picks against transformers, and the rule for ties."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import Compressor, Indexer, RotaryEmbedding
from dsv4_eqx.kernels import select as module
from dsv4_eqx.kernels.entries import Entries
from dsv4_eqx.kernels.form import FORMS, use_kernels
from dsv4_eqx.kernels.select import highest, listed
from tests.captured import captured, positions
from tests.models import QUICKLY, T, pair
from tests.tiers import tiers

CSA_LAYERS = (2, 4, 5)


def picks(selection):
    """`[batch, seq]` of sets of entries, of a mask or of indices."""
    selection = np.asarray(selection)
    batch, seq, _ = selection.shape
    if selection.dtype == bool:
        rows = [set(np.flatnonzero(row)) for row in selection.reshape(batch * seq, -1)]
    else:
        rows = [set(row[row >= 0]) for row in selection.reshape(batch * seq, -1)]
    return [rows[i * seq : (i + 1) * seq] for i in range(batch)]


@functools.partial(jax.jit, compiler_options=QUICKLY)
def select(indexer, x, latent):
    return indexer(x, latent, positions(x))


# 41 tokens: a mask over the entries; 100: indices of some.
@pytest.mark.parametrize("length, dtype", [(41, np.bool_), (100, np.int32)])
@pytest.mark.parametrize("layer", CSA_LAYERS)
def test_picks_are_those_of_transformers(layer, length, dtype):
    calls = captured(0, length)
    call = calls[f"{layer}.self_attn.compressor.indexer"]
    scores = calls[f"{layer}.self_attn.compressor.indexer.scorer"].output
    assert gap(scores, T.index_topk) > 1e-6  # else noise decides, not the rule
    latent = jnp.asarray(call.rest[0].numpy())
    found = select(pair(0)[1].layers[layer].attention.indexer, call.x, latent)
    assert found.dtype == dtype
    assert picks(found) == picks(call.output)


def gap(scores, topk):
    """Smallest difference between the last selected score and the next one."""
    smallest = np.inf
    for query in range(scores.shape[1]):
        seen = min((query + 1) // 4, scores.shape[2])
        best = np.sort(scores[:, query, :seen].numpy(), axis=-1)[:, ::-1]
        if seen > topk:
            smallest = min(smallest, (best[:, topk - 1] - best[:, topk]).min())
    return smallest


def test_nothing_is_scored_while_everything_fits():
    indexer = pair(0)[1].layers[2].attention.indexer
    for seq in (1, 3, 4, 23):  # 23 // 4 entries are index_topk
        x = jnp.ones((1, seq, T.hidden_size))
        latent = jnp.ones((1, seq, T.q_lora_rank))
        assert indexer(x, latent, positions(x)) is None


def stable_highest(scores, count):
    """By sorting: score down, then index up; minus infinity is never marked."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    marked = np.zeros(scores.shape, bool)
    np.put_along_axis(marked, order, True, axis=-1)
    return marked & (scores > -np.inf)


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICKLY)
def run_highest(scores, count):
    return highest(scores, count) & (scores > -jnp.inf)


# A program for each count.
@pytest.mark.parametrize(
    "count, form",
    tiers(
        itertools.product([1, 2, 5, 8, 30, 31], ["cpu", "gpu"]),
        quick=[(count, "cpu") for count in (1, 2, 8, 30, 31)],
        in_ci=[(5, "gpu"), (31, "gpu")],
    ),
)
@pytest.mark.parametrize("kinds", [1, 2, 5, 1000])
def test_highest_marks_what_a_stable_sort_does(count, kinds, form):
    # Few kinds of values: many ties, at the threshold too.
    rng = np.random.default_rng(10 * count + kinds)
    values = rng.standard_normal(kinds).astype(np.float32)
    scores = values[rng.integers(0, kinds, (3, 40, 30))]
    scores[rng.random(scores.shape) < 0.2] = 0.0
    # Rows that see fewer entries than `count`, down to none.
    hidden = np.arange(30) >= rng.integers(0, 31, (3, 40, 1))
    scores = np.where(hidden, -np.inf, scores).astype(np.float32)
    with use_kernels(form):
        found = np.asarray(run_highest(scores, count))
    np.testing.assert_array_equal(found, stable_highest(scores, count))


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_highest_orders_extreme_and_tiny_values(form):
    top, tiny = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    row = [0.0, tiny, -tiny, top, -top, 1.0, -1.0, np.inf, -np.inf, 1 + 2**-23]
    scores = np.float32([[np.random.default_rng(s).permutation(row) for s in range(9)]])
    for count in (1, 2, 5, 9) if form == "cpu" else (5,):
        with use_kernels(form):
            found = np.asarray(run_highest(scores, count))
        np.testing.assert_array_equal(found, stable_highest(scores, count))


@pytest.mark.parametrize(
    "entries, count",
    tiers(
        itertools.product([1, 31, 32, 33, 100, 300], [1, 7, 40]),
        quick=[(1, 1), (31, 7), (32, 7), (33, 7), (32, 40), (100, 1), (300, 40)],
    ),
)
def test_listed_names_each_mark_once_in_order(entries, count):
    rng = np.random.default_rng(entries + count)
    marks = rng.random((2, 9, entries)) < rng.random((2, 9, 1))
    marks &= np.cumsum(marks, axis=-1) <= count
    found = np.asarray(jax.jit(listed, static_argnums=1)(marks, count))
    assert found.shape == (2, 9, count)
    for row, mark in zip(found.reshape(18, -1), marks.reshape(18, -1)):
        expected = np.flatnonzero(mark)
        assert row.tolist() == [*expected, *[-1] * (count - len(expected))]


def small_indexer(topk, seed=0, heads=3):
    keys = jax.random.split(jax.random.key(seed))
    rope = RotaryEmbedding(4)
    compressor = Compressor(7, 8, 3, overlap=True, rope=rope, std=0.7, key=keys[0])
    return Indexer(7, 5, heads, topk, compressor=compressor, std=0.7, key=keys[1])


def operands(seq, heads=3, seed=0):
    """Latents, head weights, positions and keys of `seq` tokens, windows of 3."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    entries = seq // 3
    last = jnp.broadcast_to(3 * jnp.arange(entries) + 2, (2, entries))
    at = jnp.broadcast_to(jnp.arange(seq), (2, seq))
    keys = Entries(normal(2, entries, 8), last)
    return normal(2, seq, 5), normal(2, seq, heads), at, keys


def exact_scores(indexer, latent, weights, at, keys):
    """Float64 scores; minus infinity where the entry is not visible."""
    queries = jnp.einsum("bsr,hcr->bshc", latent, indexer.query_up)
    queries = np.asarray(indexer.compressor.rope(queries, at[..., None]), np.float64)
    products = np.einsum("bqhc,bec->bqhe", queries, np.asarray(keys.values, "f8"))
    weights = np.asarray(weights, np.float64)
    scores = np.einsum("bqh,bqhe->bqe", weights, np.maximum(products, 0))
    seen = np.asarray(keys.last_positions)[:, None] <= np.asarray(at)[..., None]
    return np.where(seen, scores, -np.inf)


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICKLY)
def run_select(indexer, given, gather_cost):
    """`gather_cost` is traced in: 0 gives indices, much gives a mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHER_COST", gather_cost)
        return indexer.select(*given)


@pytest.mark.parametrize(
    "seq, form",
    tiers(
        itertools.product([3, 7, 30, 64, 65, 130, 200], ["cpu", "gpu"]),
        quick=[(7, "cpu"), (65, "cpu")],
        in_ci=[(3, "cpu"), (64, "cpu"), (130, "cpu"), (7, "gpu"), (130, "gpu")],
    ),
)
@pytest.mark.parametrize("gather_cost, dtype", [(0, np.int32), (10**6, np.bool_)])
def test_selection_equals_sorted_float64_scores(seq, gather_cost, dtype, form):
    indexer, given = small_indexer(topk=4), operands(seq, seed=seq)
    with use_kernels(form):
        found = run_select(indexer, given, gather_cost)
    scores = exact_scores(indexer, *given)
    assert found.dtype == dtype and found.shape[:2] == (2, seq)
    best = np.maximum(-np.sort(-scores, axis=-1), -1e30)
    if seq >= 15:  # float32 cannot order what differs by less, but for equal zeros
        gaps = best[..., 3] - best[..., 4]
        assert not ((gaps > 0) & (gaps < 2e-6)).any()
    assert picks(found) == picks(stable_highest(scores, 4))


@pytest.mark.parametrize("seed", range(3))
def test_mask_and_indices_agree_with_many_exact_ties(seed):
    # ReLU of one head: about half the scores are zero, and half of those -0.0.
    indexer, given = small_indexer(topk=4, heads=1), operands(100, heads=1, seed=seed)
    latent, weights, at, keys = given
    values = jnp.round(keys.values).at[:, 1::5].set(keys.values[:, :1])
    keys = Entries(values, keys.last_positions)
    given = latent, jnp.where(weights > 0, 1.0, -1.0), at, keys
    masked = picks(run_select(indexer, given, 10**6))
    assert picks(run_select(indexer, given, 0)) == masked
    scores = exact_scores(indexer, *given)
    assert (scores == 0).mean() > 0.2
    assert masked == picks(stable_highest(scores, 4))


@pytest.mark.parametrize("gather_cost", [0, 10**6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_equal_scores_select_the_earlier_entry(gather_cost, sign):
    # All products are negative: every score is 0.0, or -0.0 with a negative weight.
    indexer, (latent, weights, at, keys) = small_indexer(topk=4), operands(40)
    for values in (jnp.zeros_like(keys.values), jnp.ones_like(keys.values)):
        keys = Entries(values, keys.last_positions)
        zeros = latent * 0
        # The heads' weights have both signs: -0.0 and 0.0 are one score.
        signs = weights.at[..., 0].set(sign)
        found = picks(run_select(indexer, (zeros, signs, at, keys), gather_cost))
        for row in found:
            expected = [set(range(min((t + 1) // 3, 4))) for t in range(40)]
            assert row == expected


def test_no_score_is_minus_zero():
    # top_k and the search by bits would put it below 0.0.
    latent, weights, _, keys = operands(40, heads=1)
    queries = jnp.ones((2, 40, 1, 8))
    seen = jnp.ones((2, 40, 13), bool)
    weights = jnp.where(weights > 0, -1.0, -0.0)
    scores = np.asarray(jax.jit(module.score)(queries, weights, keys, seen))
    assert 0.3 < (scores == 0).mean() < 1
    assert not np.signbit(scores[scores == 0]).any()


@pytest.mark.parametrize("gather_cost", [0, 10**6])
def test_never_an_invisible_entry_nor_one_twice(gather_cost):
    indexer, given = small_indexer(topk=30), operands(130)
    found = np.asarray(run_select(indexer, given, gather_cost))
    sets = picks(found)
    for row in sets:
        for query, chosen in enumerate(row):
            # Everything visible, up to topk of it.
            assert len(chosen) == min((query + 1) // 3, 30)
            assert all(3 * entry + 2 <= query for entry in chosen)
    if found.dtype == np.int32:
        assert ((found >= 0).sum(axis=-1) == [[len(s) for s in r] for r in sets]).all()


@pytest.mark.parametrize("gather_cost", [0, 10**6])
def test_entries_over_a_tile_are_scored_alike(gather_cost, monkeypatch):
    indexer, (latent, weights, at, keys) = small_indexer(topk=4), operands(130)
    given = latent, weights, jnp.full_like(at, 129), keys  # all see the last entry
    expected = picks(run_select(indexer, given, gather_cost))
    for tile in (7, 42, 43):
        form = dataclasses.replace(FORMS["cpu"], entry_tile=tile)
        monkeypatch.setitem(FORMS, "cpu", form)
        run_select.clear_cache()
        assert picks(run_select(indexer, given, gather_cost)) == expected
    monkeypatch.undo()
    run_select.clear_cache()


def test_later_tokens_do_not_change_earlier_picks():
    indexer = small_indexer(topk=4)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 130, 7)), jnp.float32)
    latent = jnp.asarray(rng.standard_normal((2, 130, 5)), jnp.float32)
    before = picks(select(indexer, x, latent))
    after = picks(select(indexer, x.at[:, 71:].add(1), latent.at[:, 71:].add(1)))
    assert [row[:71] for row in before] == [row[:71] for row in after]
    assert before != after


def test_selecting_gives_the_indexer_no_gradient():
    attention, x = pair(0)[1].layers[2].attention, captured(0)["2.self_attn"].x

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradient(attention, x):
        return jax.grad(lambda a: jnp.sum(a(x, positions(x))))(attention)

    gradients = gradient(attention, x)
    leaves = jax.tree.leaves(gradients.indexer)
    assert len(leaves) == 6 and all((leaf == 0).all() for leaf in leaves)
    assert (gradients.compressor.value != 0).any()


def test_bfloat16_scores_are_float32():
    indexer = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small_indexer(topk=4))
    latent, weights, at, keys = operands(40)
    low = Entries(keys.values.astype(jnp.bfloat16), keys.last_positions)
    given = latent.astype(jnp.bfloat16), weights, at, low
    queries = jnp.einsum("bsr,hcr->bshc", given[0], indexer.query_up)
    queries = indexer.compressor.rope(queries, at[..., None])
    seen = jnp.ones((2, 40, 13), bool)
    scores = module.score(queries, weights, low, seen)
    assert scores.dtype == jnp.float32
    products = np.einsum(
        "bqhc,bec->bqhe", np.asarray(queries, "f8"), np.asarray(low.values, "f8")
    )
    expected = np.einsum("bqh,bqhe->bqe", weights, np.maximum(products, 0))
    np.testing.assert_allclose(scores, expected, 1e-5, 1e-5)
