"""Batches of rows: every row once an epoch, in any number of parts, and resumable."""

import json
import sys

import numpy as np
import pytest

import dsv4_eqx as dsv4

pytest.importorskip("grain")

LENGTH, NUM_ROWS = 7, 11


def packed(num_rows=NUM_ROWS, first=1):
    """As many rows as documents, each of its own token."""
    tokens = [np.full(LENGTH - i % 3, first + i) for i in range(num_rows)]
    documents = [(x, np.ones(len(x), bool)) for x in tokens]
    rows = dsv4.pack_documents(documents, LENGTH)
    assert len(rows) == num_rows
    return rows


def batches(batch_size=4, **options):
    return dsv4.PackedBatches(packed(), batch_size, **options)


def firsts(batch):
    """The first token of each row, 0 for padding."""
    assert {x.shape for x in batch} == {(len(batch.tokens), LENGTH)}
    assert not batch.mask[batch.tokens == 0].any()
    assert (batch.segment_ids[batch.tokens == 0] == -1).all()
    return batch.tokens[:, 0].tolist()


def assert_equal(batch, other):
    for x, y in zip(batch, other, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_row_comes_once_in_each_epoch(num_processes):
    size, seen, per_step = 4, [], []
    for process in range(num_processes):
        part = batches(
            size, num_epochs=2, process=process, num_processes=num_processes, seed=5
        )
        per_step.append([firsts(batch) for batch in part])
    assert {len(part) for part in per_step} == {6}  # 22 rows in batches of 4
    for parts in zip(*per_step):
        assert {len(part) for part in parts} == {size // num_processes}
        # Row by row, one of each process in turn.
        seen += [first for rows in zip(*parts) for first in rows]
    epochs = seen[:NUM_ROWS], seen[NUM_ROWS : 2 * NUM_ROWS]
    assert seen[2 * NUM_ROWS :] == [0, 0]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, NUM_ROWS + 1))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_a_process_without_rows_gives_padding():
    last = [
        [*map(firsts, batches(10, num_epochs=1, process=i, num_processes=5))][-1]
        for i in range(5)
    ]
    assert [first > 0 for part in last for first in part] == [True] + [False] * 9


def test_parts_together_are_the_batches_of_one_process():
    whole = batches(6, seed=3)
    parts = [batches(6, seed=3, process=i, num_processes=3) for i in range(3)]
    for _ in range(5):
        found = [firsts(next(part)) for part in parts]
        assert [x for rows in zip(*found) for x in rows] == firsts(next(whole))


def test_another_seed_is_another_order():
    first, other = ([firsts(next(batches(seed=seed)))] for seed in (0, 1))
    assert first != other and first == [firsts(next(batches(seed=0)))]


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("process", [0, 1])
def test_batches_go_on_where_they_were(steps, process):
    options = dict(process=process, num_processes=2, seed=2)
    unbroken = batches(**options)
    for _ in range(steps):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.get_state()))
    assert unbroken.epoch == 4 * steps / NUM_ROWS
    resumed = batches(**options)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for _ in range(6):
        assert_equal(next(resumed), next(unbroken))


def test_batches_go_on_in_another_size_and_number_of_parts():
    whole = batches(1, seed=2)
    rows = [firsts(next(whole))[0] for _ in range(30)]
    first = batches(6, seed=2)
    next(first), next(first)
    parts = [batches(4, seed=2, process=i, num_processes=2) for i in range(2)]
    for part in parts:
        part.set_state(first.get_state())
    found = [x for pair in zip(*map(firsts, map(next, parts))) for x in pair]
    assert found == rows[12:16]


def test_a_position_at_the_end_gives_nothing_more():
    done = batches(num_epochs=1)
    assert len([*done]) == 3
    again = batches(num_epochs=1)
    again.set_state(done.get_state())
    assert [*again] == []


@pytest.mark.parametrize(
    "other, wrong",
    [
        (lambda: batches(seed=1), r"another seed \(seed 1, here 0\)"),
        (lambda: dsv4.PackedBatches(packed(9), 4), "another number of rows"),
        (lambda: dsv4.PackedBatches(packed(first=2), 4), "another rows"),
    ],
)
def test_a_position_in_other_data_is_refused(other, wrong):
    with pytest.raises(ValueError, match=f"set_state: the state is of {wrong}"):
        batches().set_state(other().get_state())


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "state", [None, {}, {"next_row": 3}, batches().get_state() | {"next_row": -1}]
)
def test_what_is_no_position_is_refused(state):
    with pytest.raises(ValueError, match="set_state.*(from get_state|at least 0)"):
        batches().set_state(state)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "change, wrong",
    [
        (dict(rows=[1, 2]), "rows='list'"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=5), r"batch_size=5\): must be a multiple of num_processes, 2"),
        (dict(process=2), r"process=2\): must be an integer in \[0, 1\]"),
        (dict(seed=-1), "seed=-1"),
        (dict(num_epochs=0), "num_epochs=0"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change, wrong):
    fields = dict(rows=packed(), batch_size=4, num_processes=2) | change
    with pytest.raises(ValueError, match=rf"PackedBatches\({wrong}"):
        dsv4.PackedBatches(**fields)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'dsv4-eqx\[train\]'"):
        batches()
