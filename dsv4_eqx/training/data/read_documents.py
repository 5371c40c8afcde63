"""Documents from text files and JSON lines, as token ids and targets.

A line of a `.jsonl` file is an object with `text`; with `prompt` and `completion`, of
which the completion's tokens are targets; or with `messages`, of a chat. Any other file
is one document. What cannot be used is left out, counted and said once, at the end.
"""

import collections
import itertools
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    path_of,
    validate_size,
)
from dsv4_eqx.training.data.encode import (
    Document,
    DocumentEncoder,
    Encodes,
    MissingEncoder,
)

_CALL: Final = "read_documents"
_JSON_LINES: Final = ".jsonl"
SUFFIXES: Final = (".txt", ".md", _JSON_LINES)
_Place = str | os.PathLike


def read_documents(
    paths: _Place | Iterable[_Place],
    tokenizer: Encodes,
    *,
    suffixes: Iterable[str] = SUFFIXES,
    begin_id: int | None = None,
    end_id: int | None = None,
    encode_messages: Callable[[Any], Any] | None = None,
    vocab_size: int | None = None,
) -> list[Document]:
    """The documents of files and directories, tokenised, in the order of their paths.

    A line of a `.jsonl` file is a document: an object with `text`; with `prompt` and
    `completion`, of which the completion's tokens are targets; or with `messages`. Any
    other file is one. All documents are held in memory, five bytes for each token.

    What is not UTF-8, is empty, or is no such JSON is left out. One warning at the end
    says how many there were of each and where the first one is.

    **Arguments:**

    - `paths`: a file, a directory with files in it, at any depth, or several of them.
    - `tokenizer`: from `load_tokenizer`, `ByteTokenizer()`, or anything with its
        method `encode`.
    - `suffixes`: of the files that are read in directories.
    - `begin_id`, `end_id`: token ids put before and after each document that is not
        `messages`; the end is a target.
    - `encode_messages`: from a list of messages, each a mapping with `role` and
        `content`, to their token ids and a mask of those that are targets. A ValueError
        of it leaves the conversation out.
    - `vocab_size`: of the model, for token ids to be checked.

    **Raises:** ValueError if there is no such path, no document is left, a token id is
    outside of the vocabulary, there are messages and no function for them, or an
    argument is not as described.
    """
    encoder = DocumentEncoder(_CALL, tokenizer, begin_id, end_id, encode_messages)
    if vocab_size is not None:
        vocab_size = validate_size(_CALL, "vocab_size", vocab_size)
    files = _files(paths, suffixes)
    documents, left_out = [], _LeftOut()
    for place, make in itertools.chain.from_iterable(map(_records, files)):
        try:
            document = make(encoder)
            if len(document.tokens) == 0:
                raise _Unusable("empty")
        except MissingEncoder as error:
            raise ValueError(f"{error} The first are in {place}.") from error
        except _Unusable as error:
            left_out.add(str(error), place)
        except ValueError as error:
            left_out.add("refused by the tokenizer or encode_messages", place, error)
        else:
            _validate_ids(document, vocab_size, place)
            documents.append(document)
    if not documents:
        found = f": {left_out}" if left_out.counts else ""
        raise ValueError(f"{_CALL}: no document in {len(files)} files{found}.")
    if left_out.counts:
        warnings.warn(f"{_CALL}: left out {left_out}.", stacklevel=2)
    return documents


class _Unusable(ValueError):
    """Why a document is left out."""


class _LeftOut:
    """What was left out: how many for each reason, and the first one."""

    def __init__(self):
        self.counts = collections.Counter[str]()
        self.first = ""

    def add(self, reason: str, place: str, error: Exception | None = None) -> None:
        """Counts one."""
        self.first = self.first or (place if error is None else f"{place} ({error})")
        self.counts[reason] += 1

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {why}" for why, count in self.counts.items())
        return f"{self.counts.total()} documents ({counts}), the first {self.first}"


def _files(paths: Any, suffixes: Any) -> list[pathlib.Path]:
    """The files to read; ValueError if there are none."""
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(paths, Iterable):
        raise invalid_argument(_CALL, "paths", paths, "a path, or several")
    if isinstance(suffixes, str) or not isinstance(suffixes, Iterable):
        raise invalid_argument(_CALL, "suffixes", suffixes, "like ('.txt', '.md')")
    paths, suffixes = [path_of(_CALL, "paths", p) for p in paths], tuple(suffixes)
    files = []
    for path in paths:
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.suffix in suffixes)
            files += sorted(file for file in inside if file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{_CALL}: {path}: there is no such file or directory.")
    if not files:
        listed = ", ".join(map(str, paths)) or "no paths"
        raise ValueError(
            f"{_CALL}: no file ends in {' or '.join(map(str, suffixes))} in {listed}: "
            "give other paths or suffixes."
        )
    return files


_Record = tuple[str, Callable[[DocumentEncoder], Document]]


def _records(path: pathlib.Path) -> Iterator[_Record]:
    """Where each document of a file is, and what makes it."""
    if path.suffix != _JSON_LINES:
        yield str(path), lambda encoder: encoder.of_text(_text(path.read_bytes()))
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():

                def make(encoder: DocumentEncoder, line: bytes = line) -> Document:
                    return _of_line(encoder, _text(line))

                yield f"{path}, line {number}", make


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unusable("not UTF-8") from None


def _of_line(encoder: DocumentEncoder, line: str) -> Document:
    """A line of JSON as a document."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _Unusable("not JSON") from None
    if not isinstance(record, dict):
        raise _Unusable("not a JSON object")
    keys = "text", "prompt", "completion", "messages"
    match tuple(map(record.get, keys)):
        case str(text), None, None, None:
            return encoder.of_text(text)
        case None, str(), "", None:
            raise _Unusable("with an empty completion")
        case None, str(prompt), str(completion), None:
            return encoder.of_completion(prompt, completion)
        case None, None, None, [_, *_] as messages:
            return encoder.of_messages(messages)
    raise _Unusable("without text, prompt and completion, or messages alone")


def _validate_ids(document: Document, vocab_size: int | None, place: str) -> None:
    lowest, highest = document.tokens.min(), document.tokens.max()
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        wrong = lowest if lowest < 0 else highest
        allowed = "at least 0" if vocab_size is None else f"in [0, {vocab_size})"
        raise ValueError(
            f"{_CALL}: {place} has the token id {wrong}, and it must be {allowed}: the "
            "tokenizer, or an id to begin or end with, is not that of the model."
        )
