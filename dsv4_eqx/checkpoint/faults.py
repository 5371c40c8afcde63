"""What is wrong with a checkpoint, told in one error however much it is."""

import heapq
import re
from collections.abc import Collection, Sequence
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
    counts: dict[tuple[str, ...], int] = {}
    numbers: dict[tuple[str, ...], list[set[str]]] = {}
    for fault in faults:
        pieces = _NUMBERS.split(fault)  # words, and between them numbers
        words = tuple(pieces[::2])
        if words not in counts:
            counts[words], numbers[words] = 0, [set() for _ in words[1:]]
        if len(counts) > _MOST_KINDS:  # they are not alike
            more = f"and {len(faults) - _MOST_LINES} more, in the error's `faults`"
            return [*heapq.nsmallest(_MOST_LINES, faults), more]
        counts[words] += 1
        for seen, number in zip(numbers[words], pieces[1::2]):
            seen.add(number)
    kinds = sorted(counts)
    lines = [_line(words, numbers[words], counts[words]) for words in kinds]
    if len(kinds) > _MOST_LINES:
        more = f"and {len(kinds) - _MOST_LINES} more kinds, in the error's `faults`"
        lines = [*lines[:_MOST_LINES], more]
    return lines


def _line(words: Sequence[str], numbers: Sequence[set[str]], count: int) -> str:
    """`layers.{0..4}.w1.weight_scale is not part of the model: 5`"""
    between = [*map(_range, numbers), ""]
    text = "".join(piece for pair in zip(words, between) for piece in pair)
    return f"{text}: {count}" if count > 1 else text


def _range(numbers: set[str]) -> str:
    """`7`, `{0..4}`, `{0,2,3}`, or `{0..40}` of which some are missing."""
    in_order = sorted(numbers, key=int)
    if len(in_order) == 1:
        return in_order[0]
    span = int(in_order[-1]) - int(in_order[0]) + 1
    if span == len(in_order) or len(in_order) > 6:
        return f"{{{in_order[0]}..{in_order[-1]}}}"
    return f"{{{','.join(in_order)}}}"
