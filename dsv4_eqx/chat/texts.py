"""The long texts of the chat format, which a checkpoint brings itself.

They stand as literals in its `encoding/encoding_dsv4.py`, a program that is not run
here. Their lengths and digests are those of the releases; another text is refused.
"""

import ast
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Final

from dsv4_eqx.chat.special import DSML, END_THINK, THINK, Piece

_CALL: Final = "read_texts"
_FILE: Final = pathlib.Path("encoding") / "encoding_dsv4.py"
_LARGEST: Final = 1 << 20  # bytes of that file; the releases' have about 30,000
_SCHEMAS: Final = "{tool_schemas}"
_TOKENS: Final = {
    "{dsml_token}": DSML,
    "{thinking_start_token}": THINK,
    "{thinking_end_token}": END_THINK,
}
# Bytes of UTF-8 and SHA-256. What the preview has as `max` is later releases' `high`.
_ABSOLUTE: Final = (
    476,
    "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
)
_BEYOND: Final = (
    528,
    "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
)
_EMPTY: Final = (
    0,
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
)
# Filled in, without schemas.
_OF_TOOLS: Final = (
    989,
    "c7d3159308f7d076bee8974ece110fda1f92f6e577306e602ba2b466b4dcd904",
)
_OF_EFFORTS: Final = {"low": _EMPTY, "high": _ABSOLUTE, "max": _BEYOND}
_NAMES: Final = ("REASONING_EFFORT_PROMPTS", "REASONING_EFFORT_MAX", "TOOLS_TEMPLATE")


@dataclasses.dataclass(frozen=True)
class ChatTexts:
    """The texts of a release for effort and tools.

    **Arguments:**

    - `efforts`: the text of each effort that the release knows; None where they are
        not known.
    - `tools`: what introduces tools, with its placeholders; None where it is not known.
    - `source`: where they are from, or should be.
    """

    efforts: Mapping[str, str] | None = None
    tools: str | None = None
    source: str = f"the checkpoint's {_FILE.as_posix()}"

    def effort(self, effort: str | None, thinking: bool) -> str:
        """The text of an effort, which is none in answers without thinking.

        **Raises:** ValueError if the release does not have the effort, or the text is
        needed and not known.
        """
        known = _OF_EFFORTS if self.efforts is None else self.efforts
        if effort is None:
            return ""
        if effort not in known:
            raise ValueError(
                f"encode(effort={effort!r}): must be one of {list(known)}, or None."
            )
        if not thinking:
            return ""
        if self.efforts is None:
            raise ValueError(f"encode(effort={effort!r}): {self._missing()}")
        return self.efforts[effort]

    def introduction(self, schemas: str) -> list[Piece]:
        """What introduces tools, with their schemas.

        **Raises:** ValueError if it is not known.
        """
        if self.tools is None:
            raise ValueError(f"encode(tools=...): {self._missing()}")
        return _filled(self.tools, schemas)

    def _missing(self) -> str:
        return (
            f"its text is in {self.source}, which is not there: give texts="
            "read_texts(directory) of a checkpoint that has it."
        )


def read_texts(directory: str | os.PathLike) -> ChatTexts:
    """The texts of a checkpoint, read as literals: nothing of it is run.

    Without the file, tools and effort are not known, and all else can be encoded.

    **Arguments:**

    - `directory`: of the checkpoint.

    **Raises:** ValueError if the checkpoint is another model's, the file cannot be
    read, or a text in it is not the release's.
    """
    directory = pathlib.Path(directory)
    _refuse_other_models(directory)
    path = directory / _FILE
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("encoding_*.py"))
        if others:
            raise ValueError(
                f"{_CALL}: {path.parent} has {others} and no {path.name}: it is "
                "another model's chat format."
            )
        return ChatTexts(source=str(path))
    literals = _literals(path)
    efforts, tools = _efforts(path, literals), literals.get("TOOLS_TEMPLATE")
    if tools is not None:
        filled = "".join(piece.text for piece in _filled(tools, ""))
        _check(f"{path}: TOOLS_TEMPLATE", filled, _OF_TOOLS)
    return ChatTexts(efforts, tools, str(path))


def _refuse_other_models(directory: pathlib.Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        return
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_CALL}: {path} is not JSON: {error}") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in (None, "deepseek_v4"):
        raise ValueError(
            f"{_CALL}: {path} is of a {model_type!r}, whose chat format is another."
        )


def _literals(path: pathlib.Path) -> dict[str, Any]:
    """The literals assigned at the top of a program to the names that are wanted."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{_CALL}: {path} has more than {_LARGEST} bytes.")
    found = {}
    try:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else ()
            if isinstance(node, ast.AnnAssign):
                targets = (node.target,)
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            for target in targets:
                if isinstance(target, ast.Name) and target.id in _NAMES:
                    found[target.id] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        message = f"{_CALL}: {path} cannot be read for {list(_NAMES)}: {error}"
        raise ValueError(message) from error
    return found


def _efforts(path: pathlib.Path, literals: dict[str, Any]) -> dict[str, str] | None:
    """The efforts: of the preview, which has no `low`, or of later releases."""
    table, most = (literals.get(name) for name in _NAMES[:2])
    if table is not None:
        if not isinstance(table, dict) or table.keys() != _OF_EFFORTS.keys():
            raise ValueError(
                f"{_CALL}: {path}: {_NAMES[0]} must have {list(_OF_EFFORTS)}."
            )
        for name, expected in _OF_EFFORTS.items():
            _check(f"{path}: {_NAMES[0]}[{name!r}]", table[name], expected)
        return table
    if most is None:
        return None
    _check(f"{path}: {_NAMES[1]}", most, _ABSOLUTE)
    return {"high": "", "max": most}


def _check(what: str, text: Any, expected: tuple[int, str]) -> None:
    data = text.encode() if isinstance(text, str) else b""
    found = len(data), hashlib.sha256(data).hexdigest()
    if not isinstance(text, str) or found != expected:
        raise ValueError(
            f"{_CALL}: {what} has {found[0]} bytes with the SHA-256 {found[1]}; a "
            f"DeepSeek-V4's has {expected[0]} with {expected[1]}."
        )


def _filled(template: Any, schemas: str) -> list[Piece]:
    """A template's pieces; names of special tokens in the schemas stay text."""
    pieces = [Piece(str(template))]
    for placeholder, token in (*_TOKENS.items(), (_SCHEMAS, schemas)):
        filler = Piece(token, is_special=placeholder != _SCHEMAS)
        split = []
        for piece in pieces:
            texts = [piece.text] if piece.is_special else piece.text.split(placeholder)
            for i, text in enumerate(texts):
                split += [filler] if i > 0 else []
                split += [Piece(text, piece.is_special)]
        pieces = split
    return pieces
