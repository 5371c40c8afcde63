"""Adapters alone, in the files that PEFT reads and writes for transformers' model.

`adapter_model.safetensors` has A and B of each of transformers' modules, a layer at a
time, under PEFT's names. Where transformers has one parameter for several matrices of
ours, PEFT adapts the parameter (`target_parameters`):

- Routed experts are stacked: A is [experts * rank, in], B [out, rank * experts]. Of two
  parameters of a module, PEFT calls the first one's `base_layer`.
- The grouped output projection is one matrix below another. Its groups' adapters are a
  single one of rank groups * rank, whose B is block-diagonal.
"""

import math
import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dsv4_eqx.checkpoint.adapter_config import (
    GATE_UP,
    GROUPED,
    STACKED,
    adapter_config,
    read_adapter_config,
)
from dsv4_eqx.checkpoint.faults import faults_error
from dsv4_eqx.checkpoint.names import Source, sources
from dsv4_eqx.checkpoint.tensors import (
    StoredTensor,
    read_header,
    read_region,
    whole,
)
from dsv4_eqx.checkpoint.write import (
    SHOWN_BYTES,
    NewTensor,
    check_free,
    new_directory,
    validate_target,
    write_file,
    write_json,
)
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.lora_weight import LoRAWeight, is_lora
from dsv4_eqx.numerics.precision import wide_dtype
from dsv4_eqx.numerics.validation import FLOATS, path_of
from dsv4_eqx.sharding.sharded_model import ShardedModel, model_on_device
from dsv4_eqx.training.lora import (
    adaptable,
    factor_shapes,
    validate_has_adapters,
    validate_without_adapters,
    with_adapters,
)

_WEIGHTS: Final = "adapter_model.safetensors"
_CONFIG: Final = "adapter_config.json"
_OWN_FILES: Final = (_WEIGHTS, _CONFIG, "README.md")
_PREFIX: Final = "base_model.model."
_Model = TypeVar("_Model", DeepSeekV4, ShardedModel)


class _Place(NamedTuple):
    """One of transformers' parameters, and the part of a weight's adapter for it."""

    parameter: str  # its full name
    at: tuple[int, ...]  # of stacked layers, and of two parameters of one weight
    key: str  # of the tensors of A and B, without their endings

    @property
    def names(self) -> tuple[str, str]:
        """The tensors of A and B."""
        return f"{self.key}.lora_A.weight", f"{self.key}.lora_B.weight"


def save_lora(
    model: DeepSeekV4 | ShardedModel,
    directory: str | os.PathLike,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
) -> None:
    """Writes a model's adapters alone, for PEFT and for `load_lora`.

    `peft.PeftModel.from_pretrained(model, directory)` adds them to transformers' model.
    Where the grouped output projection has adapters, PEFT 0.21 warns that it ignored
    their rank, since it looks for modules alone; it does not. The directory appears
    under its name when everything is on the disk.

    **Arguments:**

    - `model`: with adapters, on any devices of this process.
    - `directory`: missing or empty.
    - `overwrite`: replaces adapters that are there.
    - `base_model`: name of the model they are for, which PEFT's configuration has.

    **Raises:** ValueError if the model has no adapters, or several ranks or alphas; if
    there is something in the directory that may not be replaced; or if the model has no
    numbers, as under `jit`, or parts on other processes' devices.
    """
    call = "save_lora"
    target = validate_target(
        call, "directory", directory, overwrite=overwrite, own_files=_OWN_FILES
    )
    inner = model_on_device(call, model)
    validate_has_adapters(call, inner)
    weights = [
        (source, leaf)
        for source, leaf in sources(inner, official=False)
        if is_lora(leaf)
    ]
    ranks = {(leaf.rank, leaf.alpha) for _, leaf in weights}
    if len(ranks) > 1:
        raise ValueError(
            f"{call}: adapters have the ranks and alphas {sorted(ranks)}: PEFT's "
            "configuration has one of each for all; make them by a single lora(...)."
        )
    for source, leaf in weights:
        _check_numbers(call, source.path, leaf)
    placed = _places([source for source, _ in weights])
    tensors = [
        tensor
        for places, (_, leaf) in zip(placed, weights, strict=True)
        for place in places
        for tensor in _tensors(place, leaf)
    ]
    parameters = [place.parameter for places in placed for place in places]
    config = adapter_config(inner.config, parameters, *ranks.pop(), base_model)
    total = sum(tensor.num_bytes for tensor in tensors)
    with (
        tqdm(desc="saving", total=total, **SHOWN_BYTES) as progress,
        new_directory(target) as filling,
    ):
        write_file(filling / _WEIGHTS, tensors, progress)
        write_json(filling / _CONFIG, config)
        check_free(str(target), target, overwrite, _OWN_FILES)  # again: it took a while


def load_lora(model: _Model, directory: str | os.PathLike) -> _Model:
    """The model with the adapters that a directory has, of `save_lora` or of PEFT.

    Everything in the files must be an adapter of the model, and everything that an
    adapter needs must be there. They become float32, or wider if the weights are.

    **Arguments:**

    - `model`: without adapters, packed or not, over a mesh or not.
    - `directory`: with `adapter_model.safetensors` and `adapter_config.json`.

    **Raises:** ValueError naming file and tensor if anything is missing, extra,
    misshapen or no number, or the configuration asks for something else than plain
    LoRA; or if the model has adapters already.
    """
    call = "load_lora"
    inner = model_on_device(call, model)
    validate_without_adapters(call, inner)
    path = path_of(call, "directory", directory)
    config = read_adapter_config(path / _CONFIG)
    rank, alpha = config["r"], config["lora_alpha"]
    stored = read_header(path / _WEIGHTS)
    known = adaptable(inner)
    found = [s for s, _ in sources(inner, official=False) if s.path in known]
    found = _adapted_sources(found, stored, config)
    faults, factors, used = [], {}, set()
    for source, places in zip(found, _places(found), strict=True):
        weight, form = known[source.path]
        shapes = factor_shapes(weight.shape, form, rank)
        dtype = wide_dtype(weight.dtype)
        pair = np.empty(shapes[0], dtype), np.empty(shapes[1], dtype)
        for place in places:
            used |= set(place.names)
            faults += _read_pair(place, stored, pair)
        factors[source.path] = tuple(map(jnp.asarray, pair))
    faults += [f"{name} is no adapter of the model" for name in stored.keys() - used]
    if not factors:
        faults.append("there is no adapter of the model")
    if faults:
        raise faults_error(f"{call}({str(path / _WEIGHTS)!r})", faults)
    return with_adapters(model, factors, alpha)


def _places(found: list[Source]) -> list[list[_Place]]:
    """Of each weight that has adapters, transformers' parameters."""
    parameters = {str(name) for source in found for name in source.names.flat}

    def place(name: str, index: tuple[int, ...]) -> _Place:
        module = name.removesuffix(".weight")
        if name.endswith(STACKED):
            module = name.rpartition(".")[0]
            # PEFT wraps a module once more for each parameter, in their order.
            is_inner = name.endswith(GATE_UP) and f"{module}.down_proj" in parameters
            module += ".base_layer" if is_inner else ""
        return _Place(name, index, _PREFIX + module)

    return [
        [place(str(s.names[index]), index) for index in np.ndindex(s.names.shape)]
        for s in found
    ]


def _adapted_sources(
    found: list[Source], stored: dict[str, StoredTensor], config: dict[str, Any]
) -> list[Source]:
    """Those that the file has adapters for, wholly or in part."""
    targets = tuple(config.get("target_parameters") or ())

    def is_adapted(source: Source) -> bool:
        for name in map(str, source.names.flat):
            module = name.removesuffix(".weight")
            if name.endswith(STACKED):
                if any(f".{name}".endswith(f".{target}") for target in targets):
                    return True
            elif f"{_PREFIX}{module}.lora_A.weight" in stored:
                return True
        return False

    return [source for source in found if is_adapted(source)]


def _tensors(place: _Place, weight: LoRAWeight) -> Iterator[NewTensor]:
    """A and B of a parameter, as PEFT has them."""
    shapes = [x.shape[len(place.at) :] for x in (weight.a, weight.b)]
    for which, shape in enumerate(_file_shapes(place, *shapes)):

        def read(region: Any, which: int = which) -> np.ndarray:
            pair = (np.asarray(x[place.at]) for x in (weight.a, weight.b))
            return _to_file(place, *pair)[which][region]

        dtype = np.dtype(weight.a.dtype)
        yield NewTensor(place.names[which], dtype, shape, shape, read)


def _file_shapes(place: _Place, shape_a: tuple, shape_b: tuple) -> list:
    """The shapes of the file's A and B, from those of ours without `place.at`."""
    rank = shape_b[-1]
    several = place.parameter.endswith((*STACKED, GROUPED))
    count = shape_a[0] if several else 1
    inner = math.prod(shape_a) // (count * rank)
    outer = math.prod(shape_b) // (count * rank)
    rows = outer * count if place.parameter.endswith(GROUPED) else outer
    return [(count * rank, inner), (rows, count * rank)]


def _to_file(place: _Place, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    rank, shapes = b.shape[-1], _file_shapes(place, a.shape, b.shape)
    count = shapes[0][0] // rank
    b = b.reshape(count, -1, rank)
    if place.parameter.endswith(GROUPED):
        wide = np.zeros((count, b.shape[1], count, rank), b.dtype)
        wide[np.arange(count), :, np.arange(count)] = b
        return [a.reshape(shapes[0]), wide.reshape(shapes[1])]
    # Of stacked experts, the expert is the faster index of B's columns.
    return [a.reshape(shapes[0]), b.transpose(1, 2, 0).reshape(shapes[1])]


def _from_file(
    place: _Place, pair: tuple[np.ndarray, np.ndarray], a: np.ndarray, b: np.ndarray
) -> str | None:
    """Fills our A and B from the file's; what is wrong with them."""
    count, rank = pair[0].shape[0] // b.shape[-1], b.shape[-1]
    a[...] = pair[0].reshape(a.shape)
    if not place.parameter.endswith(GROUPED):
        b[...] = pair[1].reshape(-1, rank, count).transpose(2, 0, 1).reshape(b.shape)
        return None
    wide = pair[1].reshape(count, -1, count, rank)
    b[...] = wide[np.arange(count), :, np.arange(count)]
    is_other = ~np.eye(count, dtype=bool)[:, None, :, None]
    is_diagonal = not (wide * is_other).any()
    return None if is_diagonal else "is not block-diagonal: groups share an adapter"


def _read_pair(
    place: _Place,
    stored: dict[str, StoredTensor],
    pair: tuple[np.ndarray, np.ndarray],
) -> Iterator[str]:
    """Fills a parameter's part of A and B, and tells what is wrong."""
    a, b = (x[place.at + (...,)] for x in pair)
    values = []
    for name, shape in zip(place.names, _file_shapes(place, a.shape, b.shape)):
        tensor = stored.get(name)
        if tensor is None:
            yield f"{name} is missing (shape {shape})"
        elif tensor.shape != shape or tensor.dtype.name not in FLOATS:
            yield (
                f"{name} is {tensor.dtype} of the shape {tensor.shape}, not floats of "
                f"the shape {shape}"
            )
        else:
            value = np.empty(shape, tensor.dtype)
            read_region(tensor, whole(shape), value)
            value = value.astype(a.dtype)
            if not np.isfinite(value).all():
                yield f"{name} has numbers that are not finite"
            values.append(value)
    if len(values) == 2:
        fault = _from_file(place, (values[0], values[1]), a, b)
        if fault is not None:
            yield f"{place.names[1]} {fault}"


def _check_numbers(call: str, name: str, weight: LoRAWeight) -> None:
    for array in (weight.a, weight.b):
        is_known = isinstance(array, jax.Array | np.ndarray)
        if not is_known or isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"{call}: {name} has no numbers; give it a model of arrays, outside of "
                "jit."
            )
        if not getattr(array, "is_fully_addressable", True):
            raise ValueError(
                f"{call}: {name} has parts on other processes' devices; gather the "
                "adapters in one process first."
            )
