"""One checkpoint to another, tensor by tensor: other names, another dtype."""

import functools
import os
from collections.abc import Iterator
from typing import Final

import numpy as np
from jax.typing import DTypeLike

from dsv4_eqx.checkpoint.directory import other_files, read_config
from dsv4_eqx.checkpoint.download import local_directory
from dsv4_eqx.checkpoint.inventory import Checkpoint, chosen_dtype, open_checkpoint
from dsv4_eqx.checkpoint.load import Loader
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.checkpoint.save import MOST_FILE_BYTES, array_tensors, check_for_hf
from dsv4_eqx.checkpoint.write import NewTensor, validate_target, write_checkpoint
from dsv4_eqx.config.hf_keys import other_keys
from dsv4_eqx.numerics.validation import validate_flag, validate_size

_CALL: Final = "convert"
_DTYPES: Final = ("dtype", "torch_dtype")  # of the weights, as transformers writes it


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    official: bool = False,
    overwrite: bool = False,
    most_file_bytes: int = MOST_FILE_BYTES,
    revision: str | None = None,
) -> None:
    """Writes a checkpoint's weights under Hugging Face's or the official names.

    Quantised weights become arrays. A few megabytes are in memory at a time, whatever
    the model's size.

    What is beside the weights comes with them, as a tokenizer and a licence: regular
    files of at most 64 MiB, but for hidden ones, weights in other formats, indices, and
    links that lead out of the directory; no directories. Of the configuration,
    everything is kept that says nothing of the sizes and of how weights are stored, as
    special tokens.

    Arguments and errors are those of `from_pretrained` and `save_pretrained`. Where a
    checkpoint is overwritten, files that come from the source replace its own.
    """
    validate_flag(_CALL, "official", official)
    dtype = chosen_dtype(_CALL, dtype)
    most_file_bytes = validate_size(_CALL, "most_file_bytes", most_file_bytes)
    target = validate_target(_CALL, "target", target, overwrite=overwrite)
    checkpoint = open_checkpoint(_CALL, local_directory(_CALL, source, revision), dtype)
    model = checkpoint.model
    if not official:
        check_for_hf(_CALL, model.config)
    raw, new_dtype = read_config(checkpoint.directory), model.embedding.dtype.name
    kept = other_keys(raw, model.config.to_hf())
    kept |= {key: new_dtype for key in _DTYPES if key in raw}
    with Loader(checkpoint, keep_quantized=False) as loader:
        write_checkpoint(
            target,
            model.config,
            _new_tensors(checkpoint, loader, official),
            overwrite=overwrite,
            most_file_bytes=most_file_bytes,
            more_config=kept,
            more_files=other_files(checkpoint.directory),
        )


def _new_tensors(
    checkpoint: Checkpoint, loader: Loader, official: bool
) -> Iterator[NewTensor]:
    new = sources(checkpoint.model, official=official)
    for (target, leaf), (source, _) in zip(new, checkpoint.wanted, strict=True):
        dtype = np.dtype(leaf.dtype)
        read = functools.partial(loader.read_region, source, dtype)
        yield from array_tensors(target, dtype, read)
