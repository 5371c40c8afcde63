"""A model from a mapping of names to arrays, complete or not at all."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv4_eqx.checkpoint.faults import faults_error
from dsv4_eqx.checkpoint.inventory import (
    NamedTensors,
    chosen_dtype,
    match_names,
    naming_faults,
    warn_of,
)
from dsv4_eqx.checkpoint.names import Source
from dsv4_eqx.config.config import Config
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.validation import FLOATS, invalid_argument


def from_state_dict(
    config: Config,
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    dtype: DTypeLike | None = None,
) -> DeepSeekV4:
    """Builds a model from arrays under DeepSeek's or Hugging Face's names.

    Also under the mixed ones that transformers writes into its files.

    The naming is the one that more of the names belong to. Where no name begins with
    `mtp.`, as in all of Hugging Face's state dicts, the model has no prediction (MTP)
    block either; a warning says so where the names are official.

    **Arguments:**

    - `config`: of the model.
    - `tensors`: arrays of numpy, JAX or torch, or others with a shape that numpy
        reads, by name; not quantised.
    - `dtype`: of the weights that need not stay float32; the embedding's by default,
        and for `"auto"`.

    **Raises:** ValueError that lists every tensor that is missing, is not part of the
    model, is given under both namings, cannot be read, has another shape or kind of
    dtype than it should or a finite value that the model's dtype cannot hold, and every
    routing table that names an expert which there is not; ValueError if `config` or
    `tensors` are something else, or `dtype` is none for weights.
    """
    if not isinstance(config, Config):
        raise invalid_argument("from_state_dict", "config", config, "a Config")
    try:  # pairs too, as torch's `named_parameters()` gives them
        by_name: dict[str, Any] = dict(tensors)
    except (TypeError, ValueError) as error:
        allowed = "a mapping of names to arrays"
        raise invalid_argument(
            "from_state_dict", "tensors", type(tensors).__name__, allowed
        ) from error
    chosen = chosen_dtype("from_state_dict", dtype)
    named = match_names("from_state_dict", config, by_name, chosen, _dtype_of)
    _check_complete(named)
    if named.official:
        warn_of("from_state_dict", named.notes)
    leaves = [_assemble(source, leaf, named.tensors) for source, leaf in named.wanted]
    return jax.tree.unflatten(jax.tree.structure(named.model), leaves)


def _check_complete(named: NamedTensors) -> None:
    faults, known, tensors = [], set(), named.tensors
    num_experts = named.model.config.n_routed_experts
    for source, leaf in named.wanted:
        for name in source.names.flat:
            if name in tensors:
                known.add(name)
                found = _faults(tensors[name], source.tensor_shape, leaf, num_experts)
                faults += [f"{name} {fault}" for fault in found]
    faults += naming_faults(named, known, _as_numpy)
    if faults:
        raise faults_error("from_state_dict", faults)


def _faults(
    tensor: Any, shape: tuple[int, ...], leaf: Any, num_experts: int
) -> Iterator[str]:
    """What is wrong with a tensor of a leaf."""
    dtype = _dtype_of(tensor)
    if dtype is None:
        kind, is_array = type(tensor).__name__, hasattr(tensor, "shape")
        why = " that numpy cannot read" if is_array else ", not an array"
        yield f"is a {kind}{why}"
        return
    if tuple(tensor.shape) != shape:
        yield f"has the shape {tuple(tensor.shape)}, not {shape}"
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    if is_float and jnp.issubdtype(dtype, jnp.floating) and dtype.name not in FLOATS:
        yield f"has the dtype {dtype}, for {leaf.dtype}: multiply it by its scales"
    elif not (dtype.name in FLOATS if is_float else np.issubdtype(dtype, np.integer)):
        yield f"has the dtype {dtype}, for {leaf.dtype}"
    elif not is_float:
        yield from table_faults(_as_numpy(tensor), leaf.dtype, num_experts)
    elif float(jnp.finfo(dtype).max) > float(jnp.finfo(leaf.dtype).max):
        yield from range_faults(_as_numpy(tensor), leaf.dtype)


def table_faults(
    table: np.ndarray, dtype: Any, num_experts: int, first_row: int = 0
) -> Iterator[str]:
    """The first entry that is no expert; JAX would clamp it in silence."""
    outside = np.argwhere((table < 0) | (table >= num_experts))
    if len(outside) > 0:
        place = [int(i) for i in outside[0]]
        value, limits = int(table[tuple(place)]), np.iinfo(dtype)
        place[0] += first_row
        beyond = "" if limits.min <= value <= limits.max else f", beyond {dtype}"
        yield f"names the expert {value} at {place}{beyond}; there are {num_experts}"


def range_faults(values: np.ndarray, dtype: Any) -> Iterator[str]:
    """The first finite number that would become infinite."""
    limit = float(jnp.finfo(dtype).max)
    with np.errstate(over="ignore", invalid="ignore"):
        # Nearly always enough, and it makes no array; NaN is never within.
        if -limit <= values.min(initial=0) and values.max(initial=0) <= limit:
            return
        becomes_infinite = np.isfinite(values) & np.isinf(values.astype(dtype))
    outside = np.argwhere(becomes_infinite)
    if len(outside) > 0:
        place = [int(i) for i in outside[0]]
        yield f"has {float(values[tuple(place)])} at {place}, beyond {dtype}"


def _dtype_of(tensor: Any) -> np.dtype | None:
    """The dtype that numpy gives a tensor, reading nothing of it; None for no array."""
    if not hasattr(tensor, "shape"):
        return None
    try:
        return _as_numpy(tensor[:0] if len(tensor.shape) > 0 else tensor).dtype
    except (TypeError, RuntimeError):
        return None


def _as_numpy(tensor: Any) -> np.ndarray:
    """The numbers of a tensor; of torch's by their bits where numpy has no such."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        name = str(tensor.dtype).removeprefix("torch.")
        if hasattr(ml_dtypes, name):
            torch: Any = sys.modules["torch"]
            bits = {1: torch.uint8, 2: torch.int16}[tensor.dtype.itemsize]
            return tensor.view(bits).numpy().view(getattr(ml_dtypes, name))
    return np.asarray(tensor)


def _assemble(source: Source, leaf: Any, tensors: Mapping[str, Any]) -> Array:
    out = np.empty(leaf.shape, leaf.dtype)
    for index in np.ndindex(source.names.shape):
        value = _as_numpy(tensors[str(source.names[index])])
        out[index] = value.reshape(out[index].shape)
    return jnp.asarray(out)
