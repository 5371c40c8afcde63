"""A model from a mapping of names to arrays, complete or not at all."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv4_eqx.checkpoint.names import Source, sources
from dsv4_eqx.config import Config
from dsv4_eqx.model import DeepSeekV4

_EMBEDDING: Final = {True: "embed.weight", False: "model.embed_tokens.weight"}
# Others, FP8 and FP4, mean nothing without their scales.
_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


def from_state_dict(
    config: Config, tensors: Mapping[str, Any], *, dtype: DTypeLike | None = None
) -> DeepSeekV4:
    """Builds a model from arrays under DeepSeek's or Hugging Face's names.

    Hugging Face's state dicts have no prediction (MTP) blocks: where the names are
    Hugging Face's and none begins with `mtp.`, the model has none either.

    **Arguments:**

    - `config`: of the model.
    - `tensors`: arrays of numpy, JAX or anything that numpy reads, not quantised.
    - `dtype`: of the weights that need not stay float32; the embedding's by default.

    **Raises:** ValueError that lists every tensor that is missing, is not part of the
    model, or has another shape or kind of dtype than it should, and every routing table
    that names an expert which there is not; ValueError if `dtype` is none for weights.
    """
    official = _EMBEDDING[True] in tensors
    if dtype is None:
        found = _dtype_of(tensors.get(_EMBEDDING[official]))
        # Another is a fault, found below with the rest of them. JAX without x64 has no
        # float64.
        is_weight = found is not None and found.name in _FLOATS
        dtype = jax.dtypes.canonicalize_dtype(found if is_weight else jnp.float32)
    elif jnp.dtype(dtype).name not in _FLOATS:
        raise ValueError(
            f"from_state_dict(dtype={jnp.dtype(dtype).name}): must be one of "
            f"{', '.join(_FLOATS)}."
        )
    model = abstract_model(config, jnp.dtype(dtype))
    if not official and not any(name.startswith("mtp.") for name in tensors):
        model = eqx.tree_at(lambda m: m.mtp, model, ())
    wanted = list(sources(model, official=official))
    _check_complete(wanted, tensors, config.n_routed_experts)
    leaves = [_assemble(source, leaf, tensors) for source, leaf in wanted]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def abstract_model(config: Config, dtype: DTypeLike) -> DeepSeekV4:
    """A model of shapes and dtypes, without a number in it.

    **Arguments:**

    - `config`: of the model.
    - `dtype`: of the weights that need not stay float32.
    """
    return eqx.filter_eval_shape(DeepSeekV4, config, key=jax.random.key(0), dtype=dtype)


def _check_complete(
    wanted: list[tuple[Source, Any]], tensors: Mapping[str, Any], num_experts: int
) -> None:
    faults, known = [], set()
    for source, leaf in wanted:
        for name in source.names.flat:
            known.add(name)
            if name in tensors:
                found = _faults(tensors[name], source.tensor_shape, leaf, num_experts)
                faults += [f"{name} {fault}" for fault in found]
            else:
                faults.append(f"{name} is missing (shape {source.tensor_shape})")
    faults += [f"{name} is not part of the model" for name in tensors.keys() - known]
    if faults:
        raise ValueError(
            f"from_state_dict: {len(faults)} faults:\n  " + "\n  ".join(sorted(faults))
        )


def _faults(
    tensor: Any, shape: tuple[int, ...], leaf: Any, num_experts: int
) -> Iterator[str]:
    """What is wrong with a tensor of a leaf."""
    dtype = _dtype_of(tensor)
    if dtype is None:
        yield f"is a {type(tensor).__name__} that numpy cannot read, not an array"
        return
    if tuple(tensor.shape) != shape:
        yield f"has the shape {tuple(tensor.shape)}, not {shape}"
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    if is_float and jnp.issubdtype(dtype, jnp.floating) and dtype.name not in _FLOATS:
        yield f"has the dtype {dtype}, for {leaf.dtype}: multiply it by its scales"
    elif not (dtype.name in _FLOATS if is_float else np.issubdtype(dtype, np.integer)):
        yield f"has the dtype {dtype}, for {leaf.dtype}"
    elif not is_float:
        yield from _table_faults(np.asarray(tensor), leaf.dtype, num_experts)


def _table_faults(table: np.ndarray, dtype: Any, num_experts: int) -> Iterator[str]:
    """The first entry that is no expert; JAX would clamp it in silence."""
    outside = np.argwhere((table < 0) | (table >= num_experts))
    if len(outside) > 0:
        place = [int(i) for i in outside[0]]
        value, limits = int(table[tuple(place)]), np.iinfo(dtype)
        beyond = "" if limits.min <= value <= limits.max else f", beyond {dtype}"
        yield f"names the expert {value} at {place}{beyond}; there are {num_experts}"


def _dtype_of(tensor: Any) -> np.dtype | None:
    """The dtype that numpy gives a tensor, reading nothing of it; None for no array."""
    if not hasattr(tensor, "shape"):
        return None
    try:
        return np.asarray(tensor[:0] if len(tensor.shape) > 0 else tensor).dtype
    except TypeError:  # bfloat16 of torch
        return None


def _assemble(source: Source, leaf: Any, tensors: Mapping[str, Any]) -> Array:
    out = np.empty(leaf.shape, leaf.dtype)
    for index in np.ndindex(source.names.shape):
        value = np.asarray(tensors[str(source.names[index])])
        out[index] = value.reshape(out[index].shape)
    return jnp.asarray(out)
