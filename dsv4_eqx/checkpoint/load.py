"""A model straight from a released checkpoint, each array in its place on the mesh.

Of every tensor only the bytes that this process's devices need are read, a few
megabytes at a time, in threads. An array is built in host memory shard by shard; on CPU
that memory is the array, elsewhere it is freed once it has been copied to the device.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, overload

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array
from tqdm import tqdm

from dsv4_eqx.checkpoint.directory import local_directory, unreplaced
from dsv4_eqx.checkpoint.inventory import Checkpoint, chosen_dtype, open_checkpoint
from dsv4_eqx.checkpoint.names import Source
from dsv4_eqx.checkpoint.quantized import (
    QuantizedTensor,
    read_codes,
    read_numbers,
    read_scales,
    shared_width,
)
from dsv4_eqx.checkpoint.state_dict import range_faults, table_faults
from dsv4_eqx.checkpoint.tensors import (
    Region,
    StoredTensor,
    read_region,
    sizes_of,
    split_region,
    whole,
)
from dsv4_eqx.checkpoint.write import SHOWN_BYTES
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, codes_per_byte
from dsv4_eqx.numerics.validation import invalid_argument, validate_flag
from dsv4_eqx.sharding.shard import shard
from dsv4_eqx.sharding.sharded_model import ShardedModel

_CALL: Final = "from_pretrained"
_MOST_ELEMENTS: Final = 1 << 21  # that a thread reads at a time
_ALIGNMENT: Final = 64  # bytes; what JAX needs to take host memory as it is
_MOST_THREADS: Final = 8
# These are used as arrays outside the parts that dequantize their weights.
_NEVER_QUANTIZED: Final = ("embedding", "unembedding", "router.weight")
# Fills an array with a region of the part of a leaf that one tensor has.
_Read = Callable[[Any, Source, Region, np.ndarray], None]


@overload
def from_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: None = None,
    split_vocab: bool = True,
    fsdp: bool = False,
    keep_quantized: bool = False,
    revision: str | None = None,
) -> DeepSeekV4:
    """On the default device."""


@overload
def from_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh,
    split_vocab: bool = True,
    fsdp: bool = False,
    keep_quantized: bool = False,
    revision: str | None = None,
) -> ShardedModel:
    """Over a mesh."""


def from_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    split_vocab: bool = True,
    fsdp: bool = False,
    keep_quantized: bool = False,
    revision: str | None = None,
) -> DeepSeekV4 | ShardedModel:
    """Loads a checkpoint under DeepSeek's or Hugging Face's names.

    Also under the mixed ones that transformers writes into its files.

    Reads safetensors in FP8, FP4, BF16, F16, F32 and F64, in one file or in several
    with an index, and `config.json` beside them. Quantised weights become arrays,
    exactly; where their scales are float32, the product in float32. One warning says
    that the model is without prediction block where the configuration has one and the
    files do not, or without the drafter DSpark, which `load_dspark` loads.

    **Arguments:**

    - `directory`: of the checkpoint, or a name on the Hugging Face hub.
    - `dtype`: of the weights that need not stay float32; the embedding's by default,
        and for `"auto"`. For float64, JAX needs `jax_enable_x64`.
    - `mesh`: from `make_mesh`. Each process reads only what its devices hold, and each
        array is built where it belongs.
    - `split_vocab`, `fsdp`: as for `shard`, where there is a mesh. Quantised weights
        are not split over `data`.
    - `keep_quantized`: leaves quantised weights as they are (`QuantizedWeight`): a byte
        or half of one for each number, the same numbers, and no gradient. A weight of
        which some layers are quantised and others not becomes an array all the same.
    - `revision`: branch, tag or commit, where the name is one on the hub.

    **Returns:** a `DeepSeekV4` on the default device; with a mesh the `ShardedModel`
    that `shard` makes of it.

    **Raises:** ValueError naming file and tensor, what was expected and what was found,
    if anything is missing, extra, doubled, misshapen, cut short or no number, or does
    not divide over the mesh; where many are, the message counts those that are alike
    and the error's `faults` lists all. ValueError naming an argument that is out of its
    range, and if another checkpoint took the directory's place meanwhile. ImportError
    if the hub's package is needed and missing, OSError if the hub does not give the
    checkpoint. Pickles are never opened.
    """
    flags = dict(split_vocab=split_vocab, fsdp=fsdp, keep_quantized=keep_quantized)
    for name, flag in flags.items():
        validate_flag(_CALL, name, flag)
    dtype = chosen_dtype(_CALL, dtype)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise invalid_argument(_CALL, "mesh", mesh, "from make_mesh, or None")
    if mesh is None and fsdp:
        raise invalid_argument(_CALL, "fsdp", fsdp, "False without a mesh")
    directory = local_directory(_CALL, directory, revision)
    over_mesh = None
    if mesh is not None:
        options = dict(split_vocab=split_vocab, fsdp=fsdp)
        over_mesh = functools.partial(shard, mesh=mesh, **options)
    with unreplaced(_CALL, directory):
        checkpoint = open_checkpoint(_CALL, directory, dtype)
        with Loader(checkpoint, keep_quantized=keep_quantized) as loader:
            model = _load(checkpoint, loader, over_mesh)
    return model if over_mesh is None else over_mesh(model)


def _load(
    checkpoint: Checkpoint,
    loader: "Loader",
    over_mesh: Callable[[DeepSeekV4], ShardedModel] | None,
) -> DeepSeekV4:
    """The model, each array where it belongs."""
    structure, wanted = jax.tree.structure(checkpoint.model), checkpoint.wanted
    shardings = [None] * len(wanted)
    if over_mesh is not None:
        # Integers in their place: `fsdp` splits no quantised weight.
        shapes = [
            jax.ShapeDtypeStruct(leaf.shape, np.uint8)
            if loader.stays_quantized(source)
            else leaf
            for source, leaf in wanted
        ]
        placed = over_mesh(jax.tree.unflatten(structure, shapes)).model
        shardings = [leaf.sharding for leaf in jax.tree.leaves(placed)]
    leaves = []
    total = sum(t.num_bytes for t in checkpoint.tensors.values())
    with tqdm(desc="loading", total=total, **SHOWN_BYTES) as progress:
        for (source, leaf), sharding in zip(wanted, shardings):
            leaves.append(loader.load(source, leaf, sharding))
            progress.update(sum(t.num_bytes for t in checkpoint.stored(source)))
    return jax.tree.unflatten(structure, leaves)


class Loader:
    """Loads leaf by leaf, each in pieces that are read in threads."""

    def __init__(self, checkpoint: Checkpoint, *, keep_quantized: bool):
        """Starts the threads; they end with the `with` block that it is for."""
        self.weights = checkpoint.weights
        self.num_experts = checkpoint.model.config.n_routed_experts
        self.keep_quantized = keep_quantized
        self.threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.threads.shutdown(cancel_futures=True)

    def load(
        self, source: Source, leaf: Any, sharding: Sharding | None
    ) -> Array | QuantizedWeight:
        """One leaf of the model, over a mesh or on the default device."""
        if self.stays_quantized(source):
            return self._load_quantized(source, leaf, sharding)
        return self._build(source, self._read_part, leaf.shape, leaf.dtype, sharding)

    def stays_quantized(self, source: Source) -> bool:
        """Whether a leaf's weights are all quantised, alike, and wanted so."""
        if not self.keep_quantized or source.path.endswith(_NEVER_QUANTIZED):
            return False
        weights = [self.weights[name] for name in source.names.flat]
        kinds = {
            (weight.code_dtype, weight.scale_bits)
            if isinstance(weight, QuantizedTensor)
            else None
            for weight in weights
        }
        return len(kinds) == 1 and None not in kinds

    def read_region(
        self, source: Source, dtype: np.dtype, region: Region
    ) -> np.ndarray:
        """A region of a leaf as an array in host memory."""
        return self._read(source, self._read_part, dtype, region)

    def _read_part(
        self, weight: Any, source: Source, region: Region, out: np.ndarray
    ) -> None:
        if isinstance(weight, QuantizedTensor):
            read_numbers(weight, source, region, out)
        else:
            tensor = weight._replace(shape=source.part_shape)
            _read_plain(tensor, self.num_experts, region, out)

    def _load_quantized(
        self, source: Source, leaf: Any, sharding: Sharding | None
    ) -> QuantizedWeight:
        *outer, columns = leaf.shape
        local = columns if sharding is None else sharding.shard_shape(leaf.shape)[-1]
        weight: Any = self.weights[source.names.flat[0]]
        per_byte = codes_per_byte(weight.code_dtype)
        if local % per_byte != 0:
            raise ValueError(
                f"{_CALL}: {source.path} would be split into {local} columns, and "
                f"{per_byte} share a byte; choose another mesh or keep_quantized=False."
            )
        shape = (*outer, columns // per_byte)
        codes = self._build(source, read_codes, shape, np.dtype(np.uint8), sharding)
        width = shared_width(weight, source, slice(0, local))
        shape = (*outer, columns // width)
        read = functools.partial(read_scales, width=width)
        scales = self._build(source, read, shape, weight.scale_bits, sharding)
        return QuantizedWeight(codes, scales, weight.code_dtype, np.dtype(leaf.dtype))

    def _build(
        self,
        source: Source,
        read: _Read,
        shape: tuple[int, ...],
        dtype: np.dtype,
        sharding: Sharding | None,
    ) -> Array:
        """An array whose shards are read from the tensors that it is made of."""
        if sharding is None:
            host = self._read(source, read, dtype, whole(shape))
            return jax.block_until_ready(jax.device_put(host))
        devices = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape))
            devices.setdefault(bounds, []).append(device)
        shards = []
        for bounds, holders in devices.items():
            region = tuple(slice(first, last) for first, last in bounds)
            host = self._read(source, read, dtype, region)
            shards += [jax.device_put(host, device) for device in holders]
            jax.block_until_ready(shards)
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _read(
        self, source: Source, read: _Read, dtype: np.dtype, region: Region
    ) -> np.ndarray:
        """A region of a leaf, each tensor's part in pieces that threads read."""
        host = _aligned_empty(sizes_of(region), dtype)
        outer = source.names.ndim
        part, pieces = region[outer:], []
        for place in np.ndindex(*host.shape[:outer]):
            index = tuple(s.start + i for s, i in zip(region, place))
            weight = self.weights[str(source.names[index])]
            for piece in split_region(part, _MOST_ELEMENTS):
                local = (
                    slice(p.start - o.start, p.stop - o.start)
                    for p, o in zip(piece, part)
                )
                # A view even where the leaf is a single number.
                out = host[(*place, *local, ...)]
                pieces.append(self.threads.submit(read, weight, source, piece, out))
        for piece in pieces:
            piece.result()
        return host


def _read_plain(
    tensor: StoredTensor, num_experts: int, region: Region, out: np.ndarray
) -> None:
    """Fills floats or a table; ValueError if a conversion would lose a value."""
    is_same = tensor.dtype == out.dtype
    values = out if is_same else np.empty(out.shape, tensor.dtype)
    read_region(tensor, region, values)
    # Judged as they are stored: an expert of int64 may be another one in int32.
    faults = iter(())
    if np.issubdtype(out.dtype, np.integer):
        faults = table_faults(values, out.dtype, num_experts, region[0].start)
    elif not is_same:
        faults = range_faults(values, out.dtype)
    for fault in faults:
        raise ValueError(f"{tensor.path}: {tensor.name} {fault}")
    if not is_same:
        out[...] = values


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + num_bytes].view(dtype).reshape(shape)
