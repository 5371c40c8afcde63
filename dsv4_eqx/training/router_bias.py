"""The bias that balances the loads of experts, moved after each optimizer step.

Paper section 2.1, in the form of DeepSeek-V3: `b_i += speed * sign(mean(n) - n_i)`,
where n_i tokens went to expert i. The bias affects the choice of experts alone, and has
no gradient.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv4_eqx.moe.router import TopKRouter
from dsv4_eqx.numerics.validation import invalid_argument, validate_number
from dsv4_eqx.sharding.sharded_model import model_on_device
from dsv4_eqx.training.routers import (
    PlacedRouter,
    scoring_routers,
)


def update_router_bias(
    model: Any, counts: Sequence[Any], *, speed: float = 1e-3
) -> Any:
    """The model with the biases of its routers moved towards equal loads.

    Nothing but the biases changes. It works under `jit` and over a mesh, and on the
    part of a model that is not trained, which has the biases:

        counts = [layer.routing.counts for layer in layers]  # from model.observe
        model = dsv4.update_router_bias(model, counts)

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`.
    - `counts`: for each layer, how many tokens went to each expert in the whole batch
        of the optimizer step: add up those of microbatches. Over a mesh,
        `routing.counts` counts the tokens of all devices, and it counts padding. Those
        of layers that hash are not read and may be None. The prediction block's router
        moves if its counts follow.
    - `speed`: how far a bias moves.

    **Raises:** ValueError if the model is another, there are not counts for every
    layer, counts are not one number for each expert, the biases are not there, or
    `speed` is no number of at least 0.
    """
    call = "update_router_bias"
    inner = model_on_device(call, model)
    speed = validate_number(call, "speed", speed)
    num_layers, num_mtp = len(inner.layers), len(inner.mtp)
    if len(counts) not in (num_layers, num_layers + num_mtp):
        more = ", perhaps also those of the prediction block" if num_mtp else ""
        allowed = f"those of {num_layers} layers{more}"
        raise invalid_argument(call, "counts", f"{len(counts)} of them", allowed)

    routers = scoring_routers(inner)
    routers = [placed for placed in routers if placed.layers[-1] < len(counts)]
    biases = {id(x.router): _moved(call, x, counts, speed) for x in routers}

    def replaced(node: Any) -> Any:
        if id(node) not in biases:
            return node
        return eqx.tree_at(lambda router: router.bias, node, biases[id(node)])

    return jax.tree.map(
        replaced, model, is_leaf=lambda node: isinstance(node, TopKRouter)
    )


def _moved(
    call: str, placed: PlacedRouter, counts: Sequence[Any], speed: float
) -> Float[Array, "*layers routes"]:
    """The new bias of a router, or of a stack of them."""
    bias = placed.router.bias
    if not isinstance(bias, jax.Array | np.ndarray):
        raise ValueError(
            f"{call}: the bias of layer {placed.layers[0]} is {bias!r}: give the whole "
            "model, or the part of it that is not trained."
        )
    loads = [_loads(call, i, counts[i], bias.shape[-1:]) for i in placed.layers]
    load = jnp.stack(loads) if placed.is_stacked else loads[0]
    # Multiplied, not divided: exact, and so 0 at the mean, up to 2**24 tokens.
    total = jnp.sum(load, axis=-1, keepdims=True)
    step = jnp.sign(total - load.shape[-1] * load)
    return bias + jnp.asarray(speed, bias.dtype) * step.astype(bias.dtype)


def _loads(
    call: str, layer: int, counts: Any, shape: tuple[int, ...]
) -> Float[Array, " routes"]:
    """How many tokens more each expert has than the one with the fewest."""
    is_array = isinstance(counts, jax.Array | np.ndarray)
    if not is_array or counts.shape != shape or counts.dtype == bool:
        found = f"{counts.dtype}{list(counts.shape)}" if is_array else counts
        allowed = f"an array of {shape[0]} numbers, one for each expert"
        raise invalid_argument(call, f"counts[{layer}]", found, allowed)
    # Differences of integers are exact, where float32 would round large counts.
    counts = jnp.asarray(counts)
    return (counts - jnp.min(counts)).astype(jnp.float32)
