"""What is in a checkpoint and what it is for, before any weight has been read.

The names say which naming it is in; the configuration, which tensors there must be.
What is missing, extra or misshapen is collected and told all at once. What may be left
out, and is, becomes a note: prediction blocks that are not there, and a drafter.
"""

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv4_eqx.checkpoint.directory import CONFIG, read_config, read_tensors
from dsv4_eqx.checkpoint.faults import faults_error, naming
from dsv4_eqx.checkpoint.names import Source, is_mixed, published_names, sources
from dsv4_eqx.checkpoint.quantized import (
    BLOCKS,
    FP8,
    KNOWN_QUANTIZATION,
    QuantizedTensor,
    code_dtype_of,
    scale_faults,
)
from dsv4_eqx.checkpoint.tensors import StoredTensor, read_region, whole
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.kinds import HASH_MOE
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.numerics.validation import (
    FLOATS,
    invalid_argument,
    shown,
    validate_dtype,
)

_EMBEDDING: Final = {True: "embed.weight", False: "model.embed_tokens.weight"}
_OF_HF: Final = ("model.", "lm_head.")
_OF_BOTH: Final = "mtp."
# Of the drafter DSpark, which stands where other releases have prediction blocks.
_OF_DSPARK: Final = re.compile(
    r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\."
)
# A release does without, other programs write zeros.
_BIAS: Final = re.compile(
    r"(?:model\.)?layers\.(\d+)\.(?:ffn\.gate\.bias|mlp\.gate\.e_score_correction_bias)"
)
# Formats that are not read, by what the name of one of their tensors ends in.
_FOREIGN: Final = {
    "weight_scale_2": "NVFP4",
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
}
# A configuration that asks for more than this, and for far more than there is, has a
# wrong number in it; listing what is missing would take long.
_MOST_NAMES: Final = 150_000  # of experts; the largest released model has 71,424
_MOST_BLOCKS: Final = 64  # the largest released model has 62
_LEAST_OF_BLOCK: Final = 20  # tensors of a block, at least, in any naming


class NamedTensors(NamedTuple):
    """Tensors by name, and the model without numbers that they are for."""

    model: Any  # a DeepSeekV4 or a DSpark
    tensors: Mapping[str, Any]  # what there is, under the names that are wanted
    wanted: list[tuple[Source, Any]]  # each leaf's tensors, and the abstract leaf
    other: list[Source]  # the same under the other naming
    official: bool  # which naming that is
    notes: list[str]  # what there is, or should be, and the model is without


class Checkpoint(NamedTuple):
    """A checkpoint whose headers have been read and fit its configuration."""

    directory: pathlib.Path
    model: Any  # a DeepSeekV4 or a DSpark, of shapes and dtypes
    tensors: Mapping[str, StoredTensor]
    wanted: list[tuple[Source, Any]]
    weights: dict[str, StoredTensor | QuantizedTensor]  # that are wanted, by name
    notes: list[str]  # as of `NamedTensors`

    def stored(self, source: Source) -> Iterator[StoredTensor]:
        """The tensors that there are of a leaf, scales included."""
        for name in source.names.flat:
            weight = self.weights.get(name)
            if isinstance(weight, QuantizedTensor):
                yield from (weight.codes, weight.scales)
            elif weight is not None:
                yield weight


def open_checkpoint(
    call: str, directory: pathlib.Path, dtype: np.dtype | None
) -> Checkpoint:
    """Reads configuration and headers; one error for everything that is wrong."""
    checkpoint, faults = inspect_checkpoint(call, directory, dtype)
    if faults:
        raise faults_error(f"{call}({str(directory)!r})", faults)
    warn_of(call, checkpoint.notes)
    return checkpoint


def chosen_dtype(call: str, dtype: Any) -> np.dtype | None:
    """The dtype that the user asks for; None for the checkpoint's own."""
    if dtype is None or isinstance(dtype, str) and dtype == "auto":
        return None
    return validate_dtype(call, dtype)


def warn_of(call: str, notes: Collection[str]) -> None:
    """A warning for each note."""
    for note in notes:
        warnings.warn(f"{call}: {note}", stacklevel=4)


def inspect_checkpoint(
    call: str, directory: pathlib.Path, dtype: np.dtype | None
) -> tuple[Checkpoint, list[str]]:
    """What is in a checkpoint, and what is wrong with it."""
    raw = read_config(directory)
    with naming(directory / CONFIG):
        check_quantization(raw)
        config = Config.from_hf(raw)
    stored = read_tensors(directory)
    with naming(directory):
        named = match_names(call, config, stored, dtype, lambda tensor: tensor.dtype)
    return with_weights(directory, named)


def with_weights(
    directory: pathlib.Path, named: NamedTensors
) -> tuple[Checkpoint, list[str]]:
    """The tensors with their scales, and what is wrong with them."""
    weights, used, faults = {}, set(), []
    for source, leaf in named.wanted:
        for name in source.names.flat:
            if name not in named.tensors:
                continue
            tensor = named.tensors[name]
            scale_name = _scale_name(name, named.tensors)
            weight, found = _weight(tensor, named.tensors.get(scale_name), source, leaf)
            weights[name] = weight
            used |= {name, scale_name} if weight is not tensor else {name}
            faults += [f"{tensor.name} ({tensor.path.name}) {fault}" for fault in found]
    faults += naming_faults(named, used, _read_whole)
    found = Checkpoint(
        directory, named.model, named.tensors, named.wanted, weights, named.notes
    )
    return found, faults


def _read_whole(tensor: StoredTensor) -> np.ndarray:
    out = np.empty(tensor.shape, tensor.dtype)
    read_region(tensor, whole(tensor.shape), out)
    return out


def _weight(
    tensor: StoredTensor, scales: StoredTensor | None, source: Source, leaf: Any
) -> tuple[StoredTensor | QuantizedTensor, list[str]]:
    """A tensor with its scales if it has some, and what is wrong with it."""
    faults = list(_plain_faults(tensor, source, leaf))
    code_dtype = code_dtype_of(tensor)
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    if not (is_float and faults and code_dtype is not None):
        return tensor, faults
    faults = list(scale_faults(tensor, scales, source))
    if scales is None:
        return tensor, faults
    return QuantizedTensor(tensor, scales, code_dtype), faults


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


def check_quantization(raw: dict[str, Any]) -> None:
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


def match_names(
    call: str,
    config: Config,
    tensors: Mapping[str, Any],
    dtype: np.dtype | None,
    dtype_of: Callable[[Any], np.dtype | None],
) -> NamedTensors:
    """The model that some tensors are for, whose weights have the embedding's dtype."""
    for name in tensors:
        if not isinstance(name, str):
            raise invalid_argument(call, "tensors", name, "named by texts")
    mixed = is_mixed(tensors)
    meant = published_names(tensors, mixed=mixed)
    tensors = {name: tensors[given] for name, given in meant.items()}
    official = mixed or _is_official(tensors)
    _check_formats(tensors)
    if dtype is None:
        embedding = tensors.get(_EMBEDDING[official])
        found = None if embedding is None else dtype_of(embedding)
        # Another is a fault, found later with the rest of them.
        is_weight = found is not None and found.name in FLOATS
        dtype = validate_dtype(call, found if is_weight else jnp.float32)
    tensors, num_blocks, notes = _without_drafter(config, tensors)
    config = dataclasses.replace(config, num_nextn_predict_layers=num_blocks)
    _validate_count(call, config, len(tensors))
    model = abstract_model(config, dtype)
    wanted = list(sources(model, official=official))
    other = [source for source, _ in sources(model, official=not official)]
    return NamedTensors(model, tensors, wanted, other, official, notes)


def _without_drafter(
    config: Config, tensors: Mapping[str, Any]
) -> tuple[Mapping[str, Any], int, list[str]]:
    """The tensors that may be loaded, prediction blocks among them, and what is left.

    transformers drops prediction blocks when it saves, and so do others.
    """
    num_blocks = config.num_nextn_predict_layers
    others = {n: t for n, t in tensors.items() if not n.startswith(_OF_BOTH)}
    num_left = len(tensors) - len(others)
    if any(map(_OF_DSPARK.match, tensors)):
        note = (
            f"the drafter DSpark, {num_left} tensors mtp.*, is not loaded; the model "
            "is without it, and has no prediction block; load_dspark loads the drafter"
        )
        return others, 0, [note]
    if num_blocks > 0 and num_left == 0:
        note = (
            f"the configuration has num_nextn_predict_layers={num_blocks} and there "
            "are no tensors mtp.*; the model is without prediction block"
        )
        return tensors, 0, [note]
    return tensors, num_blocks, []


def _check_formats(names: Collection[str]) -> None:
    """Refuses formats of other programs in one sentence."""
    for ending, format_name in _FOREIGN.items():
        count = sum(name.endswith(f".{ending}") for name in names)
        if count > 0:
            raise ValueError(
                f"{count} weights are in the format {format_name} (tensors "
                f"*.{ending}), which is not read here; use the release, in FP8 and "
                "FP4, or a checkpoint in bfloat16."
            )


def naming_faults(
    named: NamedTensors,
    used: Collection[str],
    read: Callable[[Any], np.ndarray],
) -> Iterator[str]:
    """What is missing, extra, or given under both namings."""
    names = named.tensors.keys()
    for source, _ in named.wanted:
        for name in source.names.flat:
            if name not in names:
                yield f"{name} is missing (shape {source.tensor_shape})"
    extra = [name for name in names if name not in used]
    twins = _twins(named) if extra else {}
    for name in extra:
        if _is_bias_of_hash_layer(named, name):
            if np.any(read(named.tensors[name])):
                yield f"{name} is not zero, and its layer routes by token id"
            continue
        given = [twin for twin in twins.get(name, ()) if twin in used]
        fault = f"is {given[0]}, given twice" if given else "is not part of the model"
        yield f"{name} {fault}"


def _is_bias_of_hash_layer(named: NamedTensors, name: str) -> bool:
    """Whether it is a bias, for scores that a layer has no use for."""
    match, config = _BIAS.fullmatch(name), named.model.config
    if match is None or len(match[1]) > 9 or int(match[1]) >= config.num_hidden_layers:
        return False
    is_hashed = config.mlp_layer_types[int(match[1])] == HASH_MOE
    shape = getattr(named.tensors[name], "shape", None)
    return (
        is_hashed and shape is not None and tuple(shape) == (config.n_routed_experts,)
    )


def _twins(named: NamedTensors) -> dict[str, list[str]]:
    """For each name under the other naming, what the same numbers are called here."""
    twins = {}
    for (here, _), there in zip(named.wanted, named.other):
        # One naming may have a tensor for each expert where the other has one for all.
        shared = here.names.shape[: there.names.ndim]
        for index in np.ndindex(shared):
            names = list(np.ravel(here.names[index]))
            twins |= dict.fromkeys(np.ravel(there.names[index]), names)
    return twins


def _is_official(names: Collection[str]) -> bool:
    of_one = [name for name in names if not name.startswith(_OF_BOTH)]
    return 2 * sum(name.startswith(_OF_HF) for name in of_one) <= len(of_one)


def _validate_count(call: str, config: Config, num_names: int) -> None:
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = 3 * config.n_routed_experts * layers
    too_many = layers > max(_MOST_BLOCKS, num_names // _LEAST_OF_BLOCK)
    if too_many or experts > max(_MOST_NAMES, 2 * num_names):
        raise ValueError(
            f"{call}: the configuration has {layers} blocks of "
            f"{config.n_routed_experts} experts and there are {num_names} tensors; one "
            "of the numbers is wrong."
        )
