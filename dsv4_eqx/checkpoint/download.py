"""Names of the Hugging Face hub in place of a directory."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Final

from dsv4_eqx.numerics.validation import invalid_argument, path_of

_REPOSITORY: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# The weights, and what `convert` copies beside them.
_FILES: Final = tuple(
    "*.safetensors *.json *.jinja *.model *.txt *.md LICENSE*".split()
)


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
