"""Writing a checkpoint: safetensors files, their index, and the configuration."""

import contextlib
import json
import pathlib
import shutil
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from dsv4_eqx.checkpoint.atomic import new_directory
from dsv4_eqx.checkpoint.directory import CONFIG, INDEX, SINGLE
from dsv4_eqx.checkpoint.progress import Progress
from dsv4_eqx.checkpoint.target import Target, carry_over, staying
from dsv4_eqx.checkpoint.tensors import NAME_OF_DTYPE, Region, split_region, whole
from dsv4_eqx.config.config import Config

_MOST_ELEMENTS: Final = 1 << 22  # that are in memory at a time
_ALIGNMENT: Final = 8


class NewTensor(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]  # in the file
    own_shape: tuple[int, ...]  # in which it is read; the same numbers in order
    read: Callable[[Region], np.ndarray]  # a region of `own_shape`

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_checkpoint(
    target: Target,
    config: Config,
    tensors: Iterable[NewTensor],
    *,
    more_config: Mapping[str, Any] = types.MappingProxyType({}),
    more_files: Iterable[pathlib.Path] = (),
) -> None:
    """Writes a checkpoint that is there whole or not at all.

    **Arguments:**

    - `target`: from `checked_target`.
    - `config`: of the model.
    - `tensors`: what to write.
    - `more_config`: written into the configuration too.
    - `more_files`: copied beside it.

    **Raises:** ValueError if there is something under that name that must stay.
    """
    files = _named(_split(list(tensors), target.most_file_bytes))
    more = {path.name: path for path in more_files}
    names = {CONFIG, *files, *([INDEX] if len(files) > 1 else [])}
    staying(target, names, more)
    total = sum(tensor.num_bytes for file in files.values() for tensor in file)
    progress = Progress("saving", total)
    with (
        contextlib.closing(progress),
        new_directory(target.directory, replace=target.replace) as filling,
    ):
        weight_map = {}
        for name, file in files.items():
            _write_file(filling / name, file, progress)
            weight_map |= {tensor.name: name for tensor in file}
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(filling / INDEX, index)
        _write_json(filling / CONFIG, config.to_hf() | dict(more_config))
        for name, path in more.items():
            shutil.copy2(path, filling / name)
        # Again: there may be more of them by now.
        for path in staying(target, names, more):
            carry_over(path, filling / path.name)


def _split(tensors: Sequence[NewTensor], most_bytes: int) -> list[list[NewTensor]]:
    """Consecutive tensors, as many as fit in a file; at least one file."""
    files, room = [[]], most_bytes
    for tensor in tensors:
        if tensor.num_bytes > room and files[-1]:
            files.append([])
            room = most_bytes
        files[-1].append(tensor)
        room -= tensor.num_bytes
    return files


def _named(files: Sequence[list[NewTensor]]) -> dict[str, list[NewTensor]]:
    if len(files) == 1:
        return {SINGLE: files[0]}
    count = len(files)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": file
        for number, file in enumerate(files, 1)
    }


def _write_file(
    path: pathlib.Path, tensors: Sequence[NewTensor], progress: Progress
) -> None:
    # The widest first: then each begins at a multiple of its own width.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            for region in split_region(whole(tensor.own_shape), _MOST_ELEMENTS):
                part = np.ascontiguousarray(tensor.read(region), tensor.dtype)
                file.write(part.reshape(-1).view(np.uint8).data)
                progress.advance(part.nbytes)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
