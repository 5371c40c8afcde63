"""The programs that are planned: a step of training and one of decoding, from shapes.

They are traced over a mesh without devices, by the code that real devices run.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, Int

from dsv4_eqx.model.abstract import AbstractModel, Cache
from dsv4_eqx.sharding.sharded_model import ShardedModel
from dsv4_eqx.training.masks import trainable


def training_step(
    model: AbstractModel, tokens: Int[Array, "batch seq"], targets: Int[Array, "..."]
) -> tuple[Float[Array, ""], Any]:
    """The mean cross-entropy in nats of the main model, and its gradients.

    Each layer's input alone is kept for the backward pass. What the loss does not
    reach, as prediction blocks, has no gradient: see `trainable`.
    """
    trained, others = eqx.partition(model, trainable(model))

    def mean_nats(trained: Any) -> Array:
        model = eqx.combine(trained, others)
        hidden = model.hidden(tokens, remat=True)
        return jnp.mean(model.cross_entropy(hidden, targets))

    return jax.value_and_grad(mean_nats)(trained)


def decoding_step(
    model: ShardedModel, tokens: Int[Array, "batch 1"], cache: Cache
) -> tuple[Float[Array, "batch 1 vocab"], Cache]:
    """Logits after one more token of each row, and the cache with it."""
    hidden, cache = model.extend(tokens, cache)
    return model.unembed(hidden), cache


def program_of(step: Callable[..., Any], *args: Any) -> Jaxpr:
    """The traced step, without what nobody uses, as XLA leaves it out."""
    jaxpr = jax.jit(step).trace(*args).jaxpr.jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
