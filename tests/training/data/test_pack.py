"""Documents packed into rows: nothing is lost, rows are as the losses take them."""

import functools

import jax
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.checkpoint.saving import one_layer
from tests.models import QUICKLY, random_model
from tests.tiers import tiers

LENGTH = 11
SIZES = [1, 2, 11, 5, 23, 8, 10, 3, 3, 12, 4, 34, 1, 6]


def documents(sizes=SIZES, seed=0):
    """Each token tells its document and its place in it."""
    generator = np.random.default_rng(seed)
    return [
        (1000 * i + np.arange(size), generator.random(size) < 0.8)
        for i, size in enumerate(sizes)
    ]


def pieces(rows):
    """The tokens and masks of the documents in the rows, and what is not in any."""
    for row in rows:
        is_token = row.segment_ids >= 0
        num_tokens = is_token.sum()
        assert is_token[:num_tokens].all()
        assert (row.segment_ids[num_tokens:] == -1).all()
        assert not row.mask[num_tokens:].any() and not row.tokens[num_tokens:].any()
        for segment in range(row.segment_ids.max() + 1):
            at = np.flatnonzero(row.segment_ids == segment)
            assert (np.diff(at) == 1).all()
            yield row.tokens[at], row.mask[at]


@pytest.mark.parametrize("best_fit", [True, False])
@pytest.mark.parametrize("seed", tiers(range(20), quick=[0]))
def test_rows_hold_every_token_once_and_in_order(best_fit, seed):
    sizes = SIZES if seed == 0 else np.random.default_rng(seed).integers(0, 40, 50)
    given = documents(sizes, seed)
    rows = dsv4.pack_documents(given, LENGTH, best_fit=best_fit)
    found = {tokens[0]: (tokens, mask) for tokens, mask in pieces(rows)}
    left_out = 0
    for tokens, mask in given:
        for at in range(0, len(tokens), LENGTH):
            piece, piece_mask = tokens[at : at + LENGTH], mask[at : at + LENGTH]
            if not piece_mask[1:].any():
                left_out += 1
                continue
            kept, kept_mask = found.pop(piece[0])
            np.testing.assert_array_equal(kept, piece)
            np.testing.assert_array_equal(kept_mask, piece_mask)
    assert not found and left_out == rows.statistics.left_out


def test_rows_in_order_and_best_fitting_ones():
    full = [(np.arange(1, n + 1), np.ones(n, bool)) for n in (5, 7, 3, 6, 4)]
    sizes = {
        best_fit: [
            np.unique(row.segment_ids[row.segment_ids >= 0], return_counts=True)[
                1
            ].tolist()
            for row in dsv4.pack_documents(full, 10, best_fit=best_fit)
        ]
        for best_fit in (True, False)
    }
    assert sizes[False] == [[5], [7, 3], [6, 4]]
    assert sizes[True] == [[7, 3], [6, 4], [5]]


def test_statistics_count_what_is_in_the_rows():
    rows = dsv4.pack_documents(documents(), LENGTH)
    statistics, stacked = rows.statistics, [*rows]
    tokens = sum((row.segment_ids >= 0).sum() for row in stacked)
    assert (statistics.documents, statistics.split) == (14, 3)
    assert (statistics.rows, statistics.length) == (len(rows), LENGTH)
    assert statistics.tokens == tokens
    assert statistics.tokens + statistics.left_out_tokens == sum(SIZES)
    assert statistics.targets == sum(mask[1:].sum() for _, mask in pieces(rows))
    share = 1 - tokens / (len(rows) * LENGTH)
    np.testing.assert_allclose(statistics.padding_share, share)
    assert f"{share:.1%} padding" in str(statistics)
    assert "14 documents, 3 of them longer than a row and split" in str(statistics)


@pytest.mark.parametrize("best_fit, most_padding", [(True, 0.01), (False, 0.4)])
def test_little_padding_where_documents_fit_best(best_fit, most_padding):
    sizes = np.random.default_rng(1).integers(2, 3000, 3000)
    many = [(np.zeros(size, np.int32), np.ones(size, bool)) for size in sizes]
    rows = dsv4.pack_documents(many, 2048, best_fit=best_fit)
    assert rows.statistics.padding_share < most_padding


@pytest.mark.slow
def test_the_loss_of_rows_is_that_of_the_documents_alone():
    config = one_layer()
    model = random_model(config)
    generator = np.random.default_rng(3)
    given = [
        (generator.integers(0, config.vocab_size, size), generator.random(size) < 0.6)
        for size in (2, 5, 9, 11, 3)
    ]
    rows = dsv4.pack_documents(given, LENGTH)
    # Each alone in a row of its own; as many rows for both, which compile once.
    alone = [rows.padding() for _ in given]
    for row, document in zip(alone, given):
        for whole, part in zip(row, (document[0], 0, document[1])):
            whole[: len(document[0])] = part
    padded = [*rows, *[rows.padding()] * (len(given) - len(rows))]
    loss = jax.jit(
        functools.partial(dsv4.next_token_loss, chunk=8), compiler_options=QUICKLY
    )
    found, parts = loss(model, *map(np.stack, zip(*padded)))
    expected, _ = loss(model, *map(np.stack, zip(*alone)))
    assert parts.num_targets == rows.statistics.targets
    np.testing.assert_allclose(found, expected, 1e-5)


def test_rows_are_a_sequence():
    rows = dsv4.pack_documents(documents(), LENGTH)
    np.testing.assert_array_equal(rows[-1].tokens, rows[len(rows) - 1].tokens)
    np.testing.assert_array_equal(rows[np.int64(1)].tokens, rows[1].tokens)
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises((IndexError, ValueError)):
            rows[index]
    assert (rows.padding().segment_ids == -1).all()


PAIR = (np.array([1, 2]), np.array([True, True]))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "change, wrong",
    [
        (dict(documents=[]), r"documents=\[\]\): must be at least one"),
        (dict(length=1), r"length=1\): must be an integer, at least 2"),
        (dict(best_fit="no"), r"best_fit='no'\): must be True or False"),
        (dict(documents=[PAIR, [1, 2]]), r"documents\[1\] must be a pair"),
        (dict(documents=[(PAIR[0], PAIR[0])]), r"documents\[0\] must be a pair"),
        (dict(documents=[(PAIR[0], PAIR[1][:1])]), r"documents\[0\] must be a pair"),
        (dict(documents=[(PAIR[0] / 2, PAIR[1])]), r"documents\[0\] must be a pair"),
        (dict(documents=[(PAIR[0] - 2, PAIR[1])]), "token ids from -1 to 0"),
        (dict(documents=[(PAIR[0] << 31, PAIR[1])]), "and int32 must hold them"),
        (dict(documents=[(PAIR[0], ~PAIR[1])]), "none of the 1 documents has a target"),
        (dict(documents=[(PAIR[0][:1], PAIR[1][:1])] * 2), "none of the 2 documents"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_refused(change, wrong):
    with pytest.raises(ValueError, match=f"pack_documents.*{wrong}"):
        dsv4.pack_documents(**(dict(documents=[PAIR], length=4) | change))
