"""Judging what a user gives a model: token ids, and how many of them are meant.

What is known is judged on the host, before anything is compiled; under `jit` values are
not known, only shapes and dtypes.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

TokenIds = Int[Array | np.ndarray, "batch seq"]
Lengths = Int[Array | np.ndarray, " batch"]


def is_concrete(*arrays: Any) -> bool:
    """Whether all the values are there to be looked at, and not only traced.

    **Arguments:**

    - `arrays`: of JAX or numpy.
    """

    def is_known(x: Any) -> bool:
        if isinstance(x, jax.core.Tracer):
            return False
        # Of what lies over several processes, each knows only its part.
        return not isinstance(x, jax.Array) or x.is_fully_addressable

    return all(map(is_known, arrays))


def validate_token_ids(
    call: str, tokens: TokenIds, vocab: int, lengths: Lengths | None = None
) -> Int[Array, "batch seq"]:
    """`tokens` as an int32 array, checked as far as they are known.

    **Arguments:**

    - `call`: what the user called.
    - `tokens`: token ids.
    - `vocab`: how many there are.
    - `lengths`: ids of each row that are meant, from the first one on; the others,
        which may be anything, become 0.

    **Raises:** ValueError if the tokens are no array of integers of two dimensions, are
    empty, or, unless traced, one of them is outside `[0, vocab)`.
    """
    _validate_array(call, tokens)
    if lengths is not None:
        # Not even how experts are grouped may depend on the padding.
        where = np.where if is_concrete(tokens, lengths) else jnp.where
        is_meant = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens = where(is_meant, tokens, tokens.dtype.type(0))
    _check_range(call, "token id", tokens, vocab)
    return jnp.asarray(tokens, jnp.int32)


def validate_targets(
    call: str, targets: Int[Array, "*batch"], shape: tuple[int, ...], vocab: int
) -> None:
    """Refuses targets that are not a token id for each position.

    **Arguments:**

    - `call`: what the user called.
    - `targets`: token ids.
    - `shape`: of the positions.
    - `vocab`: how many token ids there are.

    **Raises:** ValueError if the targets are no array of integers of this shape or,
    unless traced, one of them is outside `[0, vocab)`.
    """
    _validate_integers(call, "targets", targets)
    if targets.shape != shape:
        raise ValueError(
            f"{call}: targets of shape {targets.shape} are not one for each position "
            f"of hidden, {shape}."
        )
    _check_range(call, "target", targets, vocab)


def _validate_integers(call: str, name: str, values: Any) -> None:
    is_array = isinstance(values, jax.Array | np.ndarray)
    if not is_array or not jnp.issubdtype(values.dtype, jnp.integer):
        found = values.dtype if is_array else type(values).__name__
        raise ValueError(f"{call}: {name} must be an array of integers, not {found}.")


def _check_range(call: str, name: str, ids: Any, vocab: int) -> None:
    if not is_concrete(ids):
        return
    known = np.asarray(ids)
    outside = (known < 0) | (known >= vocab)
    if outside.any():
        place = [int(i) for i in np.argwhere(outside)[0]]
        value = known[tuple(place)]
        raise ValueError(f"{call}: {name} {value} at {place} is outside [0, {vocab}).")


def _validate_array(call: str, tokens: Any) -> None:
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise ValueError(
            f"{call}: token ids must be an array of JAX or numpy, not "
            f"{type(tokens).__name__}: give numpy.asarray(tokens)."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{call}: token ids must be integers, not {tokens.dtype}.")
    if tokens.ndim != 2 or 0 in tokens.shape:
        hint = " Give tokens[None] for one row, under jax.vmap too."
        raise ValueError(
            f"{call}: token ids must have the shape (batch, seq), neither empty, not "
            f"{tokens.shape}.{hint if tokens.ndim == 1 else ''}"
        )


def validate_lengths(call: str, lengths: Lengths | None, tokens: TokenIds) -> Lengths:
    """`lengths` as int32, checked as far as they are known; whole rows for None.

    **Arguments:**

    - `call`: what the user called.
    - `lengths`: tokens of each row that are meant.
    - `tokens`: token ids, and padding after them.

    **Raises:** ValueError if the tokens are no such array, there is not an integer for
    each row, or, unless traced, one of them is outside `[0, seq]`.
    """
    _validate_array(call, tokens)
    batch, seq = tokens.shape
    whole = np.full(batch, seq, np.int32)
    return whole if lengths is None else validate_counts(call, lengths, whole)


def validate_counts(call: str, lengths: Lengths, most: Lengths) -> Lengths:
    """`lengths` as int32, checked as far as they are known.

    **Arguments:**

    - `call`: what the user called.
    - `lengths`: tokens of each row that are meant.
    - `most`: tokens that each row has.

    **Raises:** ValueError if there is not an integer for each row, or, unless traced,
    one of them is outside `[0, most]`.
    """
    _validate_integers(call, "lengths", lengths)
    if lengths.shape != most.shape:
        raise ValueError(
            f"{call}: lengths must be one for each of the {len(most)} rows, not of the "
            f"shape {lengths.shape}."
        )
    if is_concrete(lengths, most):
        known, limits = np.asarray(lengths), np.asarray(most)
        outside = np.flatnonzero((known < 0) | (known > limits))
        if len(outside) > 0:
            row = int(outside[0])
            raise ValueError(
                f"{call}: lengths[{row}] is {known[row]}: the row has 0 to "
                f"{limits[row]} tokens."
            )
    return lengths.astype(jnp.int32)
