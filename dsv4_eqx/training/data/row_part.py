"""Which rows of a batch each process gives, and the batch over the whole mesh.

Rows are split over `data` and `expert`. Processes whose devices differ in `context` or
`tensor` alone need the same rows:

    data=2, tensor=4, processes of two devices     rows of the batch
    process 0  tensor 0, 1   process 1  tensor 2, 3      part 0 of 2
    process 2  tensor 0, 1   process 3  tensor 2, 3      part 1 of 2
"""

from typing import Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from dsv4_eqx.sharding.mesh import validate_mesh
from dsv4_eqx.training.data.batches import PackedBatch

_ROW_AXES: Final = ("data", "expert")


def row_part(mesh: Mesh) -> tuple[int, int]:
    """The part of each batch that this process gives, and how many parts there are.

    `PackedBatches(rows, 32, process=part, num_processes=num_parts)`

    **Arguments:**

    - `mesh`: from `make_mesh`.

    **Raises:** ValueError if processes have rows in common and others not, as where a
    process has devices of two rows and its neighbour those of one.
    """
    validate_mesh("row_part", mesh)
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    num_rows = mesh.shape["data"] * mesh.shape["expert"]
    return _part(processes.reshape(num_rows, -1), jax.process_index())


def rows_over(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """The batch over the mesh, of which this process has given its part.

    A single process need not call it: a `ShardedModel` takes the batch as it is.

    **Arguments:**

    - `batch`: of `PackedBatches`, with this process's `row_part(mesh)`.
    - `mesh`: from `make_mesh`.

    **Raises:** ValueError if data x expert does not divide the rows of the batch.
    """
    validate_mesh("rows_over", mesh)
    sharding, (_, num_parts) = NamedSharding(mesh, P(_ROW_AXES)), row_part(mesh)
    num_rows = len(batch.tokens) * num_parts
    splits = mesh.shape["data"] * mesh.shape["expert"]
    if num_rows % splits != 0:
        raise ValueError(
            f"rows_over: the batch has {num_rows} rows, and data x expert = {splits} "
            "must divide it."
        )
    place = jax.make_array_from_process_local_data
    return PackedBatch(*(place(sharding, x, (num_rows, *x.shape[1:])) for x in batch))


def _part(processes: Int[np.ndarray, "rows others"], own: int) -> tuple[int, int]:
    """Of each device its process: which part of the rows is `own`'s, of how many."""
    rows = {
        int(process): frozenset(np.flatnonzero((processes == process).any(1)).tolist())
        for process in np.unique(processes)
    }
    parts = sorted(set(rows.values()), key=min)
    sizes = {len(part) for part in parts}
    if sum(map(len, parts)) != len(processes) or len(sizes) != 1:
        raise ValueError(
            f"row_part: processes have the rows {[sorted(x) for x in rows.values()]} "
            "of the mesh: each two must have the same or none in common. Choose data x "
            "expert so that it divides the number of processes, or is a multiple of it."
        )
    return parts.index(rows[own]), len(parts)
