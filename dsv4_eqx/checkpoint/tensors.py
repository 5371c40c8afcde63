"""Safetensors files: what their headers say, and regions of their tensors.

Eight bytes say how long the header is, the header is JSON, and the tensors' bytes
follow without gaps. Everything a header says is checked before anything is believed.
Files are read, never mapped: one cut short while it is mapped would kill the process.
"""

import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from dsv4_eqx.checkpoint.faults import naming
from dsv4_eqx.numerics.validation import is_int, shown

# The names that safetensors has for dtypes; I8 holds pairs of FP4 codes.
DTYPES: Final[dict[str, np.dtype]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
NAME_OF_DTYPE: Final = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES: Final = 8
_MOST_HEADER_BYTES: Final = 24 << 20  # over a hundred thousand tensors in one file
_ENTRY_BYTES: Final = 50  # of the shortest entry of a header
_MOST_ENTRIES: Final = 160_000  # DeepSeek-V4-Pro has 145,116 tensors in all its files
_MOST_DIMS: Final = 8
_LARGEST: Final = 2**63 - 1  # size or offset
_MASQUERADES: Final = {
    b"version https://git-lfs": "a pointer of git LFS; fetch the file itself",
    b"<": "a page of HTML or XML; the download went wrong",
    b"PK\x03\x04": "a zip archive, perhaps of torch's, which may run code when opened",
    b"\x80": "a pickle, which may run code when opened",
}
Region = tuple[slice, ...]  # of each dimension, with start and stop, without a step


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    path: pathlib.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name; ValueError at anything that is impossible."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = _header_bytes(path, file, size)
    start = _LENGTH_BYTES + len(raw)
    with naming(path):
        check_plausible(raw, _ENTRY_BYTES, brackets=3, quotes=10, commas=6)
        tensors = dict(_tensors(path, parse_json(raw), start))
        _check_layout(tensors, start, size)
    return tensors


def open_regular(path: pathlib.Path) -> Any:
    """Opens a regular file for reading bytes; nothing that could block."""
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
        if is_regular:
            return open(path, "rb", buffering=0)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
    raise ValueError(f"{path}: is not a regular file")


def check_plausible(
    raw: bytes, entry_bytes: int, *, brackets: int, quotes: int, commas: int
) -> None:
    """Refuses JSON that would take far more memory as objects than as text, or long.

    The counts are of one entry of the list of tensors that the text should be.
    """
    entries = min(len(raw) // entry_bytes, _MOST_ENTRIES)
    fits = (
        raw.count(b"{") + raw.count(b"[") <= brackets * entries + 100
        and raw.count(b'"') <= quotes * entries + 1000
        and raw.count(b",") <= commas * entries + 1000
    )
    if not fits:
        raise ValueError(
            "has far too many brackets, quotes or commas for a list of tensors"
        )


def parse_json(raw: bytes) -> Any:
    """What JSON says; keys may not repeat."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{shown(twice)} is given twice")
    return found


def _header_bytes(path: pathlib.Path, file: Any, size: int) -> bytes:
    first = file.read(_LENGTH_BYTES + 16)
    for magic, what in _MASQUERADES.items():
        # A header's length may begin with the same bytes.
        if first.startswith(magic) and first[8:9] != b"{":
            if magic != b"\x80" or first[1:2] < b"\x06":
                raise ValueError(f"{path}: is no safetensors file but {what}")
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    room = size - _LENGTH_BYTES
    if room < 2 or length > room:
        raise ValueError(
            f"{path}: says that its header has {length} bytes, and has {size} in all: "
            "it is cut short or no safetensors file"
        )
    if length > _MOST_HEADER_BYTES:
        raise ValueError(
            f"{path}: has a header of {length} bytes, above {_MOST_HEADER_BYTES}"
        )
    raw = os.pread(file.fileno(), length, _LENGTH_BYTES)
    if len(raw) != length:
        raise ValueError(f"{path}: was cut short while it was read")
    return raw


def _tensors(
    path: pathlib.Path, header: Any, start: int
) -> Iterator[tuple[str, StoredTensor]]:
    if not isinstance(header, dict):
        raise ValueError(f"its header is {shown(header)}, not an object")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {
            "dtype",
            "shape",
            "data_offsets",
        }:
            raise ValueError(
                f"tensor {shown(name)} is {shown(entry)}; it needs dtype, shape and "
                "data_offsets"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(
                f"tensor {shown(name)} has the dtype {shown(dtype)}, not one of "
                f"{', '.join(DTYPES)}"
            )
        if not _are_sizes(shape) or len(shape) > _MOST_DIMS:
            raise ValueError(f"tensor {shown(name)} has the shape {shown(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {shown(name)} has data_offsets {shown(offsets)}")
        tensor = StoredTensor(
            path, name, DTYPES[dtype], tuple(shape), start + offsets[0]
        )
        if tensor.num_bytes != offsets[1] - offsets[0]:
            raise ValueError(
                f"tensor {shown(name)} is {dtype} of the shape {shown(shape)}, "
                f"{shown(tensor.num_bytes)} bytes; its data_offsets are "
                f"{shown(offsets)}"
            )
        yield name, tensor


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        is_int(value) and 0 <= value <= _LARGEST for value in values
    )


def _check_layout(tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """The tensors' bytes must follow each other and end where the file does."""
    end = start
    in_order = sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes))
    for tensor in in_order:
        if tensor.offset != end:
            where = "overlaps what is before it" if tensor.offset < end else "has a gap"
            raise ValueError(
                f"tensor {shown(tensor.name)} begins at byte {tensor.offset}, not "
                f"{end}: it {where}"
            )
        end += tensor.num_bytes
    if end != size:
        last = shown(in_order[-1].name) if in_order else "the header"
        raise ValueError(
            f"has {size} bytes, and {last} ends at {end}: it is cut short or has more "
            "than its header says"
        )


def read_region(tensor: StoredTensor, region: Region, out: np.ndarray) -> None:
    """Fills a contiguous array with a region of a tensor, reading not one byte more."""
    buffer = out.reshape(-1).view(np.uint8).data
    starts, length = _runs(tensor, region)
    with open_regular(tensor.path) as file:
        for i, start in enumerate(starts.tolist()):
            part = buffer[i * length : (i + 1) * length]
            _read_run(tensor, file.fileno(), start, part)


def _read_run(tensor: StoredTensor, file: int, start: int, part: memoryview) -> None:
    while part:
        try:
            count = os.preadv(file, [part], start)
        except OSError as error:
            raise ValueError(
                f"{tensor.path}: {tensor.name} cannot be read: {error.strerror}"
            ) from error
        if count == 0:  # it has become shorter since its header was read
            raise ValueError(f"{tensor.path}: ends within {tensor.name}")
        part, start = part[count:], start + count


def _runs(tensor: StoredTensor, region: Region) -> tuple[np.ndarray, int]:
    """Offsets in the file of a region's contiguous runs, and the bytes of each."""
    shape, inner = tensor.shape, tensor.dtype.itemsize
    outer = len(shape)
    while outer > 0 and region[outer - 1] == slice(0, shape[outer - 1]):
        outer -= 1
        inner *= shape[outer]
    starts = np.zeros((), np.int64)
    length = stride = inner
    for dim in reversed(range(outer)):
        first, last = region[dim].start, region[dim].stop
        if dim == outer - 1:
            starts, length = starts + first * stride, (last - first) * stride
        else:
            steps = np.arange(first, last, dtype=np.int64) * stride
            starts = steps.reshape(-1, *[1] * starts.ndim) + starts
        stride *= shape[dim]
    return tensor.offset + starts.reshape(-1), length


def split_region(region: Region, most_elements: int) -> Iterator[Region]:
    """Parts of a region, none larger than allowed, along the first dimensions."""
    sizes = sizes_of(region)
    if math.prod(sizes) <= most_elements:
        yield region
        return
    dim = next(dim for dim, size in enumerate(sizes) if size > 1)
    inner = math.prod(sizes[dim + 1 :])
    step = max(1, most_elements // inner)
    for first in range(region[dim].start, region[dim].stop, step):
        last = min(first + step, region[dim].stop)
        part = (*region[:dim], slice(first, last), *region[dim + 1 :])
        yield from split_region(part, most_elements)


def sizes_of(region: Region) -> list[int]:
    """The shape of a region."""
    return [part.stop - part.start for part in region]


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of an array."""
    return tuple(slice(0, size) for size in shape)
