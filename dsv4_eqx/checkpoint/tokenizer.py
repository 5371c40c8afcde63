"""Text to token ids and back: a checkpoint's own tokenizer, or bytes."""

import functools
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Array, Int

from dsv4_eqx.chat.special import ChatTokenizer
from dsv4_eqx.checkpoint.directory import local_directory
from dsv4_eqx.numerics.validation import invalid_argument

TOKENIZER: Final = "tokenizer.json"
# With it go what other programs need to use it, and to end a text.
_BESIDE: Final = tuple(
    "tokenizer_config.json special_tokens_map.json added_tokens.json "
    "chat_template.jinja generation_config.json".split()
)
_NUM_BYTES: Final = 256
TokenIds = Sequence[int] | Int[Array | np.ndarray, " seq"]


class ByteTokenizer:
    """A token for each byte of UTF-8; for models without a tokenizer of their own."""

    vocab_size: int = _NUM_BYTES

    def encode(self, text: str) -> Int[np.ndarray, " seq"]:
        """Token ids, int32; ValueError if it is no text that UTF-8 holds."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_text(self, text: str) -> Int[np.ndarray, " seq"]:
        """The same: there are no special tokens."""
        return self.encode(text)

    def encode_special(self, token: str) -> Int[np.ndarray, " seq"]:
        """The bytes of a special token's name."""
        return self.encode(token)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes nothing: there is nothing to know of it."""

    def decode(self, ids: TokenIds) -> str:
        """The text; ids that are no bytes, and bytes that are no UTF-8, as U+FFFD.

        Negative ids, as a stream gives for a row that has ended, are left out.
        """
        pieces = [bytes([i]) if i < _NUM_BYTES else b"\xff" for i in _tokens(ids)]
        return b"".join(pieces).decode(errors="replace")


class FileTokenizer:
    """The tokenizer of a `tokenizer.json`, read by the `tokenizers` package."""

    def __init__(self, path: str | os.PathLike):
        """ImportError without the package; ValueError if the file is no tokenizer."""
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"{path} needs a package to be read: pip install 'dsv4-eqx[hf]'"
            ) from error
        self.path = pathlib.Path(path).absolute()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path}: is no tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int[np.ndarray, " seq"]:
        """Token ids, int32, without special tokens that the text does not have.

        ValueError if it is no text that UTF-8 holds.
        """
        _utf8(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    def encode_text(self, text: str) -> Int[np.ndarray, " seq"]:
        """Token ids of text that others wrote: a special token's name in it is text.

        ValueError if it is no text that UTF-8 holds.
        """
        _utf8(text)
        return np.asarray(self._of_text.encode_text(text), np.int32)

    def encode_special(self, token: str) -> Int[np.ndarray, " seq"]:
        """The id of a special token; ValueError without it."""
        return np.asarray(self._of_text.encode_special(token), np.int32)

    @functools.cached_property
    def _of_text(self) -> ChatTokenizer:
        return ChatTokenizer(self._tokenizer)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes its file, and copies those beside it that belong to it."""
        directory = pathlib.Path(directory)
        # From memory: the file that it was read from may be gone.
        self._tokenizer.save(str(directory / self.path.name))
        for path in map(self.path.with_name, _BESIDE):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)

    def decode(self, ids: TokenIds) -> str:
        """The text, special tokens included; negative ids are left out."""
        return self._tokenizer.decode(_tokens(ids), skip_special_tokens=False)


def load_tokenizer(
    directory: str | os.PathLike, *, revision: str | None = None
) -> FileTokenizer:
    """A checkpoint's tokenizer.

    Give it to `save_pretrained` for it to be beside the weights again.

    **Arguments:**

    - `directory`: of the checkpoint, or a name on the Hugging Face hub, of which only
        the tokenizer is downloaded.
    - `revision`: branch, tag or commit, where the name is one on the hub.

    **Raises:** ValueError if there is no such directory, it has no `tokenizer.json`, or
    that is no tokenizer; ImportError if a package is needed and missing, OSError if the
    hub does not give the file.
    """
    files = (TOKENIZER, *_BESIDE)
    found = local_directory("load_tokenizer", directory, revision, files)
    path = found / TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"load_tokenizer: {path}: there is no such file; for a token for each byte "
            "give ByteTokenizer()."
        )
    return FileTokenizer(path)


def _tokens(ids: TokenIds) -> list[int]:
    return [i for i in map(int, ids) if i >= 0]


def _utf8(text: Any) -> bytes:
    try:
        return text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        allowed = "a str that UTF-8 holds, without half of a surrogate pair"
        raise invalid_argument("encode", "text", text, allowed) from error
