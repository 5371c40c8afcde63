"""What is wrong with a checkpoint, told in one error however much it is."""

import collections
import contextlib
import heapq
import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final

_MOST_SINGLE: Final = 12  # faults that are listed one by one
_MOST_LINES: Final = 50
_MOST_KINDS: Final = 1000
_NUMBERS: Final = re.compile(r"(?<=[.-])(\d+)(?=[.-])")


class FaultyCheckpoint(ValueError):
    """A checkpoint that is not what its configuration or index says it is.

    `faults` lists everything, each in a line that begins with the name of a tensor or
    file; the message counts those that are alike.
    """

    faults: tuple[str, ...] = ()


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds the path to an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def faults_error(what: str, faults: Collection[str]) -> FaultyCheckpoint:
    """One error for all of them; `what` says of what they are."""
    count = f"{len(faults)} fault" + "s" * (len(faults) != 1)
    return listing_error(f"{what}: {count}", faults)


def listing_error(message: str, faults: Collection[str]) -> FaultyCheckpoint:
    """An error that goes on with a list."""
    error = FaultyCheckpoint(f"{message}:\n  " + "\n  ".join(summary(faults)))
    error.faults = tuple(sorted(faults))
    return error


def summary(faults: Collection[str]) -> list[str]:
    """A line for each, or for all that differ in numbers alone if there are many."""
    if len(faults) <= _MOST_SINGLE:
        return sorted(faults)
    kinds: dict[tuple[str, ...], list[list[str]]] = collections.defaultdict(list)
    for fault in faults:
        pieces = _NUMBERS.split(fault)  # words, and between them numbers
        kinds[tuple(pieces[::2])].append(pieces[1::2])
        if len(kinds) > _MOST_KINDS:  # they are not alike
            more = f"and {len(faults) - _MOST_LINES} more, in the error's `faults`"
            return [*heapq.nsmallest(_MOST_LINES, faults), more]
    lines = [_line(words, kinds[words]) for words in sorted(kinds)]
    if len(kinds) > _MOST_LINES:
        more = f"and {len(kinds) - _MOST_LINES} more kinds, in the error's `faults`"
        lines = [*lines[:_MOST_LINES], more]
    return lines


def _line(words: Sequence[str], faults: Sequence[Sequence[str]]) -> str:
    """`layers.{0..4}.w1.weight_scale is not part of the model: 5`

    `faults` has the numbers of each that stand between these words.
    """
    between = [*(_range(set(numbers)) for numbers in zip(*faults)), ""]
    text = "".join(piece for pair in zip(words, between) for piece in pair)
    return f"{text}: {len(faults)}" if len(faults) > 1 else text


def _range(numbers: set[str]) -> str:
    """`7`, `{0..4}`, `{0,2,3}`, or `{0..40}` of which some are missing."""
    in_order = sorted(numbers, key=int)
    if len(in_order) == 1:
        return in_order[0]
    span = int(in_order[-1]) - int(in_order[0]) + 1
    if span == len(in_order) or len(in_order) > 6:
        return f"{{{in_order[0]}..{in_order[-1]}}}"
    return f"{{{','.join(in_order)}}}"
