"""Weights that a checkpoint stores in 8 or 4 bits, with a scale for each block.

The release's scales are powers of two, in E8M0; others in float32 may be any number.
FP8 (E4M3) has a scale for 128 x 128 numbers, FP4 (E2M1) for 32 of a row; a block at the
edge is smaller. In a model (`QuantizedWeight`) every row has scales of its own, so that
rows split over a mesh anywhere, and blocks are narrow enough for columns to split too.

A number has a place in three spaces, and everything here is a way between them:

- *part*: in the part of a leaf that one tensor fills, of `Source.part_shape`;
- *file*: in the tensor, where the part's dimensions `Source.merged` are one;
- *scale*: in the tensor of scales, where each is for a block of the file's.

`wo_b` of width 150 with six groups of 25 columns: its part is (150, 6, 25), its file
(150, 150), its FP8 scales (2, 2). Part (140, 5, 10) is file (140, 5 * 25 + 10 = 135)
and scale (140 // 128, 135 // 128) = (1, 1). Part (140, 5, 2) is file (140, 127) and
scale (1, 0): columns of one group may have different scales, from the third one on
here, so that only blocks of 1 = gcd(128, 25) columns have one each in every group.
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
    Region,
    StoredTensor,
    read_region,
    sizes_of,
    whole,
)
from dsv4_eqx.checkpoint.write import NewTensor
from dsv4_eqx.numerics.quantize import BLOCKS, FP4, FP8, LARGEST_CODE
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, codes_per_byte

# What a release's configuration says of it, as far as it matters here.
KNOWN_QUANTIZATION: Final = {"quant_method": "fp8", "fmt": "e4m3"}
SCALE: Final = np.dtype(ml_dtypes.float8_e8m0fnu)
_NAN_SCALE: Final = 255
_SCALE_BIAS: Final = 127
_HOLDS_FP4: Final = (np.dtype(np.int8), np.dtype(np.uint8))


class QuantizedTensor(NamedTuple):
    """A stored weight of codes, and the tensor of their scales."""

    codes: StoredTensor
    scales: StoredTensor
    code_dtype: np.dtype

    @property
    def scale_bits(self) -> np.dtype:
        """The integers that a `QuantizedWeight` has the scales in."""
        return np.dtype(np.uint8 if self.scales.dtype == SCALE else np.uint32)


def shared_width(weight: QuantizedTensor, source: Source, columns: slice) -> int:
    """The widest blocks of a part's columns, from the first on, of one scale each."""
    width = math.gcd(BLOCKS[weight.code_dtype][1], columns.start)
    first, last = source.merged
    if last == len(source.part_shape) and last - first > 1:
        width = math.gcd(width, source.part_shape[-1])
    return math.gcd(width, columns.stop - columns.start)


def read_codes(
    weight: QuantizedTensor, source: Source, region: Region, out: np.ndarray
) -> None:
    """Fills uint8 with codes, none of them NaN; the region's columns are bytes."""
    codes, code_dtype = weight.codes, weight.code_dtype
    *rows, columns = source.part_shape
    shape = (*rows, columns // codes_per_byte(code_dtype))
    stored = codes._replace(shape=shape, dtype=np.dtype(np.uint8))
    read_region(stored, region, out)
    if code_dtype == FP8 and (out & 0x7F).max(initial=0) == 0x7F:
        raise ValueError(f"{codes.path}: {codes.name} has a code that is NaN")


def read_scales(
    weight: QuantizedTensor,
    source: Source,
    region: Region,
    out: np.ndarray,
    *,
    width: int,
) -> None:
    """Fills the bits of a scale for each row and `width` columns, positive and normal.

    The region's columns are such blocks. The width is one that `shared_width` gives, or
    divides.
    """
    blocks = region[-1]
    columns = slice(blocks.start * width, blocks.stop * width)
    places = _places_in_file(source, (*region[:-1], columns), width)
    block_rows, block_columns = BLOCKS[weight.code_dtype]
    places[-2], places[-1] = places[-2] // block_rows, places[-1] // block_columns
    needed = tuple(slice(int(p.min()), int(p.max()) + 1) for p in places)
    stored = np.empty(sizes_of(needed), weight.scales.dtype)
    read_region(weight.scales, needed, stored)
    _check_scales(weight.scales, stored)
    scales = stored.view(weight.scale_bits)
    scales = scales[np.ix_(*(p - s.start for p, s in zip(places, needed)))]
    out[...] = scales.reshape(out.shape)


def read_numbers(
    weight: QuantizedTensor, source: Source, region: Region, out: np.ndarray
) -> None:
    """Fills floats with the numbers that codes and scales stand for, exactly."""
    code_dtype, columns = weight.code_dtype, region[-1]
    per_byte = codes_per_byte(code_dtype)
    # Whole bytes: a byte more at either end where the columns begin within one.
    byte = slice(columns.start // per_byte, -(-columns.stop // per_byte))
    wide = slice(byte.start * per_byte, byte.stop * per_byte)
    codes = np.empty(sizes_of((*region[:-1], byte)), np.uint8)
    read_codes(weight, source, (*region[:-1], byte), codes)
    width = shared_width(weight, source, wide)
    block = slice(wide.start // width, wide.stop // width)
    scales = np.empty(sizes_of((*region[:-1], block)), weight.scale_bits)
    read_scales(weight, source, (*region[:-1], block), scales, width=width)
    values = dequantize_on_cpu(codes, scales, code_dtype, out.dtype)
    values = values.reshape(*codes.shape[:-1], -1)
    out[...] = values[..., columns.start - wide.start : columns.stop - wide.start]
    _check_range(weight, scales, out)


def _check_range(
    weight: QuantizedTensor, scales: np.ndarray, values: np.ndarray
) -> None:
    if scales.dtype == np.uint8:
        exponent = int(scales.max(initial=0)) - _SCALE_BIAS
        largest, shown = 2.0**exponent, f"2**{exponent}"
    else:
        largest = float(scales.view(np.float32).max(initial=0))
        shown = str(largest)
    limit = float(ml_dtypes.finfo(values.dtype).max)
    most = LARGEST_CODE[weight.code_dtype] * largest
    if most > limit and not np.isfinite(values).all():
        raise ValueError(
            f"{weight.codes.path}: {weight.codes.name} has numbers beyond "
            f"{values.dtype}: its largest scale is {shown}"
        )


def _check_scales(tensor: StoredTensor, scales: np.ndarray) -> None:
    if scales.dtype == SCALE:
        is_nan = scales.view(np.uint8).max(initial=0) == _NAN_SCALE
        bad = [math.nan] if is_nan else []
    else:
        with np.errstate(invalid="ignore"):
            fits = (scales >= np.finfo(np.float32).tiny) & np.isfinite(scales)
        bad = scales[~fits]
    for value in bad:
        what = "a scale that is NaN" if math.isnan(value) else f"the scale {value}"
        raise ValueError(
            f"{tensor.path}: {tensor.name} has {what}; scales are positive and finite, "
            "and no smaller than the normal numbers"
        )


def _places_in_file(source: Source, region: Region, width: int) -> list[np.ndarray]:
    """File indices of a part's region, by dimension; of columns every `width`-th."""
    first, last = source.merged
    shape, num_dims = source.part_shape, len(source.part_shape)
    steps = [1] * (num_dims - 1) + [width]
    groups = [[i] for i in range(first)] + [list(range(first, last))]
    groups += [[i] for i in range(last, num_dims)]
    places = []
    for group in groups:
        sizes = [shape[i] for i in group]
        index = np.arange(math.prod(sizes)).reshape(sizes)
        taken = (slice(region[i].start, region[i].stop, steps[i]) for i in group)
        places.append(index[tuple(taken)].reshape(-1))
    return places


def dequantize_on_cpu(
    codes: np.ndarray, scales: np.ndarray, code_dtype: np.dtype, dtype: np.dtype
) -> np.ndarray:
    """The numbers of all blocks, one after another, computed on the CPU."""
    num_blocks = scales.size
    # Few sizes, so that little is compiled.
    padded = 1 << max(num_blocks - 1, 255).bit_length()
    codes, scales = codes.reshape(num_blocks, -1), scales.reshape(num_blocks, 1)
    if padded > num_blocks:
        more = ((0, padded - num_blocks), (0, 0))
        codes, scales = np.pad(codes, more), np.pad(scales, more)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        values = _dequantize_blocks(codes, scales, code_dtype, dtype)
        return np.asarray(values)[:num_blocks]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _dequantize_blocks(
    codes: Array, scales: Array, code_dtype: np.dtype, dtype: np.dtype
) -> Array:
    return QuantizedWeight(codes, scales, code_dtype, dtype).dequantize()


def scale_faults(
    codes: StoredTensor, scales: StoredTensor | None, source: Source
) -> Iterator[str]:
    """What is wrong with the shapes and dtypes of a quantised weight."""
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
    """FP8 or FP4 if a tensor, stored where a weight is wanted, holds such codes."""
    if tensor.dtype == FP8:
        return FP8
    return FP4 if tensor.dtype in _HOLDS_FP4 else None


def quantized_tensors(
    name: str,
    source: Source,
    weight: QuantizedWeight,
    part: Callable[[Array, Region], np.ndarray],
) -> Iterator[NewTensor]:
    """A quantised weight's part as the two tensors that the release has for it.

    `part` gives a region of the part in one of the weight's arrays. Reading the scales
    is a ValueError if rows or columns that share one in the release differ in it.
    """
    per_byte = codes_per_byte(weight.code_dtype)
    *outer, columns = source.part_shape
    part_shape = (*outer, columns // per_byte)
    *leading, num_rows, columns = source.tensor_shape
    dtype = FP8 if weight.code_dtype == FP8 else np.dtype(np.int8)
    is_e8m0 = weight.scales.dtype == np.uint8
    scale_dtype = SCALE if is_e8m0 else np.dtype(np.float32)

    def read_codes(region: Region) -> np.ndarray:
        return part(weight.codes, region).view(dtype)

    shape = (*leading, num_rows, columns // per_byte)
    yield NewTensor(name, dtype, shape, part_shape, read_codes)
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
        return np.ascontiguousarray(few).view(scale_dtype)[region]

    scale_name = name.removesuffix("weight") + "scale"
    yield NewTensor(scale_name, scale_dtype, shape, shape, read_scales)
