"""Small intact checkpoints as bytes, and tools that damage them.

Files are written by code of their own, not by the package's, so that a fault there
does not hide one in reading.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dsv4_eqx import from_state_dict
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.config.kinds import CSA, HASH_MOE, SLIDING, TOPK_MOE
from tests.models import random_tensors
from tests.tiny import tiny_config

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3))
FORMS = ("packed", "packed in one file", "plain", "plain in one file")
_FP4 = re.compile(r"\.experts\.\d+\.w[123]\.weight$")
_FP8 = re.compile(
    r"\.(attn\.w(q_a|q_b|kv|o_a|o_b)|attn\.indexer\.wq_b|shared_experts\.w[123]"
    r"|[eh]_proj)\.weight$"
)
_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


class Stored(NamedTuple):
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def small_config():
    """Two layers of four experts and a prediction block; every kind of tensor."""
    return tiny_config(
        vocab_size=12,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        layer_types=(SLIDING, CSA),
        compress_ratios=(0, 4),
        mlp_layer_types=(HASH_MOE, TOPK_MOE),
        index_n_heads=4,
        index_topk=2,
        hc_mult=2,
    )


@functools.cache
def intact(form):
    """The bytes of a checkpoint's files, by name."""
    packed, single = form.startswith("packed"), form.endswith("one file")
    tensors = dict(_packed_tensors() if packed else _plain_tensors())
    config = small_config().to_hf()
    if packed:
        config["quantization_config"] = _QUANTIZATION
    else:
        config["num_nextn_predict_layers"] = 0
        config["compress_ratios"] = config["compress_ratios"][:2]
    files = {CONFIG: as_json(config)}
    if single:
        return files | {SINGLE: as_file(tensors)}
    names = list(tensors)
    third = len(names) // 3 + 1
    weight_map = {name: SHARDS[i // third] for i, name in enumerate(names)}
    for shard in SHARDS:
        part = {n: t for n, t in tensors.items() if weight_map[n] == shard}
        files[shard] = as_file(part)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    return files | {INDEX: as_json(index)}


def _packed_tensors() -> Iterator[tuple[str, Stored]]:
    """Official names, in FP8 and FP4 as the release has them."""
    generator = np.random.default_rng(0)
    for name, value in random_tensors(small_config()).items():
        if not (_FP8.search(name) or _FP4.search(name)):
            yield name, plain(name, value)
            continue
        rows, columns = value.shape
        codes = generator.integers(0, 127, (rows, columns), np.uint8)
        scales = (-(-rows // 128), -(-columns // 128))
        if _FP4.search(name):
            codes, scales = codes[:, ::2], (rows, columns // 32)
        dtype = "I8" if _FP4.search(name) else "F8_E4M3"
        yield name, Stored(dtype, codes.shape, codes.tobytes())
        exponents = generator.integers(115, 125, scales, np.uint8)
        scale = name.removesuffix("weight") + "scale"
        yield scale, Stored("F8_E8M0", scales, exponents.tobytes())


def _plain_tensors() -> Iterator[tuple[str, Stored]]:
    """Hugging Face's names, in bfloat16 and float32, without a prediction block."""
    config = dataclasses.replace(small_config(), num_nextn_predict_layers=0)
    model = from_state_dict(config, random_tensors(config))
    for source, leaf in sources(model, official=False):
        for index in np.ndindex(source.names.shape):
            value = np.asarray(leaf[index]).reshape(source.tensor_shape)
            name = str(source.names[index])
            yield name, plain(name, value)


def plain(name, value):
    """A tensor in bfloat16 if it is a weight, else as it is."""
    if np.issubdtype(value.dtype, np.integer):
        return Stored("I64", value.shape, value.astype(np.int64).tobytes())
    if name.endswith(("weight", "proj")):
        return Stored("BF16", value.shape, value.astype(ml_dtypes.bfloat16).tobytes())
    return Stored("F32", value.shape, value.astype(np.float32).tobytes())


def as_json(content):
    return json.dumps(content, indent=1).encode()


def as_file(tensors):
    """The bytes of a safetensors file."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [end, end + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        end += len(data)
    return with_header(header, b"".join(t.data for t in tensors.values()))


def with_header(header, data=b""):
    """The bytes of a file; the header may be any JSON, or bytes."""
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":")).encode()
    return len(header).to_bytes(8, "little") + header + data


def split_file(raw):
    """Header and data of a file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def tensors_in(raw):
    """What `as_file` was given."""
    header, data = split_file(raw)
    return {
        name: Stored(e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])])
        for name, e in header.items()
    }


def write(directory, files):
    """Writes all the files into a new directory."""
    directory.mkdir(parents=True)
    for name, raw in files.items():
        (directory / name).write_bytes(raw)


# Each of these gives a function that damages a directory.


def edit(name, change):
    """Changes the bytes of a file."""

    def damage(directory):
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def edit_json(name, change):
    """Changes what JSON says, in place."""

    def change_bytes(raw):
        content = json.loads(raw)
        change(content)
        return as_json(content)

    return edit(name, change_bytes)


def edit_config(**changes):
    """Changes values of the configuration."""
    return edit_json(CONFIG, lambda config: config.update(changes))


def edit_entry(tensor, **changes):
    """Changes a tensor's entry in the header, and nothing else."""

    def change(raw):
        header, data = split_file(raw)
        header[tensor].update(changes)
        return with_header(header, data)

    return lambda directory: edit(_holder(directory, tensor), change)(directory)


def edit_tensors(tensor, change):
    """Changes the tensors of the file that holds one, which stays well-formed."""

    def change_bytes(raw):
        tensors = tensors_in(raw)
        change(tensors)
        return as_file(tensors)

    return lambda directory: edit(_holder(directory, tensor), change_bytes)(directory)


def replace(tensor, values, dtype=None):
    """Gives a tensor other values, in the dtype that the array has."""
    names = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32"}
    names |= {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}
    names |= {"bfloat16": "BF16", "float8_e8m0fnu": "F8_E8M0"}
    stored = Stored(dtype or names[values.dtype.name], values.shape, values.tobytes())
    return edit_tensors(tensor, lambda tensors: tensors.update({tensor: stored}))


def both(*damages):
    """One damage after another."""

    def damage(directory):
        for each in damages:
            each(directory)

    return damage


def drop(*names):
    """Takes tensors out of index and files."""

    def damage(directory):
        for name in names:
            edit_tensors(name, lambda tensors, name=name: tensors.pop(name))(directory)
            edit_json(INDEX, lambda i, name=name: i["weight_map"].pop(name))(directory)

    return damage


def add(name, stored, shard=SHARDS[0]):
    """Puts a tensor into index and a file."""

    def damage(directory):
        first = next(iter(tensors_in((directory / shard).read_bytes())))
        edit_tensors(first, lambda tensors: tensors.update({name: stored}))(directory)
        edit_json(INDEX, lambda i: i["weight_map"].update({name: shard}))(directory)

    return damage


def put(name, raw):
    """Makes a file of these bytes."""
    return lambda directory: (directory / name).write_bytes(raw)


def remove(*names):
    """Takes files away."""

    def damage(directory):
        for name in names:
            (directory / name).unlink()

    return damage


def special(name, make):
    """Makes something else of a file's path."""
    return both(remove(name), lambda directory: make(directory / name))


def link(name, target):
    """Puts a link in a file's place."""

    def damage(directory):
        path = directory / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return damage


def _holder(directory, tensor):
    if (directory / SINGLE).exists():
        return SINGLE
    return json.loads((directory / INDEX).read_bytes())["weight_map"][tensor]
