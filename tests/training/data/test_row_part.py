"""Which rows a process gives, by where its devices are in the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv4_eqx.training.data.batches import PackedBatch
from dsv4_eqx.training.data.row_part import _part, row_part, rows_over
from tests.sharded import make_mesh


@pytest.mark.parametrize(
    "processes, parts",
    [
        ([[0, 0], [1, 1], [2, 2], [3, 3]], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([[0, 1], [0, 1]], [(0, 1), (0, 1)]),
        ([[1], [0]], [(1, 2), (0, 2)]),
    ],
)
def test_processes_with_the_same_rows_give_the_same_part(processes, parts):
    assert [_part(np.array(processes), own) for own in range(len(parts))] == parts


@pytest.mark.parametrize("processes", [[[0, 1], [1, 2]], [[0], [0], [1]]])
def test_rows_that_are_shared_in_part_are_refused(processes):
    with pytest.raises(ValueError, match="must have the same or none in common"):
        _part(np.array(processes), 0)


def test_a_batch_lies_over_the_rows_of_the_mesh():
    mesh = make_mesh(data=2, expert=3)
    assert row_part(mesh) == (0, 1)
    rows = np.arange(12 * 5, dtype=np.int32).reshape(12, 5)
    batch = PackedBatch(rows, rows - 3, rows % 2 == 0)
    for placed, given in zip(rows_over(batch, mesh), batch):
        assert placed.sharding.spec == P(("data", "expert"))
        np.testing.assert_array_equal(placed, given)
        assert placed.dtype == jax.dtypes.canonicalize_dtype(given.dtype)
    with pytest.raises(ValueError, match="12 rows, and data x expert = 8 must divide"):
        rows_over(batch, make_mesh(data=4, expert=2))
