"""Weights that a checkpoint stores in 8 or 4 bits, with a power of two for each block.

FP8 (E4M3) has a scale for 128 x 128 numbers, FP4 (E2M1) for 32 of a row; a block at the
edge is smaller. In a model (`QuantizedWeight`) every row has scales of its own, so that
rows split over a mesh anywhere, and blocks are narrow enough for columns to split too.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from dsv4_eqx.checkpoint.names import Source
from dsv4_eqx.checkpoint.tensors import (
    Reader,
    Region,
    StoredTensor,
    sizes_of,
    whole,
)
from dsv4_eqx.checkpoint.write import NewTensor
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, codes_per_byte

FP8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
FP4: Final = np.dtype(ml_dtypes.float4_e2m1fn)
# Rows and columns that share a scale.
BLOCKS: Final = {FP8: (128, 128), FP4: (1, 32)}
# What a release's configuration says of it, as far as it matters here.
KNOWN_QUANTIZATION: Final = {"quant_method": "fp8", "fmt": "e4m3"}
SCALE: Final = np.dtype(ml_dtypes.float8_e8m0fnu)
_NAN_SCALE: Final = 255
_SCALE_BIAS: Final = 127
_LARGEST_CODE: Final = {FP8: 448.0, FP4: 6.0}
_HOLDS_FP4: Final = (np.dtype(np.int8), np.dtype(np.uint8))


class PackedTensor(NamedTuple):
    """A stored weight of codes, and the tensor of their scales."""

    codes: StoredTensor
    scales: StoredTensor
    code_dtype: np.dtype

    def block_of(self, source: Source, region: Region) -> int:
        """The widest block of a region's columns, in all of which the scale is one.

        **Arguments:**

        - `source`: the leaf that the tensor is part of.
        - `region`: of what the tensor fills there.
        """
        columns = region[-1]
        block = math.gcd(BLOCKS[self.code_dtype][1], columns.start)
        if source.merged[1] == len(source.own_shape) and np.diff(source.merged) > 1:
            block = math.gcd(block, source.own_shape[-1])
        return math.gcd(block, columns.stop - columns.start)

    def stored_codes(self, source: Source) -> StoredTensor:
        """The codes' bytes as a tensor of their own, in the leaf's dimensions.

        **Arguments:**

        - `source`: the leaf that the tensor is part of.
        """
        num_bytes = source.own_shape[-1] // codes_per_byte(self.code_dtype)
        shape = (*source.own_shape[:-1], num_bytes)
        return self.codes._replace(shape=shape, dtype=np.dtype(np.uint8))

    def read_scales(
        self, source: Source, region: Region, block: int, reader: Reader
    ) -> np.ndarray:
        """Scales of each row of a region, for each block of its columns; uint8.

        **Arguments:**

        - `source`: the leaf that the tensor is part of.
        - `region`: of what the tensor fills there.
        - `block`: columns in a block; divides `block_of(source, region)`.
        - `reader`: reads them.

        **Raises:** ValueError if one is NaN or no power of two.
        """
        places = _places_in_file(source, region, block)
        rows, columns = BLOCKS[self.code_dtype]
        places[-2], places[-1] = places[-2] // rows, places[-1] // columns
        needed = tuple(slice(int(p.min()), int(p.max()) + 1) for p in places)
        stored = np.empty(sizes_of(needed), self.scales.dtype)
        reader.read(self.scales, needed, stored)
        scales = self._as_bytes(stored)
        sizes = sizes_of(region)
        if stored.shape != tuple(len(p) for p in places):
            scales = scales[np.ix_(*(p - s.start for p, s in zip(places, needed)))]
        return scales.reshape(*sizes[:-1], sizes[-1] // block)

    def _as_bytes(self, stored: np.ndarray) -> np.ndarray:
        tensor = self.scales
        if stored.dtype == SCALE:
            scales = stored.view(np.uint8)
            if scales.max(initial=0) == _NAN_SCALE:
                raise ValueError(
                    f"{tensor.path}: {tensor.name} has a scale that is NaN"
                )
            return scales
        mantissa, exponent = np.frexp(stored)
        scales = exponent - 1 + _SCALE_BIAS
        fits = (mantissa == 0.5) & (scales >= 0) & (scales < _NAN_SCALE)
        if not fits.all():
            value = stored[~fits].flat[0]
            raise ValueError(
                f"{tensor.path}: {tensor.name} has the scale {value}, which is no "
                "power of two that E8M0 holds"
            )
        return scales.astype(np.uint8)

    def check_codes(self, codes: np.ndarray) -> None:
        """Refuses codes that are no numbers.

        **Arguments:**

        - `codes`: bytes of some of them.

        **Raises:** ValueError if one is NaN.
        """
        if self.code_dtype == FP8 and (codes & 0x7F).max(initial=0) == 0x7F:
            tensor = self.codes
            raise ValueError(f"{tensor.path}: {tensor.name} has a code that is NaN")

    def read(
        self, source: Source, region: Region, out: np.ndarray, reader: Reader
    ) -> None:
        """The numbers of a region, exactly.

        **Arguments:**

        - `source`: the leaf that the tensor is part of.
        - `region`: of what the tensor fills there.
        - `out`: where they go; of the region's shape.
        - `reader`: reads codes and scales.

        **Raises:** ValueError if a code or scale is NaN, or a number beyond what
        `out` holds.
        """
        per_byte = codes_per_byte(self.code_dtype)
        first, last = region[-1].start, region[-1].stop
        even = slice(first - first % per_byte, last + -last % per_byte)
        wide = (*region[:-1], even)
        in_bytes = slice(even.start // per_byte, even.stop // per_byte)
        sizes = sizes_of((*region[:-1], in_bytes))
        codes = np.empty(sizes, np.uint8)
        reader.read(self.stored_codes(source), (*region[:-1], in_bytes), codes)
        self.check_codes(codes)
        block = self.block_of(source, wide)
        scales = self.read_scales(source, wide, block, reader)
        values = unpack_on_cpu(codes, scales, self.code_dtype, out.dtype)
        values = values.reshape(*sizes[:-1], -1)
        out[...] = values[..., first - even.start : last - even.start]
        self._check_range(scales, out)

    def _check_range(self, scales: np.ndarray, values: np.ndarray) -> None:
        largest = _LARGEST_CODE[self.code_dtype]
        exponent = int(scales.max(initial=0)) - _SCALE_BIAS
        limit = float(ml_dtypes.finfo(values.dtype).max)
        if largest * 2.0**exponent > limit and not np.isfinite(values).all():
            raise ValueError(
                f"{self.codes.path}: {self.codes.name} has numbers beyond "
                f"{values.dtype}: its largest scale is 2**{exponent}"
            )


def _places_in_file(source: Source, region: Region, block: int) -> list[np.ndarray]:
    """The index along each of the file's dimensions; of columns, every `block`-th."""
    (first, last), own = source.merged, source.own_shape
    groups = [[i] for i in range(first)] + [list(range(first, last))]
    groups += [[i] for i in range(last, len(own))]
    places = []
    for group in groups:
        index = np.arange(math.prod(own[i] for i in group))
        index = index.reshape([own[i] for i in group])
        steps = [block if i == len(own) - 1 else 1 for i in group]
        parts = (
            slice(region[i].start, region[i].stop, s) for i, s in zip(group, steps)
        )
        places.append(index[tuple(parts)].reshape(-1))
    return places


def unpack_on_cpu(
    codes: np.ndarray, scales: np.ndarray, code_dtype: np.dtype, dtype: np.dtype
) -> np.ndarray:
    """The numbers of all blocks, one after another, computed on the CPU.

    **Arguments:**

    - `codes`: bytes of all blocks in order; of any shape.
    - `scales`: of the blocks.
    - `code_dtype`: FP8 or FP4.
    - `dtype`: of the numbers.
    """
    num_blocks = scales.size
    # Few sizes, so that little is compiled.
    room = 1 << max(num_blocks - 1, 255).bit_length()
    codes, scales = codes.reshape(num_blocks, -1), scales.reshape(num_blocks, 1)
    if room > num_blocks:
        more = ((0, room - num_blocks), (0, 0))
        codes, scales = np.pad(codes, more), np.pad(scales, more)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        values = _unpack_blocks(codes, scales, code_dtype, dtype)
        return np.asarray(values)[:num_blocks]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _unpack_blocks(
    codes: Array, scales: Array, code_dtype: np.dtype, dtype: np.dtype
) -> Array:
    return QuantizedWeight(codes, scales, code_dtype, dtype).dequantize()


def scale_faults(codes: StoredTensor, scales: StoredTensor | None, source: Source):
    """What is wrong with the shapes and dtypes of a packed weight; nothing if all fits.

    **Arguments:**

    - `codes`: stored where a weight is wanted.
    - `scales`: stored beside it, if they are.
    - `source`: what is wanted.
    """
    wanted, code_dtype = source.tensor_shape, code_dtype_of(codes)
    if code_dtype is None or len(wanted) < 2:
        yield f"has the dtype {codes.dtype}, which is none for it"
        return
    expected = (*wanted[:-1], wanted[-1] // codes_per_byte(code_dtype))
    if codes.shape != expected or wanted[-1] % codes_per_byte(code_dtype) != 0:
        yield f"has the shape {codes.shape} of {code_dtype}, not {expected}"
    if scales is None:
        yield f"is {code_dtype} without scales"
        return
    blocks = zip(wanted[-2:], BLOCKS[code_dtype])
    shape = (*wanted[:-2], *(-(-size // block) for size, block in blocks))
    if scales.shape != shape:
        yield f"has scales {scales.name} of the shape {scales.shape}, not {shape}"
    if scales.dtype not in (SCALE, np.dtype(np.float32)):
        yield f"has scales {scales.name} of the dtype {scales.dtype}, not {SCALE}"


def code_dtype_of(tensor: StoredTensor) -> np.dtype | None:
    """FP8 or FP4 if a stored tensor holds such codes.

    **Arguments:**

    - `tensor`: stored where a weight is wanted.
    """
    if tensor.dtype == FP8:
        return FP8
    return FP4 if tensor.dtype in _HOLDS_FP4 else None


def packed_tensors(
    name: str,
    source: Source,
    weight: QuantizedWeight,
    part: Callable[[Array, Region], np.ndarray],
) -> Iterator[NewTensor]:
    """A packed weight's part as the two tensors that the release has for it.

    **Arguments:**

    - `name`: of the weight.
    - `source`: the leaf that it is part of.
    - `weight`: that leaf.
    - `part`: gives a region of what the tensor fills in one of the leaf's arrays.

    **Raises:** ValueError, when the scales are read, if rows or columns that share one
    in the release have different ones.
    """
    per_byte = codes_per_byte(weight.code_dtype)
    *outer, columns = source.own_shape
    own_shape = (*outer, columns // per_byte)
    *leading, num_rows, columns = source.tensor_shape
    dtype = FP8 if weight.code_dtype == FP8 else np.dtype(np.int8)

    def read_codes(region: Region) -> np.ndarray:
        return part(weight.codes, region).view(dtype)

    shape = (*leading, num_rows, columns // per_byte)
    yield NewTensor(name, dtype, shape, own_shape, read_codes)
    rows, width = BLOCKS[weight.code_dtype]
    shape = (*leading, -(-num_rows // rows), -(-columns // width))

    def read_scales(region: Region) -> np.ndarray:
        of_all = (*outer, weight.scales.shape[-1])
        scales = part(weight.scales, whole(of_all)).reshape(*leading, num_rows, -1)
        step = width * scales.shape[-1] // columns
        few = scales[..., ::rows, :: max(step, 1)]
        again = few.repeat(rows, axis=-2).repeat(max(step, 1), axis=-1)
        again = again[..., :num_rows, : scales.shape[-1]]
        if few.shape != shape or (again != scales).any():
            raise ValueError(
                f"{name} has different scales within a block of {rows} x {width}, "
                "which has a single one in the release; unpack the weight first."
            )
        return np.ascontiguousarray(few).view(SCALE)[region]

    yield NewTensor(
        name.removesuffix("weight") + "scale", SCALE, shape, shape, read_scales
    )
