"""Packing: documents of any lengths in rows of one length.

A row has several documents one after another, and padding at its end:

    tokens         t0 t1 t2 t3 t4 u0 u1 u2  0  0
    segment_ids     0  0  0  0  0  1  1  1 -1 -1
    mask            0  0  1  1  1  1  1  1  0  0     what may be a target

These are the segment ids and the mask of `next_token_loss`, for which the first token
of a document is never a target.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_flag,
    validate_int,
)
from dsv4_eqx.training.data.encode import Document

_CALL: Final = "pack_documents"
_PADDING: Final = -1
_MOST_ID: Final = 2**31 - 1


class PackedRow(NamedTuple):
    """A row of documents."""

    tokens: Int32[np.ndarray, " seq"]
    segment_ids: Int32[np.ndarray, " seq"]
    mask: Bool[np.ndarray, " seq"]


@dataclasses.dataclass(frozen=True)
class PackingStatistics:
    """What packing made of the documents; `str` says it in a line."""

    documents: int
    split: int  # longer than a row: in several pieces, which do not see each other
    left_out: int  # pieces without a target
    left_out_tokens: int
    tokens: int  # in the rows
    targets: int
    rows: int
    length: int

    @property
    def padding_share(self) -> float:
        """Which share of the rows is padding."""
        return 1 - self.tokens / (self.rows * self.length)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.split:,} of them longer than a row "
            f"and split, in {self.rows:,} rows of {self.length:,}: {self.tokens:,} "
            f"tokens, {self.targets:,} targets, {self.padding_share:.1%} padding; "
            f"{self.left_out:,} pieces ({self.left_out_tokens:,} tokens) left out for "
            "having no target"
        )


class PackedRows(Sequence):
    """Rows of documents, made when they are asked for; from `pack_documents`."""

    statistics: PackingStatistics

    def __init__(
        self,
        tokens: Int32[np.ndarray, " total"],
        is_target: Bool[np.ndarray, " total"],
        pieces: Int[np.ndarray, "pieces 2"],
        row_ends: Int[np.ndarray, " rows"],
        statistics: PackingStatistics,
    ):
        """All documents in one array; begin and end of each piece, row by row."""
        self.tokens, self.is_target = tokens, is_target
        self.pieces, self.row_ends = pieces, row_ends
        self.statistics = statistics

    def __len__(self) -> int:
        return len(self.row_ends)

    def __getitem__(self, index: Any) -> Any:
        """The row of this number, counted from the end below 0; IndexError beyond."""
        index = validate_int("PackedRows", "index", index, least=-len(self))
        index = range(len(self))[index]
        row = self.padding()
        first = 0 if index == 0 else self.row_ends[index - 1]
        place = 0
        for i, (begin, end) in enumerate(self.pieces[first : self.row_ends[index]]):
            at = slice(place, place := place + end - begin)
            row.tokens[at] = self.tokens[begin:end]
            row.segment_ids[at] = i
            row.mask[at] = self.is_target[begin:end]
        return row

    def padding(self) -> PackedRow:
        """A row of padding alone."""
        length = self.statistics.length
        tokens, ids = np.zeros(length, np.int32), np.full(length, _PADDING, np.int32)
        return PackedRow(tokens, ids, np.zeros(length, bool))


def pack_documents(
    documents: Iterable[tuple[Any, Any]], length: int, *, best_fit: bool = True
) -> PackedRows:
    """Rows of `length` tokens that hold the documents.

    A document longer than a row becomes several pieces, of which each is a document of
    its own to the model. Of a piece without a target nothing would be learned; it is
    left out. `print(rows.statistics)` says how many there were, and how much of the
    rows is padding.

    **Arguments:**

    - `documents`: from `read_documents`, or your own pairs of token ids and mask.
    - `length`: tokens of a row. Over a mesh, a multiple of `context`.
    - `best_fit`: puts each piece, the longest first, where it leaves the least room.
        If false, rows are filled in the order of the documents.

    **Returns:** a sequence of `PackedRow`, for `PackedBatches`.

    **Raises:** ValueError if no document has a target, one is no pair of integers and
    as many booleans, or another argument is not as described.
    """
    length = validate_int(_CALL, "length", length, least=2)
    validate_flag(_CALL, "best_fit", best_fit)
    documents = [_validated(i, document) for i, document in enumerate(documents)]
    if not documents:
        raise invalid_argument(_CALL, "documents", documents, "at least one")
    tokens = np.concatenate([document.tokens for document in documents])
    is_target = np.concatenate([document.is_target for document in documents])
    all_pieces = _pieces([len(document.tokens) for document in documents], length)
    counted = _has_target(is_target, all_pieces)
    pieces = all_pieces[counted]
    if len(pieces) == 0:
        raise ValueError(
            f"{_CALL}: none of the {len(documents)} documents has a target that is not "
            "its first token, so there is nothing to learn."
        )
    sizes = pieces[:, 1] - pieces[:, 0]
    rows = (_best_fit if best_fit else _in_order)(sizes.tolist(), length)
    pieces = pieces[np.concatenate(rows)]
    split = sum(len(document.tokens) > length for document in documents)
    statistics = PackingStatistics(
        documents=len(documents),
        split=split,
        left_out=int((~counted).sum()),
        left_out_tokens=len(tokens) - int(sizes.sum()),
        tokens=int(sizes.sum()),
        targets=sum(int(is_target[a + 1 : b].sum()) for a, b in pieces),
        rows=len(rows),
        length=length,
    )
    ends = np.cumsum([len(row) for row in rows])
    return PackedRows(tokens, is_target, pieces, ends, statistics)


def _validated(index: int, document: Any) -> Document:
    """A document as arrays; ValueError if it is none."""
    is_pair = isinstance(document, tuple) and len(document) == 2
    tokens, is_target = map(np.asarray, document) if is_pair else (np.empty(0),) * 2
    fits = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
    if not fits or is_target.shape != tokens.shape or is_target.dtype != bool:
        raise ValueError(
            f"{_CALL}: documents[{index}] must be a pair of token ids and a mask, two "
            "arrays of one dimension and equal length, integers and booleans."
        )
    if len(tokens) > 0 and not 0 <= tokens.min() <= tokens.max() <= _MOST_ID:
        raise ValueError(
            f"{_CALL}: documents[{index}] has token ids from {tokens.min()} to "
            f"{tokens.max()}: they must be at least 0, and int32 must hold them."
        )
    return Document(tokens.astype(np.int32), is_target)


def _pieces(sizes: list[int], length: int) -> Int[np.ndarray, "pieces 2"]:
    """Begin and end of each piece in the array of all documents."""
    found, begin = [], 0
    for size in sizes:
        end = begin + size
        found += [(at, min(at + length, end)) for at in range(begin, end, length)]
        begin = end
    return np.array(found, np.int64).reshape(-1, 2)


def _has_target(
    is_target: Bool[np.ndarray, " total"], pieces: Int[np.ndarray, "pieces 2"]
) -> Bool[np.ndarray, " pieces"]:
    """Whether a piece has a target, which its first token never is."""
    return np.array([is_target[a + 1 : b].any() for a, b in pieces], bool)


def _in_order(sizes: list[int], length: int) -> list[list[int]]:
    """The numbers of the pieces in each row, a new row where one does not fit."""
    rows, room = [], 0
    for i, size in enumerate(sizes):
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(i)
        room -= size
    return rows


def _best_fit(sizes: list[int], length: int) -> list[list[int]]:
    """The numbers of the pieces in each row: longest first, where they fit best."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # which there are, sorted
    with_room: dict[int, list[int]] = {}  # rows by how many tokens still fit
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, sizes[i])
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(i)
        room -= sizes[i]
        same = with_room.setdefault(room, [])
        if not same:
            bisect.insort(rooms, room)
        same.append(row)
    return rows
