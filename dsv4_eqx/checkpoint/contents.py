"""A checkpoint that was opened and judged, of which no weight has been read yet."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_eqx.checkpoint.directory import CONFIG, read_config, read_tensors
from dsv4_eqx.checkpoint.inventory import (
    Plan,
    faults_error,
    make_plan,
    naming_faults,
)
from dsv4_eqx.checkpoint.names import Source
from dsv4_eqx.checkpoint.quantized import (
    BLOCKS,
    FP8,
    KNOWN_QUANTIZATION,
    PackedTensor,
    code_dtype_of,
    scale_faults,
)
from dsv4_eqx.checkpoint.tensors import StoredTensor
from dsv4_eqx.config.config import Config
from dsv4_eqx.numerics.validation import FLOATS, shown

Weight = StoredTensor | PackedTensor


class Contents(NamedTuple):
    """What is in a checkpoint and what it is for."""

    directory: pathlib.Path
    tensors: Mapping[str, StoredTensor]
    plan: Plan
    weights: dict[str, Weight]  # of the plan, by the name of the weight

    def stored(self, source: Source) -> Iterator[StoredTensor]:
        """The tensors that there are of a leaf, scales included.

        **Arguments:**

        - `source`: the leaf.
        """
        for name in source.names.flat:
            weight = self.weights.get(name)
            if isinstance(weight, PackedTensor):
                yield from (weight.codes, weight.scales)
            elif weight is not None:
                yield weight


def open_checkpoint(
    call: str, directory: str | os.PathLike, dtype: DTypeLike | None
) -> Contents:
    """Reads configuration and headers.

    **Arguments:**

    - `call`: what the user called.
    - `directory`: of the checkpoint.
    - `dtype`: of the weights that need not stay float32; the embedding's by default.

    **Raises:** ValueError that lists everything that is wrong.
    """
    contents, faults = judge_checkpoint(call, directory, dtype)
    if faults:
        raise faults_error(f"{call}({str(directory)!r})", faults)
    return contents


def judge_checkpoint(
    call: str, directory: str | os.PathLike, dtype: DTypeLike | None
) -> tuple[Contents, list[str]]:
    """A checkpoint's contents and, one string for each, what is wrong with them.

    **Arguments:** as for `open_checkpoint`.

    **Raises:** ValueError if configuration or headers cannot be read at all.
    """
    directory = pathlib.Path(directory)
    raw = read_config(directory)
    with _naming(directory / CONFIG):
        _check_quantization(raw)
        config = Config.from_hf(raw)
    stored = read_tensors(directory)
    with _naming(directory):
        plan = make_plan(call, config, stored, dtype, lambda tensor: tensor.dtype)
    tensors = plan.tensors
    weights, used, faults = {}, set(), []
    for source, leaf in plan.wanted:
        for name in source.names.flat:
            if name not in tensors:
                continue
            tensor, scale_name = tensors[name], _scale_name(name, tensors)
            scales = tensors.get(scale_name)
            used.add(name)
            found = list(_plain_faults(tensor, source, leaf))
            weights[name] = tensor
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            code_dtype = code_dtype_of(tensor)
            if is_float and found and code_dtype is not None:
                found = list(scale_faults(tensor, scales, source))
                if scales is not None:
                    used.add(scale_name)
                    weights[name] = PackedTensor(tensor, scales, code_dtype)
            own = f"{tensor.name} ({tensor.path.name})"
            faults += [f"{own} {fault}" for fault in found]
    faults += naming_faults(plan, used)
    return Contents(directory, tensors, plan, weights), faults


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Adds the path to an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _scale_name(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """What the scales beside a weight are called, in the naming that has them."""
    official = name.removesuffix("weight") + "scale"
    return official if official in tensors else f"{name}_scale_inv"


def _plain_faults(tensor: StoredTensor, source: Source, leaf: Any) -> Iterator[str]:
    if tensor.shape != source.tensor_shape:
        yield f"has the shape {tensor.shape}, not {source.tensor_shape}"
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        fits = tensor.dtype.name in FLOATS
    else:
        fits = np.issubdtype(tensor.dtype, np.integer)
    if not fits:
        yield f"has the dtype {tensor.dtype}, for {leaf.dtype}"


def _check_quantization(raw: dict[str, Any]) -> None:
    """Refuses other blocks and formats than those that are read here."""
    found = raw.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, dict):
        raise ValueError(f"quantization_config is {shown(found)}, not an object")
    known = KNOWN_QUANTIZATION | {"weight_block_size": list(BLOCKS[FP8])}
    for key, value in known.items():
        if found.get(key, value) != value:
            raise ValueError(
                f"quantization_config has {key} {shown(found[key])}; only {value!r} is "
                "known here"
            )
