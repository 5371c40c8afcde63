"""Validation of arguments: what is wrong with a value is said before it is used."""

import math
import numbers
import os
import pathlib
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv4_eqx.numerics.quantized_weight import QuantizedWeight

_LARGEST_FLOAT32: Final = (2.0 - 2.0**-23) * 2.0**127
_LONGEST: Final = 200  # characters of a value in an error
# Of weights. Other floats, FP8 and FP4, mean nothing without their scales.
FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


def is_int(value: Any) -> bool:
    """Whether `value` is an integer; a boolean is none.

    **Arguments:**

    - `value`: anything.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number that float32 can hold; NaN and booleans are none.

    **Arguments:**

    - `value`: anything.
    """
    is_real = is_int(value) or isinstance(value, float)
    return is_real and abs(value) <= _LARGEST_FLOAT32


def shown(value: Any) -> str:
    """`value` as an error shows it, whatever it is and however long.

    **Arguments:**

    - `value`: anything.
    """
    # Enough for a text too long; writing numbers of many digits takes long.
    if isinstance(value, list) and len(value) > _LONGEST:
        value = value[:_LONGEST]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of many digits, deep nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def invalid_argument(call: str, name: str, value: Any, allowed: str) -> ValueError:
    """The error that names the call, the value got and what is allowed.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the value.
    - `value`: anything.
    - `allowed`: completes "must be".
    """
    hint = ""
    if isinstance(value, np.generic | np.ndarray):
        hint = f" It is numpy's: give {name}.tolist()."
    return ValueError(f"{call}({name}={shown(value)}): must be {allowed}.{hint}")


def validate_dtype(call: str, dtype: Any) -> np.dtype:
    """A dtype of weights, which JAX has as it is set.

    **Arguments:**

    - `call`: what the user called.
    - `dtype`: anything.

    **Raises:** ValueError if it is no dtype for weights, or float64 without x64.
    """
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if dtype is None or found is None or found.name not in FLOATS:
        raise invalid_argument(call, "dtype", dtype, f"one of {', '.join(FLOATS)}")
    if found == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{call}: the weights would be float64, and JAX would make them float32: "
            'jax.config.update("jax_enable_x64", True) first (JAX_ENABLE_X64=1 for a '
            "command), or give another dtype."
        )
    return found


def validate_key(call: str, key: Any) -> None:
    """Refuses what is not one key.

    **Arguments:**

    - `call`: what the user called.
    - `key`: anything.

    **Raises:** ValueError if it is no key of `jax.random`, or several.
    """
    is_array = isinstance(key, jax.Array | np.ndarray)
    is_new = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_raw = is_array and key.dtype == np.uint32
    if not (is_new and key.ndim == 0 or is_raw and key.ndim == 1):
        raise invalid_argument(call, "key", key, "one key, as from jax.random.key(0)")


def path_of(call: str, name: str, value: Any) -> pathlib.Path:
    """The path that a user gave, with `~` for the home directory.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the value.
    - `value`: anything.

    **Raises:** ValueError if it is no path.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise invalid_argument(call, name, value, "a path, as a str or an os.PathLike")
    return pathlib.Path(os.path.expanduser(text))


def validate_flag(call: str, name: str, value: Any) -> None:
    """Refuses what is neither true nor false.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the value.
    - `value`: anything.

    **Raises:** ValueError if it is no boolean.
    """
    if not isinstance(value, bool | np.bool_):
        raise invalid_argument(call, name, value, "True or False")


def validate_activations(
    call: str,
    x: Array,
    weight: Array | QuantizedWeight,
    dims: tuple[str, ...] | None = None,
) -> None:
    """Refuses activations that do not fit the weight they will meet.

    **Arguments:**

    - `call`: what the user called.
    - `x`: the activations, channels last.
    - `weight`: its last dimension is those channels.
    - `dims`: what the dimensions of `x` are; any, then channels, by default.

    **Raises:** ValueError if `x` has other dimensions, channels or another dtype.
    """
    dim = weight.shape[-1]
    fits = x.ndim > 0 if dims is None else x.ndim == len(dims)
    if not fits or x.shape[-1] != dim:
        shown_dims = "..., dim" if dims is None else ", ".join(dims)
        raise ValueError(
            f"{call} was called with x of shape {x.shape}: it must be ({shown_dims}), "
            f"where dim is {dim}."
        )
    if x.dtype != weight.dtype:
        raise ValueError(
            f"{call} was called with x of dtype {x.dtype}, its weights are "
            f"{weight.dtype}: cast one of them."
        )


def validate_ids(call: str, name: str, ids: Array, shape: tuple[int, ...]) -> None:
    """Refuses token ids or positions that are not one for each token.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the ids.
    - `ids`: one for each token.
    - `shape`: of the tokens.

    **Raises:** ValueError if `ids` have another shape or are not integers.
    """
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{call} was called with {name} of shape {ids.shape} and dtype "
            f"{ids.dtype}: they must be integers of shape {shape}, as x has tokens."
        )


def validate_size(call: str, name: str, size: Any) -> int:
    """`size` as a Python integer.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the size.
    - `size`: anything.

    **Raises:** ValueError if it is not an integer, numpy's included, of at least 1.
    """
    is_int = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    if not is_int or size < 1:
        raise ValueError(f"{call}({name}={size!r}): must be an integer, at least 1.")
    return int(size)


def validate_sizes(call: str, **sizes: Any) -> tuple[int, ...]:
    """The sizes as Python integers, in the order given.

    **Arguments:**

    - `call`: what the user called.
    - `sizes`: by name.

    **Raises:** ValueError as `validate_size` does.
    """
    return tuple(validate_size(call, name, size) for name, size in sizes.items())


def validate_number(call: str, name: str, number: Any) -> float:
    """`number` as a Python float.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the number.
    - `number`: anything.

    **Raises:** ValueError if it is not a number, finite and not negative.
    """
    is_real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_real or not (math.isfinite(number) and float(number) >= 0):
        raise ValueError(
            f"{call}({name}={number!r}): {name} must be finite and not negative."
        )
    return float(number)
