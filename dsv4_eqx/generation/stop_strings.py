"""Texts of the new tokens, and the stop strings that end them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dsv4_eqx.numerics.validation import invalid_argument

Decode = Callable[[list[int]], str]


class Texts:
    """The text of each row's new tokens, up to the first stop string in it.

    A text is decoded again with each new token, since a character may consist of
    several tokens.
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...], eos_ids: list[int]):
        """Neither `stop` nor `eos_ids`, which end a row, are part of its text."""
        self._decode, self._stop, self._eos_ids = decode, stop, set(eos_ids)
        self._ids: list[list[int]] = []

    def append(
        self, tokens: Int[np.ndarray, "batch new"], counts: Int[np.ndarray, " batch"]
    ) -> tuple[Int[np.ndarray, " batch"], Bool[np.ndarray, " batch"]]:
        """Adds new tokens to each row, up to the one that completes a stop string.

        Gives how many were added to each row, and whether it then ended.
        """
        if not self._ids:
            self._ids = [[] for _ in tokens]
        taken, stops = np.array(counts, np.int32), np.zeros(len(counts), bool)
        for row, ids in enumerate(self._ids):
            for i in range(counts[row]):
                ids.append(int(tokens[row, i]))
                if self._stop and self._cut(ids)[1]:
                    taken[row], stops[row] = i + 1, True
                    break
        return taken, stops

    def texts(self) -> tuple[str, ...]:
        """Each row's text."""
        return tuple(self._cut(ids)[0] for ids in self._ids)

    def _cut(self, ids: list[int]) -> tuple[str, bool]:
        """The text up to a stop string, and whether there is one."""
        text = self._decode([i for i in ids if i not in self._eos_ids])
        ends = [end for end in map(text.find, self._stop) if end >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


def validate_stop(call: str, stop: Any, decode: Any) -> tuple[tuple[str, ...], Any]:
    """The stop strings as a tuple, and the function that decodes token ids."""
    strings = (stop,) if isinstance(stop, str) else stop
    is_several = isinstance(strings, Sequence | set | frozenset)
    if not is_several or not all(isinstance(x, str) and x for x in strings):
        allowed = "a string or several, none of them empty"
        raise invalid_argument(call, "stop", stop, allowed)
    decode = getattr(decode, "decode", decode)
    if not callable(decode) and (strings or decode is not None):
        allowed = "a tokenizer, or a function from token ids to text, with stop strings"
        raise invalid_argument(call, "decode", decode, allowed)
    return tuple(strings), decode
