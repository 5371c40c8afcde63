"""The special tokens of the chat format, and text in which none of them counts.

The bar is U+FF5C and the space U+2581: they are part of the spelling.
"""

import json
import secrets
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
REMINDER: Final = "<｜latest_reminder｜>"
THINK: Final = "<think>"
END_THINK: Final = "</think>"
DSML: Final = "｜DSML｜"  # of tools; the brackets around it are plain text
TASKS: Final = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
_BAR: Final = "｜"
BLANK: Final = "\n\n"
CALLS: Final = "tool_calls"
# What a block of calls begins with, after the content.
BEGIN_CALLS: Final = f"{BLANK}<{DSML}{CALLS}"


class Piece(NamedTuple):
    """A part of a prompt: a special token, or text in which none counts."""

    text: str
    is_special: bool = False


@runtime_checkable
class TextTokenizer(Protocol):
    """What turns the pieces of a prompt into token ids."""

    def encode_special(self, token: str) -> Iterable[int]:
        """The ids of a special token."""
        ...

    def encode_text(self, text: str) -> Iterable[int]:
        """The ids of text, in which no special token counts."""
        ...


class ChatTokenizer:
    """A `tokenizers.Tokenizer` for text in which special tokens stay text.

    Off are the added tokens that are marked as special, and those that the format
    writes: they have a bar in their name, or begin or end the thinking.
    """

    def __init__(self, tokenizer: Any):
        """**Arguments:**

        - `tokenizer`: a `tokenizers.Tokenizer`; it is not changed.

        **Raises:** ValueError if its ordinary tokens cannot be kept as they are.
        """
        self._tokenizer, self._plain = tokenizer, _without_special(tokenizer)

    def encode_special(self, token: str) -> list[int]:
        """The id of a special token.

        **Raises:** ValueError if the tokenizer does not have it.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(
                f"encode_ids: the tokenizer has no token {token!r}: it is not that of "
                "a DeepSeek-V4."
            )
        return [found]

    def encode_text(self, text: str) -> list[int]:
        """The ids of text; the name of a special token in it is text too."""
        return self._plain.encode(text, add_special_tokens=False).ids


def _without_special(tokenizer: Any) -> Any:
    """The same tokenizer, its special tokens under names that no text has.

    They stay where they are: without them, the others would have other ids.
    """
    raw = json.loads(tokenizer.to_str())
    # With it goes what would add special tokens around the text.
    raw |= {"post_processor": None, "truncation": None, "padding": None}
    vocab, ordinary = raw["model"].get("vocab"), []
    for token in raw["added_tokens"]:
        name = token["content"]
        if not _is_special(token):
            ordinary.append(name)
            continue
        token["content"] = secrets.token_hex(16)
        if isinstance(vocab, dict) and name in vocab:
            vocab[token["content"]] = vocab.pop(name)
    plain = type(tokenizer).from_str(json.dumps(raw))
    moved = [n for n in ordinary if plain.token_to_id(n) != tokenizer.token_to_id(n)]
    if moved:
        raise ValueError(
            f"ChatTokenizer: the ids of {moved[:3]} depend on the special tokens' "
            "names; this kind of tokenizer is not supported."
        )
    return plain


def _is_special(token: dict[str, Any]) -> bool:
    name = token["content"]
    return token["special"] or _BAR in name or name in (THINK, END_THINK)
