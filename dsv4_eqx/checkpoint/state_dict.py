"""A model from a mapping of names to arrays, complete or not at all."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv4_eqx.checkpoint.names import Source, sources
from dsv4_eqx.config import Config
from dsv4_eqx.model import DeepSeekV4

_EMBEDDING = {True: "embed.weight", False: "model.embed_tokens.weight"}


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
    model, or has another shape or kind of dtype than it should.
    """
    official = _EMBEDDING[True] in tensors
    if dtype is None:
        embedding = tensors.get(_EMBEDDING[official])
        dtype = jnp.float32 if embedding is None else np.asarray(embedding[:0]).dtype
    model = abstract_model(config, jnp.dtype(dtype))
    if not official and not any(name.startswith("mtp.") for name in tensors):
        model = eqx.tree_at(lambda m: m.mtp, model, ())
    wanted = list(sources(model, official=official))
    _check_complete(wanted, tensors)
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
    wanted: list[tuple[Source, Any]], tensors: Mapping[str, Any]
) -> None:
    faults, known = [], set()
    for source, leaf in wanted:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        for name in source.names.flat:
            known.add(name)
            if name not in tensors:
                faults.append(f"{name} is missing (shape {source.tensor_shape})")
                continue
            shape = tuple(tensors[name].shape)
            if shape != source.tensor_shape:
                faults.append(
                    f"{name} has the shape {shape}, not {source.tensor_shape}"
                )
            found = np.asarray(tensors[name][:0]).dtype
            if jnp.issubdtype(found, jnp.floating) != is_float:
                faults.append(f"{name} has the dtype {found}, for {leaf.dtype}")
    faults += [f"{name} is not part of the model" for name in tensors.keys() - known]
    if faults:
        raise ValueError(
            f"from_state_dict: {len(faults)} faults:\n  " + "\n  ".join(sorted(faults))
        )


def _assemble(source: Source, leaf: Any, tensors: Mapping[str, Any]) -> Array:
    out = np.empty(leaf.shape, leaf.dtype)
    for index in np.ndindex(source.names.shape):
        name = str(source.names[index])
        value = np.asarray(tensors[name])
        if value.dtype == np.int64 and np.any(value != value.astype(np.int32)):
            raise ValueError(f"from_state_dict: {name} has values beyond int32.")
        out[index] = value.reshape(out[index].shape)
    return jnp.asarray(out)
