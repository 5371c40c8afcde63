"""Writing a checkpoint: safetensors files, their index, and the configuration.

It is written into a directory beside the one that it is for and flushed to the disk;
then one rename gives it its name. A checkpoint that it replaces is renamed first, and
removed last: a process that is killed between the two leaves it there, whole, under
`.NAME.replaced-...`, and one killed earlier leaves `.NAME.saving-...` to be removed.
"""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from dsv4_eqx.checkpoint.directory import (
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    other_files,
    read_index,
)
from dsv4_eqx.checkpoint.tensors import NAME_OF_DTYPE, Region, split_region, whole
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.hf import generation_to_hf
from dsv4_eqx.numerics.validation import path_of, validate_flag

# Of tqdm: shown on a terminal alone, and where it takes more than two seconds.
SHOWN_BYTES: Final[dict[str, Any]] = dict(
    unit="B", unit_scale=True, delay=2, disable=None
)
_MOST_ELEMENTS: Final = 1 << 22  # that are in memory at a time
_ALIGNMENT: Final = 8


@runtime_checkable
class SavesItself(Protocol):
    """What writes itself into a directory, as tokenizers do, ours and transformers'."""

    def save_pretrained(self, directory: Any, /) -> Any:
        """Writes its files."""
        ...


class NewTensor(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]  # in the file
    part_shape: tuple[int, ...]  # in which it is read; the same numbers in order
    read: Callable[[Region], np.ndarray]  # a region of `part_shape`

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def validate_target(
    call: str,
    name: str,
    directory: Any,
    *,
    overwrite: Any,
    own_files: Collection[str] = (),
) -> pathlib.Path:
    """The path to write to; ValueError if what is there must stay.

    `own_files` are those of what is written, where that is no checkpoint.
    """
    validate_flag(call, "overwrite", overwrite)
    path = pathlib.Path(os.path.abspath(path_of(call, name, directory)))
    check_free(f"{call}: {path}", path, bool(overwrite), own_files)
    return path


def check_free(
    what: str, path: pathlib.Path, overwrite: bool, own_files: Collection[str] = ()
) -> None:
    """A ValueError about `what` if there is something at a path that must stay."""
    fault = _why_not_free(path, overwrite, own_files)
    if fault is not None:
        raise ValueError(f"{what} {fault}.")


def _why_not_free(
    path: pathlib.Path, overwrite: bool, own_files: Collection[str]
) -> str | None:
    if not os.path.lexists(path):
        return None
    kind = "directory of adapters" if own_files else "checkpoint's directory"
    is_none = f"is there and is no {kind}"
    if path.is_symlink():
        return f"{is_none} but a link to {os.readlink(path)}; give the path of that"
    if not path.is_dir():
        return f"{is_none}; give another name"
    if os.path.ismount(path) or pathlib.Path.cwd().is_relative_to(path.resolve()):
        return (
            "is where a file system is mounted, or is the working directory or above "
            "it; give another name"
        )
    names = set(os.listdir(path))
    if names and not set(own_files or (SINGLE, INDEX)) & names:
        return f"{is_none}; give another name"
    if names and not overwrite:
        if own_files:
            return "has adapters; give another name, or overwrite=True to replace them"
        return (
            "has a checkpoint; give another name, or overwrite=True (--overwrite of "
            "the command) to replace it"
        )
    foreign = names - (set(own_files) or _files_of_checkpoint(path))
    if foreign:
        listed = ", ".join(sorted(foreign)[:8])
        return f"has {listed}, which would be lost; move it elsewhere first"
    return None


def _files_of_checkpoint(path: pathlib.Path) -> set[str]:
    """What a new checkpoint in its place replaces, or brings with it."""
    names = {CONFIG, INDEX, SINGLE, *(file.name for file in other_files(path))}
    if (path / INDEX).is_file():
        names |= set(read_index(path).values())
    return names


def write_checkpoint(
    directory: pathlib.Path,
    config: Config,
    tensors: Iterable[NewTensor],
    *,
    overwrite: bool,
    most_file_bytes: int,
    more_config: Mapping[str, Any] = types.MappingProxyType({}),
    more_files: Iterable[pathlib.Path] = (),
    tokenizer: SavesItself | None = None,
) -> None:
    """Writes a checkpoint to a path from `validate_target`, whole or not at all."""
    files = _split(tensors, most_file_bytes)
    total = sum(tensor.num_bytes for file in files.values() for tensor in file)
    with (
        tqdm(desc="saving", total=total, **SHOWN_BYTES) as progress,
        new_directory(directory) as filling,
    ):
        weight_map = {}
        for name, file in files.items():
            write_file(filling / name, file, progress)
            weight_map |= {tensor.name: name for tensor in file}
        # The new files go over those that are beside a checkpoint that is replaced.
        replaced = other_files(directory) if directory.is_dir() else []
        for path in (*replaced, *more_files):
            shutil.copy2(path, filling / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(filling)
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(filling / INDEX, index)
        write_json(filling / CONFIG, config.to_hf() | dict(more_config))
        generation = generation_to_hf(vars(config))
        if generation and not (filling / GENERATION).exists():
            write_json(filling / GENERATION, generation)
        check_free(str(directory), directory, overwrite)  # again: it took a while


@contextlib.contextmanager
def new_directory(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a directory to fill, which becomes `final` when the block ends well."""
    made = [path for path in (final.parent, *final.parents) if not path.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    filling, replaced = (
        final.with_name(f".{final.name}.{what}-{token}")
        for what in ("saving", "replaced")
    )
    filling.mkdir()
    try:
        yield filling
        for path in (*filling.rglob("*"), filling):
            _flush(path)
        if final.exists():
            os.rename(final, replaced)
        os.rename(filling, final)
        for path in {final.parent, *(path.parent for path in made)}:
            _flush(path)
    except BaseException as error:
        if replaced.exists() and final.exists():  # the new one, or somebody else's
            error.add_note(f"What was in {final} before is now in {replaced}.")
        elif replaced.exists():
            os.rename(replaced, final)
        shutil.rmtree(filling, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(tensors: Iterable[NewTensor], most_bytes: int) -> dict[str, list[NewTensor]]:
    """By file, at least one, as many consecutive tensors as fit in it."""
    files, left = [[]], most_bytes
    for tensor in tensors:
        if tensor.num_bytes > left and files[-1]:
            files.append([])
            left = most_bytes
        files[-1].append(tensor)
        left -= tensor.num_bytes
    count = len(files)
    if count == 1:
        return {SINGLE: files[0]}
    return {
        f"model-{number:05}-of-{count:05}.safetensors": file
        for number, file in enumerate(files, 1)
    }


def write_file(path: pathlib.Path, tensors: Sequence[NewTensor], progress: Any):
    """Writes tensors into a new safetensors file."""
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
            for region in split_region(whole(tensor.part_shape), _MOST_ELEMENTS):
                part = np.ascontiguousarray(tensor.read(region), tensor.dtype)
                file.write(part.reshape(-1).view(np.uint8).data)
                progress.update(part.nbytes)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
