"""Finds the routers of a model that choose experts by score."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.moe.router import TopKRouter


class PlacedRouter(NamedTuple):
    """A router, and the layers it belongs to: several where layers are stacked."""

    router: TopKRouter
    layers: tuple[int, ...]  # in the order of the stack; MTP blocks come last
    is_stacked: bool


def scoring_routers(model: DeepSeekV4) -> list[PlacedRouter]:
    """All routers by score, in the order of the model's leaves."""
    return [
        PlacedRouter(router, layers, is_stacked)
        for block, layers, is_stacked in _blocks(model)
        if isinstance(router := _router_of(block), TopKRouter)
    ]


def _blocks(model: DeepSeekV4) -> Iterator[tuple[Any, tuple[int, ...], bool]]:
    """Each block, which layers it holds, and whether it is a stack of them."""
    layers, num_layers = model.layers, len(model.layers)
    period, start = len(layers.repeated), len(layers.first)
    end = start + period * layers.num_repeats
    for i, block in enumerate(layers.first):
        yield block, (i,), False
    for i, block in enumerate(layers.repeated):
        yield block, tuple(range(start + i, end, period)), True
    for i, block in enumerate(layers.last):
        yield block, (end + i,), False
    for i, mtp in enumerate(model.mtp):
        yield mtp.block, (num_layers + i,), False


def _router_of(block: Any) -> Any:
    """Its router; None if the block has a part of one's own instead."""
    return getattr(getattr(block, "moe", None), "router", None)
