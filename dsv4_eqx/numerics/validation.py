"""Validation of arguments: what is wrong with a value is said before it is used."""

import numbers
import os
import pathlib
from typing import Any, Final

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv4_eqx.numerics.lora_weight import LoRAWeight
from dsv4_eqx.numerics.quantized_weight import AbstractWeight
from dsv4_eqx.numerics.slice import Slice

_LARGEST_FLOAT32: Final = (2.0 - 2.0**-23) * 2.0**127
_LONGEST: Final = 200  # characters of a value in an error
# Of weights. Other floats, FP8 and FP4, mean nothing without their scales.
FLOATS: Final = ("float16", "bfloat16", "float32", "float64")

_Counts = Int[Array | np.ndarray, " batch"]


def as_python(value: Any) -> Any:
    """`value`, as Python's own if it is a known number of numpy's or in a 0-d array."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    if not is_array or isinstance(value, jax.core.Tracer) or value.ndim > 0:
        return value
    return value.item() if jnp.issubdtype(value.dtype, np.number) else value


def is_int(value: Any) -> bool:
    """Whether `value` is an integer, Python's or numpy's; a boolean is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number that float32 can hold; NaN and booleans are none."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and bool(abs(as_python(value)) <= _LARGEST_FLOAT32)


def is_concrete(*arrays: Any) -> bool:
    """Whether all the values are there to be looked at, and not only traced."""

    def is_known(x: Any) -> bool:
        if isinstance(x, jax.core.Tracer):
            return False
        # Of what lies over several processes, each knows only its part.
        return not isinstance(x, jax.Array) or x.is_fully_addressable

    return all(map(is_known, arrays))


def shown(value: Any) -> str:
    """`value` as an error shows it, whatever it is and however long."""
    # Enough for a text too long; writing numbers of many digits takes long.
    if isinstance(value, list) and len(value) > _LONGEST:
        value = value[:_LONGEST]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of many digits, deep nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def invalid_argument(call: str, name: str, value: Any, allowed: str) -> ValueError:
    """The error that names the call, the value got and what is allowed."""
    return ValueError(f"{call}({name}={shown(value)}): must be {allowed}.")


def validate_int(
    call: str, name: str, value: Any, *, least: int = 1, most: int | None = None
) -> int:
    """`value` as a Python integer within the bounds, which are both allowed."""
    found = as_python(value)
    if not is_int(found) or found < least or (most is not None and found > most):
        bounds = f", at least {least}" if most is None else f" in [{least}, {most}]"
        raise invalid_argument(call, name, value, f"an integer{bounds}")
    return int(found)


def validate_size(call: str, name: str, size: Any) -> int:
    """`size` as a Python integer of at least 1."""
    return validate_int(call, name, size)


def validate_sizes(call: str, **sizes: Any) -> tuple[int, ...]:
    """The sizes as Python integers of at least 1, in the order given."""
    return tuple(validate_size(call, name, size) for name, size in sizes.items())


def validate_number(
    call: str, name: str, value: Any, *, above: float | None = None
) -> float:
    """`value` as a Python float, above `above`, by default at least 0."""
    found = as_python(value)
    if not is_number(found) or (found < 0 if above is None else found <= above):
        bound = "at least 0" if above is None else f"above {above}"
        allowed = f"a number that float32 holds, {bound}"
        raise invalid_argument(call, name, value, allowed)
    return float(found)


def validate_dtype(call: str, dtype: Any) -> np.dtype:
    """A dtype of weights, which JAX has as it is set: float64 needs x64."""
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
    """Refuses what is not one key of `jax.random`."""
    is_array = isinstance(key, jax.Array | np.ndarray)
    is_new = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_raw = is_array and key.dtype == np.uint32
    if not (is_new and key.ndim == 0 or is_raw and key.ndim == 1):
        raise invalid_argument(call, "key", key, "one key, as from jax.random.key(0)")


def path_of(call: str, name: str, value: Any) -> pathlib.Path:
    """The path that a user gave, with `~` for the home directory."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise invalid_argument(call, name, value, "a path, as a str or an os.PathLike")
    return pathlib.Path(os.path.expanduser(text))


def validate_flag(call: str, name: str, value: Any) -> None:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool | np.bool_):
        raise invalid_argument(call, name, value, "True or False")


def validate_floating(call: str, x: Array, name: str = "x") -> None:
    """Refuses arrays of integers, booleans and complex numbers."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{call} was called with {name} of dtype {x.dtype}: it needs a "
            "floating-point array; cast it first."
        )


def validate_activations(
    call: str,
    x: Array,
    weight: Array | AbstractWeight | LoRAWeight | Slice,
    dims: tuple[str, ...] | None = None,
) -> None:
    """Refuses activations of other `dims`, channels or dtype than the weight wants."""
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
    """Refuses token ids or positions that are not one for each token."""
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{call} was called with {name} of shape {ids.shape} and dtype "
            f"{ids.dtype}: they must be integers of shape {shape}, as x has tokens."
        )


def validate_integers(call: str, name: str, values: Any) -> None:
    """Refuses what is no array of integers."""
    is_array = isinstance(values, jax.Array | np.ndarray)
    if not is_array or not jnp.issubdtype(values.dtype, jnp.integer):
        found = values.dtype if is_array else type(values).__name__
        raise ValueError(f"{call}: {name} must be an array of integers, not {found}.")


def validate_counts(call: str, lengths: _Counts, most: _Counts) -> _Counts:
    """Tokens of each row as int32, checked, as far as known, to be in `[0, most]`."""
    validate_integers(call, "lengths", lengths)
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
