"""Batches of packed rows through grain: shuffled, resumable, each process its own part.

All rows of all epochs are one sequence, shuffled anew each epoch. A batch is the next
`batch_size` rows of it, of which process p of n gives those at p, p + n, p + 2n, ... So
the position is one number, the same for all processes and whatever their number.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_int,
    validate_size,
)
from dsv4_eqx.training.data.pack import PackedRow, PackedRows

_CALL: Final = "PackedBatches"
_MOST_SEED: Final = 2**31 - 1
_MOST_ROWS: Final = 2**50  # nobody gets there, and floats, as in grain, are exact


class PackedBatch(NamedTuple):
    """Rows of documents, as `next_token_loss` takes them."""

    tokens: Int32[np.ndarray, "batch seq"]
    segment_ids: Int32[np.ndarray, "batch seq"]
    mask: Bool[np.ndarray, "batch seq"]


class PackedBatches(Iterator[PackedBatch]):
    """An iterator over batches of rows that can be continued where it was.

    ```
    batches = PackedBatches(pack_documents(documents, 4096), 32, seed=0)
    for batch in batches:
        loss, parts = next_token_loss(model, *batch)
    state = batches.get_state()  # for JSON, or `TrainingCheckpoints`
    ```

    Equal arguments give equal batches, on any machine. Without `num_epochs` the batches
    never end and go from one epoch into the next, so that no row is left out. With it,
    rows of padding alone, which have no target, fill the last batch.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        *,
        seed: int = 0,
        num_epochs: int | None = None,
        process: int = 0,
        num_processes: int = 1,
    ):
        """
        **Arguments:**

        - `rows`: from `pack_documents`.
        - `batch_size`: rows of a batch, of all processes together.
        - `seed`: of the order of the rows, at most 2^31 - 1.
        - `num_epochs`: how often each row comes; None for without end.
        - `process`, `num_processes`: which part of each batch this process gives, from
            0, and how many parts there are: `row_part(mesh)` over a mesh.

        **Raises:** ValueError if `num_processes` does not divide `batch_size`, or an
        argument is not as described; ImportError without grain.
        """
        if not isinstance(rows, PackedRows):
            name = type(rows).__name__
            raise invalid_argument(_CALL, "rows", name, "from pack_documents")
        self._rows = rows
        self._batch_size = validate_size(_CALL, "batch_size", batch_size)
        self._num_processes = validate_size(_CALL, "num_processes", num_processes)
        most = self._num_processes - 1
        self._process = validate_int(_CALL, "process", process, least=0, most=most)
        if self._batch_size % self._num_processes != 0:
            allowed = f"a multiple of num_processes, {num_processes}"
            raise invalid_argument(_CALL, "batch_size", batch_size, allowed)
        seed = validate_int(_CALL, "seed", seed, least=0, most=_MOST_SEED)
        self._grain: Any = _import_grain()
        self._total = None
        if num_epochs is not None:
            num_epochs = validate_size(_CALL, "num_epochs", num_epochs)
            self._total = num_epochs * len(rows)
        source = self._grain.MapDataset.source(rows)
        epochs = _MOST_ROWS // len(rows) if num_epochs is None else num_epochs
        self._sequence = source.seed(seed).shuffle().repeat(epochs)
        self._seed, self._digest = seed, _digest(rows)
        self._start(0)

    @property
    def epoch(self) -> float:
        """How often the rows have been given; 1.5 in the middle of the second time."""
        return self._next_row / len(self._rows)

    def __next__(self) -> PackedBatch:
        """The next batch: this process's part of it."""
        if self._total is not None and self._next_row >= self._total:
            raise StopIteration
        batch = next(self._batches, None)
        self._next_row += self._batch_size
        return self._stacked([]) if batch is None else batch

    def get_state(self) -> dict[str, Any]:
        """Where the data are, as JSON can hold it; the same on all processes."""
        state = dict(next_row=self._next_row, seed=self._seed)
        return state | dict(num_rows=len(self._rows), digest=self._digest)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the last batch before `get_state` gave this.

        The size of a batch and the number of processes may be others.

        **Raises:** ValueError if the state is none, or one of other rows or another
        seed, for which the position would mean other documents.
        """
        own = self.get_state()
        if not isinstance(state, Mapping) or state.keys() != own.keys():
            raise invalid_argument("set_state", "state", state, "from get_state")
        names = dict(seed="seed", num_rows="number of rows", digest="rows")
        for key, name in names.items():
            if state[key] != own[key]:
                raise ValueError(
                    f"set_state: the state is of another {name} ({key} {state[key]}, "
                    f"here {own[key]}): give the same texts, tokenizer, length and "
                    "seed, or begin anew without the state."
                )
        next_row = state["next_row"]
        self._start(validate_int("set_state", "next_row", next_row, least=0))

    def _start(self, next_row: int) -> None:
        """Lets the sequence go on at this row."""
        self._next_row = next_row
        part = self._sequence[next_row + self._process :: self._num_processes]
        if len(part) == 0:
            self._batches: Iterator[PackedBatch] = iter(())
            return
        size = self._batch_size // self._num_processes
        batches = part.batch(size, batch_fn=self._stacked)
        # The rows are in memory: threads that read ahead would gain nothing.
        options = self._grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._batches = iter(batches.to_iter_dataset(options))

    def _stacked(self, rows: Sequence[PackedRow]) -> PackedBatch:
        """Rows as a batch, with padding where the last rows of all are too few."""
        missing = self._batch_size // self._num_processes - len(rows)
        rows = [*rows, *itertools.repeat(self._rows.padding(), missing)]
        return PackedBatch(*(np.stack(part) for part in zip(*rows)))


def _digest(rows: PackedRows) -> str:
    """Tells rows of other documents apart."""
    digest = hashlib.sha256(str(rows.statistics.length).encode())
    for array in (rows.tokens, rows.is_target, rows.pieces, rows.row_ends):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _import_grain() -> Any:
    """The package grain, which only this file needs."""
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            f"{_CALL} needs grain: pip install 'dsv4-eqx[train]'"
        ) from error
    return grain
