"""Where a checkpoint is, on the hub or here, and what its directory holds.

Nothing outside the directory is opened, whatever its files say: the names of shards in
an index are plain file names. Links are followed, which only the directory's owner can
have made; what is copied beside the weights may not be one that leads elsewhere.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from dsv4_eqx.checkpoint.faults import faults_error, listing_error, naming, summary
from dsv4_eqx.checkpoint.tensors import (
    StoredTensor,
    check_plausible,
    open_regular,
    parse_json,
    read_header,
)
from dsv4_eqx.numerics.validation import invalid_argument, path_of, shown

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"  # how transformers ends a text
_MOST_JSON_BYTES: Final = {CONFIG: 1 << 20, INDEX: 24 << 20}
_ENTRY_BYTES: Final = 30  # of the shortest likely entry of an index
_SUFFIX: Final = ".safetensors"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS: Final = (*_PICKLES, _SUFFIX, ".gguf", ".index.json")
_MOST_OTHER_BYTES: Final = 64 << 20
_REPOSITORY: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# The weights, and what `convert` copies beside them.
_FILES: Final = tuple(
    "*.safetensors *.json *.jinja *.model *.txt *.md LICENSE*".split()
)


@contextlib.contextmanager
def unreplaced(call: str, directory: pathlib.Path) -> Iterator[None]:
    """Refuses what was read inside if another directory has taken its place by then."""
    before = directory.stat()

    def check() -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(before, directory.stat()):
                return
        raise ValueError(
            f"{call}: {directory} was replaced while it was read: load it again."
        )

    try:
        yield
    except (OSError, ValueError):  # perhaps because it was
        check()
        raise
    check()


def local_directory(
    call: str,
    name: str | os.PathLike,
    revision: str | None,
    files: Sequence[str] = _FILES,
) -> pathlib.Path:
    """The directory itself, or where the hub's files are once they are downloaded."""
    directory = path_of(call, "directory", name)
    if revision is not None and not isinstance(revision, str):
        allowed = "a branch, tag or commit, or None"
        raise invalid_argument(call, "revision", revision, allowed)
    if directory.is_dir():
        if revision is not None:
            raise ValueError(
                f"{call}: {directory} is a directory, and revision={revision!r} is for "
                "names of the Hugging Face hub; leave it out."
            )
        return directory
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{call}: {directory}: there is no such directory")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{call}: {name!r} is no directory, and reading it from the Hugging Face "
            "hub needs a package: pip install 'dsv4-eqx[hf]'"
        ) from error
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files)
        )
    except Exception as error:  # its own, and those of what it downloads with
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OSError(
            f"{call}: {name!r}, revision {revision or 'main'!r}, is no directory, and "
            f"the Hugging Face hub does not give it: {why}; see that the name is "
            "right, the network is there and you are logged in (`hf auth login`)."
        ) from error
    return pathlib.Path(found)


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """What `config.json` says."""
    return _read_json(directory, CONFIG)


def read_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, from headers that agree with the index."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: there is no such directory")
    # Links that lead nowhere are there too, and cannot be opened.
    has_single = os.path.lexists(directory / SINGLE)
    if not os.path.lexists(directory / INDEX):
        if not has_single:
            raise ValueError(f"{directory}: {_why_no_weights(directory)}")
        return read_header(directory / SINGLE)
    index = read_index(directory)
    if has_single and SINGLE not in index.values():
        raise ValueError(
            f"{directory}: has both {SINGLE} and {INDEX}, which does not name it; take "
            "one of them away"
        )
    return _read_shards(directory, index)


def other_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Small files beside the weights and the configuration, as those of a tokenizer.

    Neither hidden ones, nor what leads out of the directory, unless into the blobs of
    the Hugging Face hub's cache that it is a snapshot in.
    """
    home = pathlib.Path(os.path.realpath(directory))
    blobs = home.parent.parent / "blobs"
    found = []
    for name in _names(directory):
        if name == CONFIG or name.startswith(".") or name.endswith(_WEIGHTS):
            continue
        real = pathlib.Path(os.path.realpath(directory / name))
        in_blobs = home.parent.name == "snapshots" and real.is_relative_to(blobs)
        if (real.is_relative_to(home) or in_blobs) and real.is_file():
            if real.stat().st_size <= _MOST_OTHER_BYTES:
                found.append(directory / name)
    return found


def _names(directory: pathlib.Path) -> list[str]:
    """Of all that is in a directory."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise ValueError(f"{directory}: cannot be listed: {error.strerror}") from error


def _why_no_weights(directory: pathlib.Path) -> str:
    missing = f"has neither {SINGLE} nor {INDEX}"
    pickles = [name for name in _names(directory) if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{missing}, only {shown(pickles)}: pickles may run code when they are "
            "opened and are not read; convert them to safetensors"
        )
    return missing


def read_index(directory: pathlib.Path) -> dict[str, str]:
    """The file of each tensor, all of them beside the index."""
    index = _read_json(directory, INDEX)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{directory / INDEX}: has no weight_map of names to files")
    for name, file in names.items():
        if not _is_plain_name(file):
            raise ValueError(
                f"{directory / INDEX}: {shown(name)} is in {shown(file)}, which is not "
                f"the name of a {_SUFFIX} file in the same directory"
            )
    return names


def _is_plain_name(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(_SUFFIX)
        and len(file) < 256
        and file.isprintable()
        and not set(file) & set("/\\\0")
    )


def _read_shards(
    directory: pathlib.Path, index: dict[str, str]
) -> dict[str, StoredTensor]:
    files = sorted(set(index.values()))
    missing = set(files) - set(_names(directory))
    if missing:
        lost = [name for name, file in index.items() if file in missing]
        listed = ", ".join(summary(missing))
        raise listing_error(
            f"{directory}: {len(missing)} of {len(files)} files that {INDEX} names are "
            f"missing, {listed}, and with them {len(lost)} tensors",
            lost,
        )
    found, faults = {}, []
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if index.get(name) != file:
                where = f"is in {file}, and in {INDEX} " + (
                    f"in {index[name]}" if name in index else "not at all"
                )
                faults.append(f"{shown(name)} {where}")
            else:
                found[name] = tensor
    for name in index.keys() - found.keys():
        faults.append(f"{shown(name)} is not in {index[name]}, where {INDEX} has it")
    if faults:
        raise faults_error(str(directory), faults)
    return found


def _read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    if not directory.is_dir():
        raise ValueError(f"{directory}: there is no such directory")
    path, most = directory / name, _MOST_JSON_BYTES[name]
    with open_regular(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path}: has more than {most} bytes")
    with naming(path):
        if name == INDEX:
            check_plausible(raw, _ENTRY_BYTES, brackets=0, quotes=4, commas=1)
        found = parse_json(raw)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is {shown(found)}, not a JSON object")
    return found
