"""A model straight from a released checkpoint, each array in its place on the mesh.

Of every tensor only the bytes that this process's devices need are read, a few
megabytes at a time, in threads. An array is built in host memory shard by shard; on CPU
that memory is the array, elsewhere it is freed once it has been copied to the device.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv4_eqx.checkpoint.contents import Contents, open_checkpoint
from dsv4_eqx.checkpoint.download import local_directory
from dsv4_eqx.checkpoint.names import Source
from dsv4_eqx.checkpoint.progress import Progress
from dsv4_eqx.checkpoint.quantized import PackedTensor
from dsv4_eqx.checkpoint.state_dict import range_faults, table_faults
from dsv4_eqx.checkpoint.tensors import (
    Reader,
    Region,
    StoredTensor,
    sizes_of,
    split_region,
    whole,
)
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, codes_per_byte
from dsv4_eqx.numerics.validation import invalid_argument, validate_dtype, validate_flag
from dsv4_eqx.sharding.rules import DEFAULT_RULES, Rules, partition_specs

_CALL: Final = "from_pretrained"
_MOST_ELEMENTS: Final = 1 << 21  # that a thread reads at a time
_ALIGNMENT: Final = 64  # bytes; what JAX needs to take host memory as it is
_MOST_THREADS: Final = 8
# These are used as arrays outside the parts that unpack their weights.
_NEVER_PACKED: Final = ("embedding", "unembedding", "router.weight")
ReadPiece = Callable[[str, Region, np.ndarray], None]


def from_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    keep_quantized: bool = False,
    revision: str | None = None,
) -> DeepSeekV4:
    """Loads a checkpoint under DeepSeek's or Hugging Face's names.

    Also under the mixed ones that transformers writes into its files.

    Reads safetensors in FP8, FP4, BF16, F16, F32 and F64, in one file or in several
    with an index, and `config.json` beside them. Quantised weights become arrays,
    exactly.

    **Arguments:**

    - `directory`: of the checkpoint, or a name on the Hugging Face hub.
    - `dtype`: of the weights that need not stay float32; the embedding's by default.
        For float64, JAX needs `jax_enable_x64`.
    - `mesh`: places each array over it, as `partition_specs` says; on the default
        device without one. Each process reads only what its devices hold.
    - `rules`: as for `partition_specs`.
    - `keep_quantized`: leaves quantised weights as they are (`QuantizedWeight`): a byte
        or half of one for each number, the same numbers, and no gradient. A weight of
        which some layers are quantised and others not becomes an array all the same.
    - `revision`: branch, tag or commit, where the name is one on the hub.

    **Raises:** ValueError naming file and tensor, what was expected and what was found,
    if anything is missing, extra, doubled, misshapen, cut short or no number, or does
    not divide over the mesh; ValueError naming an argument that is out of its range;
    ImportError if the hub's package is needed and missing, OSError if the hub does not
    give the checkpoint. Pickles are never opened.
    """
    validate_flag(_CALL, "keep_quantized", keep_quantized)
    if dtype is not None:
        dtype = validate_dtype(_CALL, dtype)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise invalid_argument(_CALL, "mesh", mesh, "from make_mesh, or None")
    directory = local_directory(_CALL, directory, revision)
    contents = open_checkpoint(_CALL, directory, dtype)
    model = contents.plan.model
    shardings = [None] * len(contents.plan.wanted)
    if mesh is not None:
        specs = partition_specs(model, rules, mesh=mesh)
        structure = jax.tree.structure(model)
        shardings = [NamedSharding(mesh, s) for s in structure.flatten_up_to(specs)]
    leaves = []
    progress = Progress("loading", sum(t.num_bytes for t in contents.tensors.values()))
    with contextlib.closing(progress), Loader(contents, keep_quantized) as loader:
        for (source, leaf), sharding in zip(contents.plan.wanted, shardings):
            leaves.append(loader.load(source, leaf, sharding))
            progress.advance(sum(t.num_bytes for t in contents.stored(source)))
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


class Loader:
    """Loads leaf by leaf, each in pieces that are read in threads."""

    def __init__(self, contents: Contents, keep_quantized: bool):
        """**Arguments:**

        - `contents`: of the checkpoint.
        - `keep_quantized`: as for `from_pretrained`.
        """
        self.weights = contents.weights
        self.num_experts = contents.plan.model.config.n_routed_experts
        self.keep_quantized = keep_quantized
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self.threads = ThreadPoolExecutor(threads)
        self.reader = Reader()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.threads.shutdown(cancel_futures=True)

    def read_region(
        self, source: Source, dtype: np.dtype, region: Region
    ) -> np.ndarray:
        """A region of a leaf, in host memory.

        **Arguments:**

        - `source`: the leaf.
        - `dtype`: that it has.
        - `region`: of its dimensions.
        """
        return self._read_shard(region, dtype, source, self._piece_reader(source))

    def load(
        self, source: Source, leaf: Any, sharding: NamedSharding | None
    ) -> Array | QuantizedWeight:
        """One leaf of the model.

        **Arguments:**

        - `source`: the leaf.
        - `leaf`: its shape and dtype.
        - `sharding`: where it goes; the default device if None.
        """
        weights = {str(name): self.weights[name] for name in source.names.flat}
        packed = {n: w for n, w in weights.items() if isinstance(w, PackedTensor)}
        same_dtype = len({weight.code_dtype for weight in packed.values()}) == 1
        stays_packed = (
            self.keep_quantized and same_dtype and len(packed) == len(weights)
        )
        if stays_packed and not source.path.endswith(_NEVER_PACKED):
            return self._load_packed(source, leaf, packed, sharding)
        read_piece = self._piece_reader(source)
        return self._build(leaf.shape, leaf.dtype, source, sharding, read_piece)

    def _piece_reader(self, source: Source) -> ReadPiece:
        def read_piece(name: str, region: Region, out: np.ndarray) -> None:
            weight = self.weights[name]
            if isinstance(weight, PackedTensor):
                weight.read(source, region, out, self.reader)
            else:
                self._read_plain(weight, source, region, out)

        return read_piece

    def _read_plain(
        self, tensor: StoredTensor, source: Source, region: Region, out: np.ndarray
    ) -> None:
        tensor = tensor._replace(shape=source.own_shape)
        is_same = tensor.dtype == out.dtype
        values = out if is_same else np.empty(out.shape, tensor.dtype)
        self.reader.read(tensor, region, values)
        # Judged as they are stored: an expert of int64 may be another one in int32.
        faults = iter(())
        if np.issubdtype(out.dtype, np.integer):
            first_row = region[0].start
            faults = table_faults(values, out.dtype, self.num_experts, first_row)
        elif not is_same:
            faults = range_faults(values, out.dtype)
        for fault in faults:
            raise ValueError(f"{tensor.path}: {tensor.name} {fault}")
        if not is_same:
            out[...] = values

    def _load_packed(
        self,
        source: Source,
        leaf: Any,
        packed: dict[str, PackedTensor],
        sharding: NamedSharding | None,
    ) -> QuantizedWeight:
        *outer, columns = leaf.shape
        local = columns
        if sharding is not None:
            local = sharding.shard_shape(leaf.shape)[-1]
        some = next(iter(packed.values()))
        per_byte = codes_per_byte(some.code_dtype)
        if local % per_byte != 0:
            raise ValueError(
                f"{_CALL}: {source.path} would be split into {local} columns, and "
                f"{per_byte} share a byte; choose another mesh or keep_quantized=False."
            )
        one_shard = (*whole(source.own_shape)[:-1], slice(0, local))
        block = some.block_of(source, one_shard)

        def read_codes(name: str, region: Region, out: np.ndarray) -> None:
            self.reader.read(packed[name].stored_codes(source), region, out)
            packed[name].check_codes(out)

        def read_scales(name: str, region: Region, out: np.ndarray) -> None:
            first, last = region[-1].start * block, region[-1].stop * block
            region = (*region[:-1], slice(first, last))
            out[...] = packed[name].read_scales(source, region, block, self.reader)

        def build(num_columns: int, read_piece: ReadPiece) -> Array:
            own = source._replace(own_shape=(*source.own_shape[:-1], num_columns))
            shape = (*outer, num_columns)
            return self._build(shape, np.dtype(np.uint8), own, sharding, read_piece)

        codes = build(columns // per_byte, read_codes)
        scales = build(columns // block, read_scales)
        return QuantizedWeight(codes, scales, some.code_dtype, np.dtype(leaf.dtype))

    def _build(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        source: Source,
        sharding: NamedSharding | None,
        read_piece: ReadPiece,
    ) -> Array:
        """An array whose shards are read from the tensors that it is made of."""
        if sharding is None:
            host = self._read_shard(whole(shape), dtype, source, read_piece)
            return jax.block_until_ready(jax.device_put(host))
        devices = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape))
            devices.setdefault(bounds, []).append(device)
        shards = []
        for bounds, holders in devices.items():
            region = tuple(slice(first, last) for first, last in bounds)
            host = self._read_shard(region, dtype, source, read_piece)
            shards += [jax.device_put(host, device) for device in holders]
            jax.block_until_ready(shards)
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _read_shard(
        self, region: Region, dtype: np.dtype, source: Source, read_piece: ReadPiece
    ) -> np.ndarray:
        host = _aligned_empty(sizes_of(region), dtype)
        pieces = [
            self.threads.submit(read_piece, *piece)
            for piece in _pieces(host, region, source)
        ]
        for piece in pieces:
            piece.result()
        return host


def _pieces(
    host: np.ndarray, region: Region, source: Source
) -> Iterator[tuple[str, Region, np.ndarray]]:
    """A tensor's name, a region of what it fills in the leaf, and where that goes."""
    outer = source.names.ndim
    own = region[outer:]
    for place in np.ndindex(*host.shape[:outer]):
        index = tuple(s.start + i for s, i in zip(region, place))
        name = str(source.names[index])
        for part in split_region(own, _MOST_ELEMENTS):
            local = (
                slice(p.start - o.start, p.stop - o.start) for p, o in zip(part, own)
            )
            # A view even where the leaf is a single number.
            yield name, part, host[(*place, *local, ...)]


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + num_bytes].view(dtype).reshape(shape)
