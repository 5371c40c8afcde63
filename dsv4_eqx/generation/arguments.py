"""Prompts and token ids given to `generate`, validated on the host.

Everything goes to the device by `jax.device_put`, so that generation works where
`jax.transfer_guard` forbids implicit transfers.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dsv4_eqx.config.config import Config
from dsv4_eqx.numerics.validation import (
    as_python,
    invalid_argument,
    is_int,
    validate_counts,
)

# Rows of token ids; a single row; or rows of different lengths.
Prompts = (
    Int[Array | np.ndarray, "batch seq"] | Int[Array | np.ndarray, " seq"] | Sequence
)


def on_device(value: Any, dtype: DTypeLike) -> Array:
    """A number or a numpy array, on the device."""
    return jax.device_put(np.asarray(value, dtype))


def read_prompts(
    call: str, tokens: Any, lengths: Any, vocab: int
) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, " batch"]]:
    """The prompts as rows padded with zeros, and the number of tokens in each."""
    rows = _rows(call, tokens)
    row_sizes = np.array([len(row) for row in rows], np.int32)
    if lengths is None:
        lengths = row_sizes
    else:
        lengths = validate_counts(call, _integers(call, "lengths", lengths), row_sizes)
    if not rows:
        raise ValueError(f"{call}: there is no prompt.")
    if lengths.min() < 1:
        row = int(lengths.argmin())
        raise ValueError(f"{call}: the prompt of row {row} has no token.")
    padded = np.zeros((len(rows), lengths.max()), np.int32)
    for i, (row, length) in enumerate(zip(rows, lengths)):
        outside = np.flatnonzero((row[:length] < 0) | (row[:length] >= vocab))
        if len(outside) > 0:
            place = int(outside[0])
            raise ValueError(
                f"{call}: token id {row[place]} at [{i}, {place}] is outside "
                f"[0, {vocab})."
            )
        padded[i, :length] = row[:length]
    return padded, lengths


def eos_ids(call: str, eos_id: Any, config: Config) -> Int[Array, " ids"]:
    """The token ids that end a row; those of the configuration for None."""
    value: Any = as_python(config.eos_token_id if eos_id is None else eos_id)
    value = () if value is None else value
    if isinstance(value, np.ndarray | jax.Array):
        value = jax.device_get(value).reshape(-1)
    is_several = isinstance(value, Iterable) and not isinstance(value, str)
    ids: list[Any] = list(map(as_python, value)) if is_several else [value]
    for token_id in ids:
        if not is_int(token_id) or not 0 <= token_id < config.vocab_size:
            allowed = f"token ids in [0, {config.vocab_size}), or () for none"
            raise invalid_argument(call, "eos_id", eos_id, allowed)
    return on_device(sorted(set(ids)), np.int32)


def _rows(call: str, tokens: Any) -> list[np.ndarray]:
    """Each row's token ids; a single row becomes a list of one row."""
    if isinstance(tokens, Sequence) and not isinstance(tokens, str):
        tokens = [as_python(row) for row in tokens]
        if not tokens or not all(map(is_int, tokens)):
            return [_row(call, row) for row in tokens]
    ids = _integers(call, "token ids", tokens)
    if ids.ndim not in (1, 2):
        raise ValueError(
            f"{call}: token ids must have the shape (batch, seq), or (seq,) for one "
            f"prompt, not {ids.shape}."
        )
    return list(np.atleast_2d(ids))


def _row(call: str, row: Any) -> np.ndarray:
    if isinstance(row, Sequence) and len(row) == 0:
        return np.zeros(0, np.int32)
    ids = _integers(call, "token ids", row)
    if ids.ndim != 1:
        raise ValueError(f"{call}: a row of token ids has the shape {ids.shape}.")
    return ids


def _integers(call: str, name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(jax.device_get(values))
    except ValueError:  # rows of different lengths, one level too deep
        array = np.asarray(None)
    if not np.issubdtype(array.dtype, np.integer):
        got = array.dtype if array.dtype != object else type(values).__name__
        raise ValueError(f"{call}: {name} must be integers, not {got}.")
    return array
