"""Where a checkpoint is to be written: judged before it is, and what stays there."""

import os
import pathlib
import shutil
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from dsv4_eqx.checkpoint.directory import CONFIG, INDEX, SINGLE, read_index
from dsv4_eqx.numerics.validation import path_of, validate_flag, validate_size


class Target(NamedTuple):
    """A directory to write, and how."""

    call: str
    directory: pathlib.Path
    replace: bool
    most_file_bytes: int


def checked_target(
    call: str, name: str, directory: Any, *, overwrite: Any, most_file_bytes: Any
) -> Target:
    """Judges where a checkpoint is to go, before anything is done for it.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the argument that says where.
    - `directory`: missing or empty, or a checkpoint to replace.
    - `overwrite`: whether it may take the place of a checkpoint. Other files that are
        in its directory stay.
    - `most_file_bytes`: of a file, but for a single tensor that is larger.

    **Raises:** ValueError if an argument is out of its range, or there is something
    under that name that must stay.
    """
    validate_flag(call, "overwrite", overwrite)
    most_file_bytes = validate_size(call, "most_file_bytes", most_file_bytes)
    path = pathlib.Path(os.path.abspath(path_of(call, name, directory)))
    fault = _why_not_free(path, bool(overwrite))
    if fault is not None:
        raise ValueError(f"{call}: {path} {fault}.")
    return Target(call, path, bool(overwrite), most_file_bytes)


def _why_not_free(path: pathlib.Path, replace: bool) -> str | None:
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        return (
            "is there and is no checkpoint's directory but a link to "
            f"{os.readlink(path)}; give the path of that"
        )
    if not path.is_dir():
        return "is there and is no checkpoint's directory; give another name"
    if os.path.ismount(path):
        return "is where a file system is mounted; give the name of a directory in it"
    if _is_worked_in(path):
        return "is the working directory or above it; give another name, or leave it"
    names = os.listdir(path)
    if names and not {SINGLE, INDEX} & set(names):
        return "is there and is no checkpoint's directory; give another name"
    if names and not replace:
        return (
            "has a checkpoint; give another name, or overwrite=True (--overwrite of "
            "the command) to replace it"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return "may not be written; give another name, or change its mode"
    return None


def _is_worked_in(path: pathlib.Path) -> bool:
    try:
        return pathlib.Path(os.getcwd()).is_relative_to(path.resolve())
    except FileNotFoundError:  # it is gone
        return False


def staying(
    target: Target, written: Collection[str], copied: Collection[str]
) -> list[pathlib.Path]:
    """What is beside a checkpoint that is replaced, and stays.

    **Arguments:**

    - `target`: of the new checkpoint.
    - `written`: names of the new checkpoint's own files.
    - `copied`: names of files that come with it, in place of what has them now.

    **Raises:** ValueError if something would be lost, or cannot be carried over.
    """
    directory = target.directory
    if not target.replace or not directory.is_dir():
        return []
    gone = {CONFIG, INDEX, SINGLE, *copied}
    if (directory / INDEX).is_file():  # other weights are somebody's
        gone |= set(read_index(directory).values())
    found = [
        p for p in sorted(directory.iterdir()) if p.name not in gone or _is_tree(p)
    ]
    for path in found:
        if path.name in written or path.name in copied:
            raise ValueError(
                f"{target.call}: {path} would be lost: the checkpoint has a file of "
                "that name; move it elsewhere first."
            )
        for part in _parts(path):
            if not _may_stay(part):
                raise ValueError(
                    f"{target.call}: {part} cannot be carried over: it is no link, "
                    "file that may be read, or directory that may be written; move it "
                    "elsewhere first."
                )
    return found


def carry_over(path: pathlib.Path, new: pathlib.Path) -> None:
    """Gives a file, link or directory another place; a file stays the same one.

    **Arguments:**

    - `path`: of what `staying` gave.
    - `new`: its other place.
    """
    if _is_tree(path):
        shutil.copytree(path, new, symlinks=True, copy_function=_link)
    elif path.is_symlink():
        new.symlink_to(os.readlink(path))
    else:
        _link(path, new)


def _link(path: str | os.PathLike, new: str | os.PathLike) -> None:
    try:
        os.link(path, new)
    except OSError:  # a file system without links, or somebody else's file
        shutil.copy2(path, new)


def _is_tree(path: pathlib.Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _parts(path: pathlib.Path) -> Iterator[pathlib.Path]:
    yield path
    if _is_tree(path):
        for part in path.iterdir():
            yield from _parts(part)


def _may_stay(path: pathlib.Path) -> bool:
    if path.is_symlink():
        return True
    if path.is_dir():
        may_be_removed = os.access(path, os.R_OK | os.W_OK | os.X_OK)
        return may_be_removed and not os.path.ismount(path)
    return path.is_file() and os.access(path, os.R_OK)
