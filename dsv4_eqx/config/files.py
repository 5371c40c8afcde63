"""A `config.json` as a mapping, its numbers as Python's."""

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from dsv4_eqx.numerics.validation import as_python, path_of, shown

_DEEPEST: Final = 3  # mappings in each other that are read


def read_json(call: str, source: str | os.PathLike) -> dict[str, Any]:
    """A `config.json`, or the one in a directory; ValueError if it is none."""
    path = path_of(call, "source", source)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{call}: {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{call}: {path} holds {shown(raw)}, not a JSON object.")
    return raw


def whole_numbers(value: Any, depth: int = _DEEPEST) -> Any:
    """The same, 4096.0 as 4096 everywhere: JSON has one kind of number."""
    value = as_python(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping) and depth > 0:
        return {key: whole_numbers(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple) and depth > 0:
        return [whole_numbers(inner, depth - 1) for inner in value]
    return value
