"""A document as a model is trained on it: token ids, and which of them are targets."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32

from dsv4_eqx.numerics.validation import invalid_argument, validate_int


@runtime_checkable
class Encodes(Protocol):
    """What turns text into token ids, as `ByteTokenizer` and `load_tokenizer` do."""

    def encode(self, text: str, /) -> Any:
        """The token ids of a text; ValueError if it is none."""
        ...


class Document(NamedTuple):
    """Token ids, and which of them the loss counts as targets."""

    tokens: Int32[np.ndarray, " seq"]
    is_target: Bool[np.ndarray, " seq"]


class DocumentEncoder:
    """Makes a `Document` of a text, of prompt and completion, or of messages."""

    def __init__(
        self,
        call: str,
        tokenizer: Encodes,
        begin_id: int | None,
        end_id: int | None,
        encode_messages: Callable[[Any], Any] | None,
    ):
        """ValueError naming `call` and the argument that is not as it should be."""
        if not isinstance(tokenizer, Encodes):
            allowed = "with a method encode, as ByteTokenizer()"
            raise invalid_argument(call, "tokenizer", tokenizer, allowed)
        if encode_messages is not None and not callable(encode_messages):
            allowed = "a function from messages to token ids and a mask"
            raise invalid_argument(call, "encode_messages", encode_messages, allowed)
        self.call, self.tokenizer = call, tokenizer
        self.begin, self.end = (
            [] if i is None else [validate_int(call, name, i, least=0)]
            for name, i in (("begin_id", begin_id), ("end_id", end_id))
        )
        self.encode_messages = encode_messages

    def of_text(self, text: str) -> Document:
        """Every token is a target."""
        return self.of_completion("", text)

    def of_completion(self, prompt: str, completion: str) -> Document:
        """The completion's tokens and the end are targets.

        The two are encoded apart: no token has characters of both.
        """
        first, last = self._encode(prompt), self._encode(completion)
        tokens = [*self.begin, *first, *last, *self.end]
        num_given = len(self.begin) + len(first)
        is_target = np.arange(len(tokens)) >= num_given
        if len(prompt) == 0:
            is_target[:] = True
        return Document(np.asarray(tokens, np.int32), is_target)

    def of_messages(self, messages: Sequence[Any]) -> Document:
        """What the user's function makes of a conversation."""
        if self.encode_messages is None:
            raise MissingEncoder(
                f"{self.call}: there are chat messages: give encode_messages, a "
                "function from them to token ids and a mask of the targets."
            )
        found = self.encode_messages(messages)
        if not isinstance(found, Sequence) or len(found) != 2:
            raise MissingEncoder(
                f"{self.call}: encode_messages gave {type(found).__name__}: it must "
                "give two sequences of equal length, token ids and a mask."
            )
        tokens, is_target = (np.asarray(part) for part in found)
        is_mask = is_target.dtype == bool and tokens.shape == is_target.shape
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            is_mask = len(tokens) == 0
        if not is_mask:
            raise MissingEncoder(
                f"{self.call}: encode_messages gave {tokens.dtype}{list(tokens.shape)} "
                f"and {is_target.dtype}{list(is_target.shape)}: it must give integers "
                "and as many booleans."
            )
        return Document(tokens.astype(np.int32), is_target.astype(bool))

    def _encode(self, text: str) -> Int[np.ndarray, " seq"]:
        return np.asarray(self.tokenizer.encode(text), np.int32)


class MissingEncoder(ValueError):
    """The user's function for messages is missing or wrong: no document's fault."""
