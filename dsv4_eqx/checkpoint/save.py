"""A checkpoint from a model, or from another one, under either of the two namings."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.core
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv4_eqx.checkpoint.directory import local_directory, other_files, read_config
from dsv4_eqx.checkpoint.inventory import Checkpoint, chosen_dtype, open_checkpoint
from dsv4_eqx.checkpoint.load import Loader
from dsv4_eqx.checkpoint.names import Source, sources
from dsv4_eqx.checkpoint.quantized import (
    BLOCKS,
    FP4,
    FP8,
    KNOWN_QUANTIZATION,
    dequantize_on_cpu,
    quantized_tensors,
)
from dsv4_eqx.checkpoint.tensors import Region, sizes_of
from dsv4_eqx.checkpoint.write import (
    NewTensor,
    SavesItself,
    validate_target,
    write_checkpoint,
)
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.hf_keys import other_keys
from dsv4_eqx.config.kinds import SLIDING
from dsv4_eqx.model.model import DeepSeekV4, abstract_model
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, is_quantized
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_dtype,
    validate_flag,
    validate_size,
)
from dsv4_eqx.sharding.sharded_model import ShardedModel

_CALL: Final = "save_pretrained"
MOST_FILE_BYTES: Final = 5 * 10**9
_DTYPES: Final = ("dtype", "torch_dtype")  # of the weights, as transformers writes it


def save_pretrained(
    model: DeepSeekV4 | ShardedModel,
    directory: str | os.PathLike,
    *,
    official: bool = False,
    overwrite: bool = False,
    most_file_bytes: int = MOST_FILE_BYTES,
    tokenizer: SavesItself | None = None,
) -> None:
    """Writes a model with its configuration, as safetensors.

    Every array is written in the dtype that it has, so that `from_pretrained` gives the
    same bits; what must be float32 is widened if it is not, which changes no number.
    The token ids that open and end a text, if the configuration has any, go into
    `generation_config.json` too, for transformers; such a file that comes with the
    tokenizer, or is kept from a checkpoint that is replaced, stays as it is.

    The directory appears under its name when everything is on the disk, and not at all
    if anything stops it before. With `overwrite`, the old one is first renamed aside,
    so that for a moment there is none, which nobody can load; and of several that save
    there at once, all but one may fail.

    **Arguments:**

    - `model`: on any devices of this process, over a mesh or not.
    - `directory`: missing or empty; neither a link nor the working directory.
    - `official`: DeepSeek's names rather than Hugging Face's. Quantised weights are
        then written as they are, and as arrays otherwise.
    - `overwrite`: replaces a checkpoint that is there: it is renamed, and removed when
        the new one is in its place. Small files beside its weights are kept, as those
        of a tokenizer: regular ones of at most 64 MiB that are not hidden.
    - `most_file_bytes`: the weights are split over files of this size.
    - `tokenizer`: from `load_tokenizer`, or one of transformers; written beside the
        weights.

    **Raises:** ValueError if there is something in the directory, and it is no
    checkpoint or may not be replaced, or something is beside it that would be lost; if
    another argument is out of its range; if the model is not as its configuration says,
    has no numbers (under `jit`, say), has parts that are wrapped, or that are on other
    processes' devices; or if the configuration cannot express its schedule or
    quantisation. All of that before anything is written.
    """
    validate_flag(_CALL, "official", official)
    most_file_bytes = validate_size(_CALL, "most_file_bytes", most_file_bytes)
    target = validate_target(_CALL, "directory", directory, overwrite=overwrite)
    if tokenizer is not None and not isinstance(tokenizer, SavesItself):
        allowed = "from load_tokenizer, with a method save_pretrained, or None"
        raise invalid_argument(_CALL, "tokenizer", tokenizer, allowed)
    model = _checked_model(model)
    if not official:
        _check_for_hf(_CALL, model.config)
    tensors = (
        tensor
        for source, leaf in sources(model, official=official)
        for tensor in _tensors_of(source, leaf, official)
    )
    write_checkpoint(
        target,
        model.config,
        tensors,
        overwrite=overwrite,
        most_file_bytes=most_file_bytes,
        tokenizer=tokenizer,
        more_config=_quantization(model) if official else {},
    )


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    official: bool = False,
    overwrite: bool = False,
    most_file_bytes: int = MOST_FILE_BYTES,
    revision: str | None = None,
) -> None:
    """Writes a checkpoint's weights under Hugging Face's or the official names.

    Quantised weights become arrays. A few megabytes are in memory at a time, whatever
    the model's size.

    What is beside the weights comes with them, as a tokenizer and a licence: regular
    files of at most 64 MiB, but for hidden ones, weights in other formats, indices, and
    links that lead out of the directory; no directories. Of the configuration,
    everything is kept that says nothing of the sizes and of how weights are stored, as
    special tokens.

    Arguments and errors are those of `from_pretrained` and `save_pretrained`. Where a
    checkpoint is overwritten, files that come from the source replace its own.
    """
    call = "convert"
    validate_flag(call, "official", official)
    dtype = chosen_dtype(call, dtype)
    most_file_bytes = validate_size(call, "most_file_bytes", most_file_bytes)
    target = validate_target(call, "target", target, overwrite=overwrite)
    checkpoint = open_checkpoint(call, local_directory(call, source, revision), dtype)
    model = checkpoint.model
    if not official:
        _check_for_hf(call, model.config)
    raw, new_dtype = read_config(checkpoint.directory), model.embedding.dtype.name
    kept = other_keys(raw, model.config.to_hf())
    kept |= {key: new_dtype for key in _DTYPES if key in raw}
    with Loader(checkpoint, keep_quantized=False) as loader:
        write_checkpoint(
            target,
            model.config,
            _converted(checkpoint, loader, official),
            overwrite=overwrite,
            most_file_bytes=most_file_bytes,
            more_config=kept,
            more_files=other_files(checkpoint.directory),
        )


def _check_for_hf(call: str, config: Config) -> None:
    """Refuses a schedule that transformers would read as another one."""
    ratios = {}
    for kind, ratio in zip(config.layer_types, config.compress_ratios):
        if kind != SLIDING and ratios.setdefault(kind, ratio) != ratio:
            raise ValueError(
                f"{call}: layers of {kind!r} have the ratios {ratios[kind]} and "
                f"{ratio}, and Hugging Face's configuration has one for all of them; "
                "save under the official names."
            )


def _quantization(model: DeepSeekV4) -> dict[str, Any]:
    """What a release's configuration says of its packed weights."""
    leaves = jax.tree.leaves(model, is_leaf=is_quantized)
    if not any(map(is_quantized, leaves)):
        return {}
    experts = {
        leaf.code_dtype
        for source, leaf in sources(model, official=True)
        if is_quantized(leaf) and ".experts." in source.path
    }
    if len(experts) > 1:
        raise ValueError(
            f"{_CALL}: some experts are packed as FP4 and others as FP8, and a "
            "configuration has one of them for all; save dequantize(model)."
        )
    quantization = KNOWN_QUANTIZATION | {"weight_block_size": list(BLOCKS[FP8])}
    if all(leaf.scales.dtype == np.uint8 for leaf in leaves if is_quantized(leaf)):
        quantization["scale_fmt"] = "ue8m0"
    expert_dtype = "fp4" if FP4 in experts else "fp8"
    return {"expert_dtype": expert_dtype, "quantization_config": quantization}


def _checked_model(model: Any) -> DeepSeekV4:
    """The model, its islands of float32 widened if all of it was cast."""
    model = model.model if isinstance(model, ShardedModel) else model
    if not isinstance(model, DeepSeekV4):
        allowed = "a DeepSeekV4, or a ShardedModel"
        raise invalid_argument(_CALL, "model", type(model).__name__, allowed)
    dtype = validate_dtype(_CALL, getattr(model.embedding, "dtype", None))
    wanted = abstract_model(model.config, dtype)
    found, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)
    if structure != jax.tree.structure(wanted):
        raise ValueError(
            f"{_CALL}: the model's parts are not those of its configuration; give it "
            "the model without wrappers, and with all of its layers and blocks; of "
            "adapters, merge_lora(model), of quantisation in training, pack_qat(model)."
        )
    leaves = []
    for (path, leaf), expected in zip(found, jax.tree.leaves(wanted)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        _check_leaf(name, leaf, expected, dtype)
        is_narrow = leaf.dtype != expected.dtype
        leaves.append(leaf.astype(expected.dtype) if is_narrow else leaf)
    return jax.tree.unflatten(structure, leaves)


def _check_leaf(name: str, leaf: Any, expected: Any, dtype: np.dtype) -> None:
    """Refuses a leaf that is not as expected, or in the dtype of the other weights."""
    is_array = not is_quantized(leaf)
    may_widen = is_array and leaf.dtype == dtype and expected.dtype == np.float32
    if leaf.shape != expected.shape or not (leaf.dtype == expected.dtype or may_widen):
        is_cast = leaf.shape == expected.shape and is_array
        remedy = f" Give it cast(model, {dtype.name!r})." if is_cast else ""
        raise ValueError(
            f"{_CALL}: {name} is {leaf.dtype} of the shape {leaf.shape}; the "
            f"configuration says {expected.dtype} and {expected.shape}.{remedy}"
        )
    arrays = jax.tree.leaves(leaf)
    if not all(map(_has_numbers, arrays)):
        raise ValueError(
            f"{_CALL}: {name} has no numbers; give it a model of arrays, outside "
            "of jit and not donated."
        )
    if not all(getattr(x, "is_fully_addressable", True) for x in arrays):
        raise ValueError(
            f"{_CALL}: {name} has parts on other processes' devices; gather the "
            "model in one process first."
        )


def _has_numbers(array: Any) -> bool:
    if isinstance(array, jax.Array):
        return not isinstance(array, jax.core.Tracer) and not array.is_deleted()
    return isinstance(array, np.ndarray)


def _tensors_of(source: Source, leaf: Any, official: bool) -> Iterator[NewTensor]:
    if not (is_quantized(leaf) and official):
        read = functools.partial(_host_part, leaf)
        yield from _array_tensors(source, np.dtype(leaf.dtype), read)
        return
    for index in np.ndindex(source.names.shape):

        def part(array: Array, region: Region, index: tuple[int, ...] = index):
            return _read_at(functools.partial(_host_part, array), index, region)

        yield from quantized_tensors(str(source.names[index]), source, leaf, part)


def _converted(
    checkpoint: Checkpoint, loader: Loader, official: bool
) -> Iterator[NewTensor]:
    new = sources(checkpoint.model, official=official)
    for (target, leaf), (source, _) in zip(new, checkpoint.wanted, strict=True):
        dtype = np.dtype(leaf.dtype)
        read = functools.partial(loader.read_region, source, dtype)
        yield from _array_tensors(target, dtype, read)


def _array_tensors(
    source: Source, dtype: np.dtype, read: Callable[[Region], np.ndarray]
) -> Iterator[NewTensor]:
    """A leaf as the tensors that it is published as; `read` gives a region of it."""
    # As the release and torch have tables.
    is_table = np.issubdtype(dtype, np.integer)
    for index in np.ndindex(source.names.shape):
        yield NewTensor(
            str(source.names[index]),
            np.dtype(np.int64) if is_table else dtype,
            source.tensor_shape,
            source.part_shape,
            functools.partial(_read_at, read, index),
        )


def _read_at(
    read: Callable[[Region], np.ndarray], index: tuple[int, ...], region: Region
) -> np.ndarray:
    """A region of what one tensor fills in a leaf."""
    place = tuple(slice(i, i + 1) for i in index)
    return read((*place, *region)).reshape(sizes_of(region))


def _host_part(leaf: Array | QuantizedWeight, region: Region) -> np.ndarray:
    """A region of a leaf, whichever devices hold it; all of what is not said."""
    if isinstance(leaf, QuantizedWeight):
        codes, scales = (_host_part(x, region[:-1]) for x in (leaf.codes, leaf.scales))
        values = dequantize_on_cpu(codes, scales, leaf.code_dtype, np.dtype(leaf.dtype))
        return values.reshape(*codes.shape[:-1], -1)[..., region[-1]]
    region = (*region, *(slice(0, n) for n in leaf.shape[len(region) :]))
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[region]
    out = np.empty(sizes_of(region), leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            _copy_overlap(shard, region, out)
    return out


def _copy_overlap(shard: Any, region: Region, out: np.ndarray) -> None:
    """Copies what a shard has of a region, if it has any."""
    target, starts, sizes = [], [], []
    for held, size, wanted in zip(shard.index, shard.data.shape, region):
        begin = held.start or 0
        first, last = max(begin, wanted.start), min(begin + size, wanted.stop)
        if first >= last:
            return
        target.append(slice(first - wanted.start, last - wanted.start))
        starts.append(first - begin)
        sizes.append(last - first)
    # A slice on the device: the host need not hold the whole shard.
    out[tuple(target)] = np.asarray(lax.dynamic_slice(shard.data, starts, sizes))
