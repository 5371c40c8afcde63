"""What is wrong with a checkpoint, told in one error however much it is."""

import re
from collections.abc import Collection, Sequence
from typing import Final

_MOST_SINGLE: Final = 12  # faults that are listed one by one
_MOST_LINES: Final = 50
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
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for fault in faults:
        words = _NUMBERS.split(fault)  # and between them numbers
        alike.setdefault(tuple(words[::2]), []).append(words[1::2])
    kinds = sorted(alike)
    lines = [_line(words, alike[words]) for words in kinds[:_MOST_LINES]]
    if len(kinds) > _MOST_LINES:
        rest = len(kinds) - _MOST_LINES
        lines.append(f"and {rest} more kinds, in the error's `faults`")
    return lines


def _line(words: Sequence[str], numbers: Sequence[Sequence[str]]) -> str:
    """`layers.{0..4}.w1.weight_scale is not part of the model: 5`"""
    ranges = [_range(set(column)) for column in zip(*numbers)]
    pieces = [piece for pair in zip(words, [*ranges, ""]) for piece in pair]
    count = f": {len(numbers)}" if len(numbers) > 1 else ""
    return "".join(pieces) + count


def _range(numbers: set[str]) -> str:
    """`7`, `{0..4}`, `{0,2,3}`, or `{0..40}` of which some are missing."""
    in_order = sorted(numbers, key=int)
    if len(in_order) == 1:
        return in_order[0]
    span = int(in_order[-1]) - int(in_order[0]) + 1
    if span == len(in_order) or len(in_order) > 6:
        return f"{{{in_order[0]}..{in_order[-1]}}}"
    return f"{{{','.join(in_order)}}}"
