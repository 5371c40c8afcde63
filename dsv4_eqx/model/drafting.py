"""A drafter's state and drafts, and the validation of what it is given."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from dsv4_eqx.config.config import Config
from dsv4_eqx.config.drafter import DSparkConfig
from dsv4_eqx.model.inputs import is_concrete
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_key,
    validate_number,
)


class DSparkContext(eqx.Module):
    """What a drafter knows of the tokens that the model has read."""

    lengths: Int32[Array, " batch"]  # tokens of each row so far
    keys: Float[Array, "batch stages window head_dim"]  # of the last of them


class Drafts(eqx.Module):
    """Drafted tokens of each row."""

    tokens: Int[Array, "batch places"]
    logits: Float[Array, "batch places vocab"]  # that each was chosen from
    # Logit of the probability that it is kept, where all before it are.
    confidence: Float[Array, "batch places"]


def drafting_config(config: Config, sizes: DSparkConfig) -> Config:
    """The configuration whose layer after the last is a drafter's block."""
    for name, value, kind in (
        ("config", config, Config),
        ("sizes", sizes, DSparkConfig),
    ):
        if not isinstance(value, kind):
            raise invalid_argument("DSpark", name, value, f"a {kind.__name__}")
    layers, vocab = config.num_hidden_layers, config.vocab_size
    if sizes.target_layer_ids[-1] >= layers or sizes.noise_token_id >= vocab:
        raise ValueError(
            f"DSpark: {sizes} is for a model of more than {layers} layers or {vocab} "
            "tokens; give the two configurations of one release."
        )
    return dataclasses.replace(config, num_nextn_predict_layers=1)


def validate_means(means: Any, sizes: tuple[int, int], context: Any) -> tuple[int, int]:
    """Rows and new tokens of what a drafter reads."""
    if not isinstance(context, DSparkContext):
        raise ValueError(
            f"DSpark.read: the context is a {type(context).__name__}; it must be from "
            "init_context."
        )
    rows, shape = context.lengths.shape[0], tuple(means.shape)
    if len(shape) != 4 or shape[0] != rows or shape[2:] != sizes:
        raise ValueError(
            f"DSpark.read: means of the shape {shape}; for this drafter and context "
            f"they are [{rows}, seq, {sizes[0]}, {sizes[1]}], from `means`."
        )
    return shape[0], shape[1]


def validate_anchors(anchors: Any, context: Any, vocab: int) -> Int[Array, " batch"]:
    """A known token id for each row of a context."""
    if not isinstance(context, DSparkContext):
        raise ValueError(
            f"DSpark.draft: the context is a {type(context).__name__}; it must be from "
            "init_context or read."
        )
    shape, found = context.lengths.shape, jnp.asarray(anchors)
    is_right = jnp.issubdtype(found.dtype, jnp.integer) and found.shape == shape
    if is_right and is_concrete(found):
        values = np.asarray(found)
        is_right = bool(np.all((values >= 0) & (values < vocab)))
    if not is_right:
        allowed = f"{shape[0]} token ids in [0, {vocab}), one for each row"
        raise invalid_argument("DSpark.draft", "anchors", anchors, allowed)
    return found


def validate_temperature(temperature: Any, key: Any) -> None:
    """Refuses drafts that cannot be drawn."""
    if validate_number("DSpark.draft", "temperature", temperature) > 0:
        validate_key("DSpark.draft", key)
