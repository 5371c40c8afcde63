"""The drafter DSpark of a released checkpoint, its weights by name, all or none."""

import os
import pathlib
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_eqx.checkpoint.directory import (
    CONFIG,
    local_directory,
    read_config,
    read_tensors,
    unreplaced,
)
from dsv4_eqx.checkpoint.faults import faults_error, naming
from dsv4_eqx.checkpoint.inventory import (
    Checkpoint,
    NamedTensors,
    check_quantization,
    chosen_dtype,
    with_weights,
)
from dsv4_eqx.checkpoint.load import Loader
from dsv4_eqx.checkpoint.names import drafter_sources
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.drafter import DSparkConfig
from dsv4_eqx.model.dspark import DSpark
from dsv4_eqx.numerics.validation import (
    FLOATS,
    validate_dtype,
    validate_flag,
)

_CALL: Final = "load_dspark"
_EMBEDDING: Final = "embed.weight"  # whose dtype is the model's


def load_dspark(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    keep_quantized: bool = False,
    revision: str | None = None,
) -> DSpark:
    """Loads the drafter of a checkpoint, of which `from_pretrained` loads the model.

    **Arguments:** as for `from_pretrained`.

    **Raises:** ValueError if the configuration has no drafter, and naming every tensor
    `mtp.*` that is missing, extra or misshapen; otherwise as `from_pretrained` does.
    """
    validate_flag(_CALL, "keep_quantized", keep_quantized)
    dtype = chosen_dtype(_CALL, dtype)
    directory = local_directory(_CALL, directory, revision)
    with unreplaced(_CALL, directory):
        checkpoint, faults = _inspect(directory, dtype)
        if faults:
            raise faults_error(f"{_CALL}({str(directory)!r})", faults)
        with Loader(checkpoint, keep_quantized=keep_quantized) as loader:
            leaves = [loader.load(*wanted, None) for wanted in checkpoint.wanted]
    return jax.tree.unflatten(jax.tree.structure(checkpoint.model), leaves)


def abstract_drafter(config: Config, sizes: DSparkConfig, dtype: Any) -> DSpark:
    """A drafter of shapes and dtypes alone, without arrays."""
    return eqx.filter_eval_shape(
        lambda: DSpark(config, sizes, key=jax.random.key(0), dtype=dtype)
    )


def _inspect(
    directory: pathlib.Path, dtype: np.dtype | None
) -> tuple[Checkpoint, list[str]]:
    """What is in a checkpoint of a drafter, and what is wrong with it."""
    raw = read_config(directory)
    with naming(directory / CONFIG):
        check_quantization(raw)
        sizes = DSparkConfig.from_hf(raw)
        if sizes is None:
            raise ValueError(
                f"{_CALL}: there is no drafter: the configuration has no "
                "dspark_block_size; from_pretrained loads a prediction block."
            )
        # Without the keys of the drafter, which are read.
        others = {k: v for k, v in raw.items() if not str(k).startswith("dspark_")}
        config = Config.from_hf(others | {"num_nextn_predict_layers": 0})
    stored = read_tensors(directory)
    embedding = stored.get(_EMBEDDING)
    if dtype is None:
        found = None if embedding is None else embedding.dtype
        is_weight = found is not None and found.name in FLOATS
        dtype = validate_dtype(_CALL, found if is_weight else jnp.float32)
    drafter = abstract_drafter(config, sizes, dtype)
    wanted = list(drafter_sources(drafter))
    tensors = {name: t for name, t in stored.items() if name.startswith("mtp.")}
    others = [source for source, _ in wanted]
    named = NamedTensors(drafter, tensors, wanted, others, True, [])
    return with_weights(directory, named)
