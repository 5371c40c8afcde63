"""An answer while it is being written: which part of it each new text belongs to."""

from collections.abc import Iterator
from typing import Final

from dsv4_eqx.chat.special import BEGIN_CALLS, END_THINK, EOS

# What ends a part, and the part that follows.
_ENDS: Final = {
    "reasoning": {END_THINK: "content"},
    "content": {BEGIN_CALLS: "tool_calls", EOS: "end"},
    "tool_calls": {EOS: "end"},
    "end": {},
}


class ReplyParts:
    """Divides an answer into reasoning, content and tool calls as it comes.

    A text that may still become the end of its part is held back. Of tool calls, the
    text is given as it is written; `parse` reads it when it is whole.
    """

    def __init__(self, *, thinking: bool):
        """**Arguments:**

        - `thinking`: whether the prompt asked the model to think.
        """
        self.part = "reasoning" if thinking else "content"
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[str, str]]:
        """The parts of more text: pairs of a part's name and new text of it.

        The names are "reasoning", "content" and "tool_calls".
        """
        self._held += text
        while self._held and self.part != "end":
            ends = _ENDS[self.part]
            places = {end: self._held.find(end) for end in ends}
            found = [end for end, place in places.items() if place >= 0]
            if not found:
                whole = len(self._held) - max(map(self._num_begun, ends))
                if whole > 0:
                    yield self.part, self._held[:whole]
                self._held = self._held[whole:]
                return
            first = min(found, key=places.__getitem__)
            if places[first] > 0:
                yield self.part, self._held[: places[first]]
            self._held = self._held[places[first] + len(first) :]
            self.part = ends[first]
            if first == BEGIN_CALLS:
                yield self.part, first

    def close(self) -> Iterator[tuple[str, str]]:
        """What was held back, where the answer was cut off."""
        if self._held and self.part != "end":
            yield self.part, self._held
        self._held = ""

    def _num_begun(self, end: str) -> int:
        """Characters at the end of the text that `end` may begin with."""
        sizes = range(min(len(end), len(self._held)), 0, -1)
        return next((n for n in sizes if self._held.endswith(end[:n])), 0)
