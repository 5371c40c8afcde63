"""attend against a dense softmax over window, entries and sink, in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.kernels.attend import attend
from dsv4_eqx.kernels.entries import Entries, visible
from dsv4_eqx.kernels.form import FORMS, use_kernels
from tests.models import QUICKLY, relative
from tests.tiers import tiers

BATCH, HEADS, DIM, WINDOW, RATIO, TOPK = 2, 3, 5, 9, 4, 3
# Around the window's size, and around one, two and more blocks of queries.
LENGTHS = (*range(1, 11), 63, 64, 65, 127, 128, 129, 130, 200, 300)
IN_CI = (1, 3, 4, 9, 10, 64, 65, 130, 300)
KINDS = ("none", "all", "mask", "index")


def operands(seq, window=WINDOW, start=0, seed=0, sink=1.0):
    """Queries, positions, keys with what lies before them, sinks, and entries."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    positions = np.broadcast_to(np.arange(start, start + seq), (BATCH, seq))
    count = (start + seq) // RATIO
    last = np.broadcast_to(RATIO * np.arange(count) + RATIO - 1, (BATCH, count))
    return dict(
        queries=2 * normal(BATCH, seq, HEADS, DIM),
        positions=positions.astype(np.int32),
        keys=normal(BATCH, window - 1 + seq, DIM),
        sinks=sink * normal(HEADS),
        values=normal(BATCH, count, DIM),
        last=last.astype(np.int32),
    )


# Some without an entry, some with many; over blocks of queries and tiles of entries.
DOCUMENTS = (1, 3, 50, 4, 5, 64, 9, 15)


def packed_operands(seed=0):
    """The same of two rows of several documents, in different orders."""
    given = operands(sum(DOCUMENTS), seed=seed)
    room = given["last"].shape[1]
    rows = []
    for lengths in (DOCUMENTS, DOCUMENTS[::-1]):
        ends = [
            (n, i) for n, d in enumerate(lengths) for i in range(RATIO - 1, d, RATIO)
        ]
        ends += [(-1, RATIO - 1)] * (room - len(ends))
        ids = np.repeat(np.arange(len(lengths)), lengths)
        rows.append((ids, np.concatenate(list(map(np.arange, lengths))), *zip(*ends)))
    names = "segment_ids", "positions", "entry_ids", "last"
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return given | {name: np.array(rows, np.int32) for name, rows in columns}


def sees_entries(given):
    """Whether an entry ends no later than a query, in the same document."""
    seen = given["last"][:, None] <= given["positions"][..., None]
    if "segment_ids" in given:
        seen = seen & (given["entry_ids"][:, None] == given["segment_ids"][..., None])
    return seen


def selections(given, seed=1):
    """A mask of up to TOPK visible entries of each query, and their indices."""
    rng = np.random.default_rng(seed)
    seen = sees_entries(given)
    score = np.where(seen, rng.random(seen.shape), -1)
    order = np.argsort(-score, axis=-1)[..., :TOPK]
    index = np.where(np.take_along_axis(seen, order, -1), order, -1)
    short = [(0, 0), (0, 0), (0, TOPK - index.shape[-1])]
    index = np.pad(index, short, constant_values=-1)
    index = rng.permuted(index, axis=-1)  # their order must not matter
    entries = np.arange(seen.shape[-1])
    mask = (index[..., None] == entries).any(axis=-2)
    return mask, index.astype(np.int32)


def dense(xp, given, mask, has_entries, stored=lambda x: x):
    """Output and log-sum-exp, all logits in one matrix; `xp` is numpy or jax.numpy.

    `stored` changes the weights that the values are multiplied by, and the result.
    """
    positions, keys = given["positions"], given["keys"]
    seq = positions.shape[1]
    window = keys.shape[1] - seq + 1
    own = xp.arange(seq)[:, None] + window - 1 - xp.arange(keys.shape[1])[None]
    seen = ((own >= 0) & (own < window))[None] & (own[None] <= positions[..., None])
    if has_entries:
        keys = xp.concatenate([keys, given["values"]], axis=1)
        seen = xp.concatenate([seen, sees_entries(given) & mask], axis=2)
    logits = xp.einsum("bqhc,bkc->bqhk", given["queries"], keys) * DIM**-0.5
    logits = xp.where(seen[:, :, None], logits, -np.inf)
    sinks = xp.broadcast_to(given["sinks"][:, None], (*logits.shape[:3], 1))
    logits = xp.concatenate([logits, sinks], axis=-1)
    weights = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    out = xp.einsum("bqhk,bkc->bqhc", stored(weights[..., :-1]), keys) / total
    log_sum_exp = xp.log(total) + logits.max(axis=-1, keepdims=True)
    return stored(out), log_sum_exp[..., 0]


def ours(given, kind, mask, index):
    entries = Entries(given["values"], given["last"], given.get("entry_ids"))
    entries = None if kind == "none" else entries
    selection = dict(mask=mask, index=index).get(kind)
    return attend(
        *(given[name] for name in ("queries", "positions", "keys", "sinks")),
        entries,
        selection,
        given.get("segment_ids"),
    )


@functools.partial(jax.jit, compiler_options=QUICKLY)
def of_every_kind(given, mask, index):
    return {kind: ours(given, kind, mask, index)[0] for kind in KINDS}


@functools.partial(jax.jit, compiler_options=QUICKLY)
def log_sums_of_every_kind(given, mask, index):
    return {kind: ours(given, kind, mask, index)[1] for kind in KINDS}


def rounded(x):
    return np.asarray(x, jnp.bfloat16).astype("f8")


def exact(given, kind, mask, stored=lambda x: x, log_sum=False):
    wide = {
        name: value.astype("f8") if value.dtype == np.float32 else value
        for name, value in given.items()
    }
    everything = np.ones_like(mask)
    chosen = mask if kind in ("mask", "index") else everything
    return dense(np, wide, chosen, kind != "none", stored)[int(log_sum)]


@pytest.mark.parametrize("seq", tiers(LENGTHS, quick=[9, 130], in_ci=IN_CI))
def test_attend_equals_a_dense_softmax(seq):
    given = operands(seq)
    mask, index = selections(given)
    for kind, out in of_every_kind(given, mask, index).items():
        assert out.shape == (BATCH, seq, HEADS, DIM)
        np.testing.assert_allclose(out, exact(given, kind, mask), 1e-5, 1e-5)


@pytest.mark.parametrize("form", ["cpu", "gpu", "reference"])
@pytest.mark.parametrize("seq", [9, 130])
def test_log_sum_exp_equals_that_of_all_logits(seq, form):
    given = operands(seq)
    given["sinks"] = given["sinks"] + np.arange(HEADS, dtype=np.float32)
    mask, index = selections(given)
    with use_kernels(form):
        for kind, log_sum in log_sums_of_every_kind(given, mask, index).items():
            expected = exact(given, kind, mask, log_sum=True)
            np.testing.assert_allclose(log_sum, expected, 1e-6, 1e-6)


@pytest.mark.parametrize(
    "window, seq",
    tiers(
        itertools.product([1, 2, 64, 65, 66, 150], [5, 130]),
        in_ci=[(1, 5), (64, 130), (65, 130), (150, 130)],
    ),
)
def test_attend_equals_a_dense_softmax_for_windows_around_the_block(window, seq):
    given = operands(seq, window)
    mask, index = selections(given)
    for kind, out in of_every_kind(given, mask, index).items():
        np.testing.assert_allclose(out, exact(given, kind, mask), 1e-5, 1e-5)


@pytest.mark.parametrize(
    "seq, start",
    tiers([(1, 1), (1, 300), (7, 70), (100, 3)], in_ci=[(1, 300), (7, 70)]),
)
def test_attend_equals_a_dense_softmax_in_the_middle_of_a_sequence(seq, start):
    # A chunk of a prompt or one decoded token: keys before it are seen.
    given = operands(seq, start=start)
    mask, index = selections(given)
    for kind, out in of_every_kind(given, mask, index).items():
        np.testing.assert_allclose(out, exact(given, kind, mask), 1e-5, 1e-5)


@pytest.mark.parametrize("form", ["cpu", "gpu", "reference"])
def test_documents_of_a_row_attend_to_themselves_alone(form, monkeypatch):
    # Tiles of a few entries: those before a block's documents are left out.
    tiled = dataclasses.replace(FORMS[form], entry_tile=5)
    monkeypatch.setitem(FORMS, form, tiled)
    given = packed_operands()
    mask, index = selections(given)
    with use_kernels(form):
        for kind, out in of_every_kind(given, mask, index).items():
            np.testing.assert_allclose(out, exact(given, kind, mask), 1e-5, 1e-5)
        for kind in KINDS if form == "cpu" else ():
            found = with_gradients(given, kind, mask, index)
            expected = with_gradients(given, f"dense {kind}", mask, index)
            for name in expected:
                assert relative(found[name], expected[name]) <= 1e-5, (kind, name)


@pytest.mark.parametrize("sink", [-80.0, 80.0])
def test_extreme_sinks_take_nothing_or_all(sink):
    given = operands(9)
    given["sinks"] = np.full(HEADS, sink, np.float32)
    mask, index = selections(given)
    for kind, out in of_every_kind(given, mask, index).items():
        expected = exact(given, kind, mask)
        np.testing.assert_allclose(out, expected, 1e-5, 1e-5)
        assert (np.abs(expected).max() > 0.1) == (sink < 0)
        gradients = with_gradients(given, kind, mask, index)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICKLY)
def with_gradients(given, kind, mask, index):
    """Gradients of what we compute; `kind` "dense ..." takes the dense matrix."""
    floats = {k: v for k, v in given.items() if v.dtype == jnp.float32}
    shape = given["queries"].shape
    cotangent = jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)

    def total(out, log_sum_exp):
        return jnp.sum(out * cotangent) + jnp.sum(log_sum_exp * cotangent[..., 0])

    def loss(floats):
        operands = given | floats
        if not kind.startswith("dense"):
            return total(*ours(operands, kind, mask, index))
        chosen = mask if kind in ("dense mask", "dense index") else mask | True
        return total(*dense(jnp, operands, chosen, kind != "dense none"))

    return jax.grad(loss)(floats)


@pytest.mark.parametrize(
    "seq, kind",
    tiers(
        itertools.product([3, 9, 64, 65, 130], KINDS),
        in_ci=[(3, "index"), *itertools.product([9, 130], KINDS)],
    ),
)
def test_gradients_equal_those_of_a_dense_softmax(seq, kind):
    given = operands(seq)
    mask, index = selections(given)
    found = with_gradients(given, kind, mask, index)
    expected = with_gradients(given, f"dense {kind}", mask, index)
    for name in expected:
        error = np.linalg.norm(found[name] - expected[name])
        assert error <= 1e-5 * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize("seq", [9, 130])
def test_indices_and_mask_select_alike(seq):
    given = operands(seq, seed=3)
    mask, index = selections(given)
    out = of_every_kind(given, mask, index)
    np.testing.assert_allclose(out["index"], out["mask"], 1e-6, 1e-6)


def test_a_mask_never_shows_an_invisible_entry():
    given = operands(65)
    mask, index = selections(given)
    everything = of_every_kind(given, np.ones_like(mask), index)
    np.testing.assert_array_equal(everything["mask"], everything["all"])


@pytest.mark.parametrize("seq", [9, 130])
def test_what_lies_before_the_first_position_is_never_seen(seq):
    given = operands(seq)
    mask, index = selections(given)
    clean = of_every_kind(given, mask, index)
    stale = given | dict(keys=given["keys"].copy())
    stale["keys"][:, : WINDOW - 1] = 3e38
    for kind, out in of_every_kind(stale, mask, index).items():
        np.testing.assert_array_equal(out, clean[kind])
        gradients = with_gradients(stale, kind, mask, index)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert (gradients["keys"][:, : WINDOW - 1] == 0).all()


def test_entries_after_every_query_are_never_seen():
    # What a cache has not filled yet.
    given = operands(20)
    mask, index = selections(given)
    clean = of_every_kind(given, mask, index)
    widths = [(0, 0), (0, 3)]
    last = np.pad(given["last"], widths, constant_values=np.iinfo("i4").max)
    values = np.pad(given["values"], [*widths, (0, 0)], constant_values=3e38)
    stale = given | dict(values=values, last=last)
    padded = np.pad(mask, [(0, 0), *widths], constant_values=True)
    for kind, out in of_every_kind(stale, padded, index).items():
        np.testing.assert_allclose(out, clean[kind], 1e-6, 1e-6)


@pytest.mark.parametrize("seq", [9, 130])
def test_negative_positions_see_nothing_and_yield_zeros(seq):
    given = operands(seq)
    given["positions"] = given["positions"].copy()
    given["positions"][1, -3:] = -1
    mask, index = selections(given)
    for kind, out in of_every_kind(given, mask, index).items():
        np.testing.assert_array_equal(out[1, -3:], np.zeros((3, HEADS, DIM)))
        gradients = with_gradients(given, kind, mask, index)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("seq", [7, 70])
def test_bfloat16_softmax_is_float32(seq):
    given = operands(seq)
    mask, index = selections(given)
    names = ("queries", "keys", "values")
    low = given | {n: jnp.asarray(given[n]).astype(jnp.bfloat16) for n in names}
    wide = low | {n: np.asarray(low[n].astype(jnp.float32)) for n in names}
    for kind, out in of_every_kind(low, mask, index).items():
        assert out.dtype == jnp.bfloat16
        expected = exact(wide, kind, mask)
        # Weights and result are rounded to bfloat16, logits and sums are not.
        allowed = relative(exact(wide, kind, mask, rounded), expected)
        assert relative(out.astype(jnp.float32), expected) <= 1.1 * allowed


def test_visible_compares_last_positions_with_queries():
    given = operands(9)
    entries = Entries(jnp.asarray(given["values"]), jnp.asarray(given["last"]))
    seen = visible(entries, jnp.asarray(given["positions"]))
    counts = np.minimum((np.arange(9) + 1) // RATIO, 2)
    np.testing.assert_array_equal(seen.sum(axis=-1), np.tile(counts, (BATCH, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_later_keys_leave_every_bit_of_earlier_queries(kind):
    given = operands(130)
    mask, index = selections(given)
    before = of_every_kind(given, mask, index)[kind]
    changed = given | {name: given[name].copy() for name in ("keys", "values")}
    changed["keys"][:, WINDOW - 1 + 77 :] += 1
    changed["values"][:, (77 + 1) // RATIO :] += 1
    after = of_every_kind(changed, mask, index)[kind]
    np.testing.assert_array_equal(after[:, :77], before[:, :77])
    assert (after[:, 77:] != before[:, 77:]).any(axis=(2, 3)).all()
