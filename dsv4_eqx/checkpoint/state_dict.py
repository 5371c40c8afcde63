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
from dsv4_eqx.checks import refusal
from dsv4_eqx.config import Config
from dsv4_eqx.model import DeepSeekV4

_EMBEDDING: Final = {True: "embed.weight", False: "model.embed_tokens.weight"}
_OF_HF: Final = ("model.", "lm_head.")
_OF_BOTH: Final = "mtp."
# Others, FP8 and FP4, mean nothing without their scales.
_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


def from_state_dict(
    config: Config, tensors: Mapping[str, Any], *, dtype: DTypeLike | None = None
) -> DeepSeekV4:
    """Builds a model from arrays under DeepSeek's or Hugging Face's names.

    The naming is the one that more of the names belong to. Hugging Face's state dicts
    have no prediction (MTP) blocks: where the names are Hugging Face's and none begins
    with `mtp.`, the model has none either.

    **Arguments:**

    - `config`: of the model.
    - `tensors`: arrays of numpy or JAX, or others with a shape that numpy reads
        (torch's are detached, on the CPU and not bfloat16), not quantised.
    - `dtype`: of the weights that need not stay float32; the embedding's by default.

    **Raises:** ValueError that lists every tensor that is missing, is not part of the
    model, is given under both namings, cannot be read, has another shape or kind of
    dtype than it should or a finite value that the model's dtype cannot hold, and every
    routing table that names an expert which there is not; ValueError if `dtype` is none
    for weights.
    """
    official = _is_official(tensors)
    if dtype is None:
        found = _dtype_of(tensors.get(_EMBEDDING[official]))
        # Another is a fault, found below with the rest of them. JAX without x64 has no
        # float64.
        is_weight = found is not None and found.name in _FLOATS
        dtype = jax.dtypes.canonicalize_dtype(found if is_weight else jnp.float32)
    elif not _is_for_weights(dtype):
        allowed = f"one of {', '.join(_FLOATS)}"
        raise refusal("from_state_dict", "dtype", dtype, allowed)
    model = abstract_model(config, jnp.dtype(dtype))
    if not official and not any(name.startswith(_OF_BOTH) for name in tensors):
        model = eqx.tree_at(lambda m: m.mtp, model, ())
    wanted = list(sources(model, official=official))
    other = [source for source, _ in sources(model, official=not official)]
    _check_complete(wanted, other, tensors, config.n_routed_experts)
    leaves = [_assemble(source, leaf, tensors) for source, leaf in wanted]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def abstract_model(config: Config, dtype: DTypeLike) -> DeepSeekV4:
    """A model of shapes and dtypes, without a number in it.

    **Arguments:**

    - `config`: of the model.
    - `dtype`: of the weights that need not stay float32.
    """
    return eqx.filter_eval_shape(DeepSeekV4, config, key=jax.random.key(0), dtype=dtype)


def _is_official(tensors: Mapping[str, Any]) -> bool:
    of_one = [name for name in tensors if not name.startswith(_OF_BOTH)]
    return 2 * sum(name.startswith(_OF_HF) for name in of_one) <= len(of_one)


def _is_for_weights(dtype: DTypeLike) -> bool:
    try:
        return jnp.dtype(dtype).name in _FLOATS
    except TypeError:
        return False


def _check_complete(
    wanted: list[tuple[Source, Any]],
    other: list[Source],
    tensors: Mapping[str, Any],
    num_experts: int,
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
    twins = _twins([source for source, _ in wanted], other)
    for name in tensors.keys() - known:
        given = [twin for twin in twins.get(name, ()) if twin in tensors]
        fault = f"is {given[0]}, given twice" if given else "is not part of the model"
        faults.append(f"{name} {fault}")
    if faults:
        raise ValueError(
            f"from_state_dict: {len(faults)} faults:\n  " + "\n  ".join(sorted(faults))
        )


def _twins(wanted: list[Source], other: list[Source]) -> dict[str, list[str]]:
    """For each name under the other naming, what the same numbers are called here."""
    twins = {}
    for here, there in zip(wanted, other):
        # One naming may have a tensor for each expert where the other has one for all.
        shared = here.names.shape[: there.names.ndim]
        for index in np.ndindex(shared):
            names = list(np.ravel(here.names[index]))
            twins |= dict.fromkeys(np.ravel(there.names[index]), names)
    return twins


def _faults(
    tensor: Any, shape: tuple[int, ...], leaf: Any, num_experts: int
) -> Iterator[str]:
    """What is wrong with a tensor of a leaf."""
    dtype = _dtype_of(tensor)
    if dtype is None:
        yield _why_unreadable(tensor)
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
    elif float(jnp.finfo(dtype).max) > float(jnp.finfo(leaf.dtype).max):
        yield from _range_faults(np.asarray(tensor), leaf.dtype)


def _table_faults(table: np.ndarray, dtype: Any, num_experts: int) -> Iterator[str]:
    """The first entry that is no expert; JAX would clamp it in silence."""
    outside = np.argwhere((table < 0) | (table >= num_experts))
    if len(outside) > 0:
        place = [int(i) for i in outside[0]]
        value, limits = int(table[tuple(place)]), np.iinfo(dtype)
        beyond = "" if limits.min <= value <= limits.max else f", beyond {dtype}"
        yield f"names the expert {value} at {place}{beyond}; there are {num_experts}"


def _range_faults(values: np.ndarray, dtype: Any) -> Iterator[str]:
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


def _why_unreadable(tensor: Any) -> str:
    kind = type(tensor).__name__
    if not hasattr(tensor, "shape"):
        return f"is a {kind}, not an array"
    if getattr(tensor, "requires_grad", False):
        return f"is a {kind} that requires a gradient: detach it"
    return f"is a {kind} that numpy cannot read"


def _dtype_of(tensor: Any) -> np.dtype | None:
    """The dtype that numpy gives a tensor, reading nothing of it; None for no array."""
    if not hasattr(tensor, "shape"):
        return None
    try:
        return np.asarray(tensor[:0] if len(tensor.shape) > 0 else tensor).dtype
    except (TypeError, RuntimeError):  # bfloat16 of torch, one with a gradient
        return None


def _assemble(source: Source, leaf: Any, tensors: Mapping[str, Any]) -> Array:
    out = np.empty(leaf.shape, leaf.dtype)
    for index in np.ndindex(source.names.shape):
        value = np.asarray(tensors[str(source.names[index])])
        out[index] = value.reshape(out[index].shape)
    return jnp.asarray(out)
