"""Experts that a call gives to the layers, in place of those that routers choose.

They are what `observe` shows as `routing.experts`: of the same tokens by other weights,
as older ones (paper section 4.2.3), or of the model that sampled the tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv4_eqx.moe.router import HashRouter, TopKRouter, validate_experts
from dsv4_eqx.numerics.validation import invalid_argument, validate_integers

# Of each layer, None where its router chooses.
GivenExperts = Sequence[Int[Array | np.ndarray, "batch seq slots"] | None] | None


def validate_given_experts(
    call: str, layers: Any, experts: GivenExperts, tokens: tuple[int, ...]
) -> tuple[Int[Array, "batch seq slots"] | None, ...] | None:
    """Experts for each of the model's `Layers`, as int32; None for those that hash.

    Refuses another number of layers, arrays that do not fit tokens and router, layers
    in a loop of which only some are given, and, unless traced, what is no expert.
    """
    if experts is None:
        return None
    if not isinstance(experts, Sequence) or len(experts) != len(layers):
        is_sequence = isinstance(experts, Sequence)
        found = f"{len(experts)} of them" if is_sequence else type(experts).__name__
        allowed = f"a sequence, one entry for each of the {len(layers)} layers"
        raise invalid_argument(call, "experts", found, allowed)
    places = [layers.place(i) for i in range(len(layers))]
    found = tuple(
        _of_layer(call, i, getattr(layers, section)[index], experts[i], tokens)
        for i, (section, index, _) in enumerate(places)
    )
    _validate_loops(call, places, found)
    return found


def by_section(layers: Any, experts: tuple | None) -> tuple[tuple, tuple, tuple]:
    """The given experts of `Layers.first`, `repeated` (stacked) and `last`."""
    experts = (None,) * len(layers) if experts is None else experts
    start, period = len(layers.first), len(layers.repeated)
    end = len(layers) - len(layers.last)

    def stacked(i: int) -> Array | None:
        entries = experts[start + i : end : period]
        return None if entries[0] is None else jnp.stack(entries)

    return experts[:start], tuple(map(stacked, range(period))), experts[end:]


def _of_layer(
    call: str, layer: int, block: Any, experts: Any, tokens: tuple[int, ...]
) -> Int[Array, "batch seq slots"] | None:
    """What the layer is given: nothing if it hashes, whatever stands there."""
    router = getattr(getattr(block, "moe", None), "router", None)
    if experts is None or isinstance(router, HashRouter):
        return None
    call = f"{call}: of layer {layer}"
    if isinstance(router, TopKRouter):
        validate_experts(call, experts, tokens, router.num_experts, router.num_slots)
    else:  # of one's own: it knows what it wants
        validate_integers(call, "experts", experts)
    return jnp.asarray(experts, jnp.int32)


def _validate_loops(call: str, places: list, found: tuple) -> None:
    """Refuses layers in one stack of which some are given experts and some are not."""
    in_stack: dict[int, set[bool]] = {}
    for (section, index, _), experts in zip(places, found, strict=True):
        if section == "repeated":
            in_stack.setdefault(index, set()).add(experts is None)
    for index, kinds in in_stack.items():
        if len(kinds) > 1:
            layers = [i for i, at in enumerate(places) if at[:2] == ("repeated", index)]
            raise ValueError(
                f"{call}: the layers {layers} run in one loop, and only some of them "
                "are given experts: give them to all, or to none."
            )
