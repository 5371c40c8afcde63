"""A directory that appears under its name complete and on the disk, or not at all.

It is filled under another name beside the final one, every file and directory is
flushed to the disk, and a single rename puts it in place. A directory that it replaces
passes on its mode and, where that is permitted, its owner. What a killed process left
behind is taken away by the next one that writes there: the lock on it is then free.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import Final

_AT_WORKING_DIRECTORY: Final = -100
_EXCHANGE: Final = 2
_TOKEN_BYTES: Final = 8


@contextlib.contextmanager
def new_directory(final: pathlib.Path, *, replace: bool) -> Iterator[pathlib.Path]:
    """Gives a directory to fill, which becomes `final` when the block ends well.

    **Arguments:**

    - `final`: where it goes; missing or empty unless it is to be replaced.
    - `replace`: whether it may take the place of one that is there, in one step.

    **Raises:** ValueError if there is something under that name that must stay, or that
    the file system cannot replace in one step.
    """
    final = pathlib.Path(os.path.abspath(final))
    prefix = f".{final.name}.saving-"
    with (
        _there(final.parent),
        _fresh_locked(final.parent, prefix) as filling,
    ):
        try:
            yield filling
            _flush_tree(filling)
            _pass_on_mode(final, filling)
            _put_in_place(filling, final, replace)
            _flush(final.parent)
        finally:
            # After an exchange this is what was there before.
            shutil.rmtree(filling, ignore_errors=True)


@contextlib.contextmanager
def _there(directory: pathlib.Path) -> Iterator[None]:
    """A directory is there with its parents; those made go if the block fails."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _flush(path.parent)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # somebody else's files may be in it
                path.rmdir()
        raise


def _pass_on_mode(final: pathlib.Path, filling: pathlib.Path) -> None:
    if not final.is_dir():
        return
    found = final.stat()
    with contextlib.suppress(OSError):  # it need not be permitted
        os.chown(filling, found.st_uid, found.st_gid)
    os.chmod(filling, stat.S_IMODE(found.st_mode))


def _put_in_place(filling: pathlib.Path, final: pathlib.Path, replace: bool) -> None:
    try:
        os.rename(filling, final)  # also over an empty directory
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not replace or not final.is_dir():
            raise ValueError(f"{final}: is there already") from error
        _exchange(filling, final)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Two directories swap their names in one step, which only Linux offers."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    failed = rename is None or rename(
        _AT_WORKING_DIRECTORY,
        os.fsencode(one),
        _AT_WORKING_DIRECTORY,
        os.fsencode(other),
        _EXCHANGE,
    )
    if failed:
        why = "" if rename is None else f": {os.strerror(ctypes.get_errno())}"
        raise ValueError(
            f"{other}: cannot be replaced in one step on this file system{why}; save "
            "under another name, or remove it first"
        )


@contextlib.contextmanager
def _fresh_locked(parent: pathlib.Path, prefix: str) -> Iterator[pathlib.Path]:
    """A new directory that is ours until the block ends."""
    _remove_abandoned(parent, prefix)
    while True:
        path = parent / f"{prefix}{secrets.token_hex(_TOKEN_BYTES)}"
        path.mkdir()
        with _locked(path) as is_ours:
            # Before it was locked, another process may have taken it for abandoned.
            if is_ours and path.exists():
                yield path
                return


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[bool]:
    """Whether it is there and nobody else's; it is ours until the block ends."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_abandoned(parent: pathlib.Path, prefix: str) -> None:
    ours = re.compile(re.escape(prefix) + f"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
    for path in [path for path in parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _locked(path) as is_free:
            if is_free:
                shutil.rmtree(path, ignore_errors=True)


def _flush_tree(directory: pathlib.Path) -> None:
    for folder, _, files in os.walk(directory):
        for file in files:
            path = pathlib.Path(folder) / file
            if not path.is_symlink():
                _flush(path)
        _flush(pathlib.Path(folder))


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
