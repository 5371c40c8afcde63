"""Support for stacked layers: which ones repeat, and what a scan must not copy.

A scan copies what it gives each repetition, and what it collects. A token needs only a
few of the experts and compressed entries, and copying all of them would cost more than
the layer itself. A layer therefore gets them as a `Slice`: the stack of all layers, and
where in it the layer's own are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dsv4_eqx.attention.cache import map_states
from dsv4_eqx.kernels.entries import LAYERS
from dsv4_eqx.model.block import Block
from dsv4_eqx.moe.experts import Experts
from dsv4_eqx.numerics.lora_weight import stands_for_array
from dsv4_eqx.numerics.slice import Slice, is_slice


def experts_in_place(blocks: tuple, stacked: tuple, repeat: Int[Array, ""]) -> tuple:
    """One repetition's blocks, their experts' weights read from the stack."""

    def is_experts(node: Any) -> bool:
        return isinstance(node, Experts)

    def in_place(node: Any, stack: Any) -> Any:
        if not is_experts(node):
            return node
        return jax.tree.map(lambda x: Slice(x, repeat), stack, is_leaf=stands_for_array)

    def block_in_place(block: Any, stack: Any) -> Any:
        # Wrappers, as around split weights, become blocks only while they run.
        if not isinstance(block, Block):
            return block
        return jax.tree.map(in_place, block, stack, is_leaf=is_experts)

    return tuple(map(block_in_place, blocks, stacked))


def with_room(states: tuple, room: int) -> tuple:
    """Stacked states with `room` more tokens in their windows."""

    def longer(x: Array, tokens: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[tokens] = (0, room)
        return jnp.pad(x, widths) if room else x

    return map_states(longer, lambda entries: entries, states)


def read_states(states: tuple, repeat: Int[Array, ""], room: int) -> tuple:
    """One repetition's states, without `room`; their entries are read in place."""

    def window(x: Array, tokens: int) -> Array:
        x = lax.dynamic_index_in_dim(x, repeat, LAYERS, keepdims=False)
        return lax.slice_in_dim(x, 0, x.shape[tokens] - room, axis=x.ndim + tokens)

    return map_states(window, lambda entries: Slice(entries, repeat, LAYERS), states)


def write_states(after: tuple, states: tuple, repeat: Int[Array, ""]) -> tuple:
    """Stacked states with one repetition's windows written; entries are already."""

    def put(new: Any, stack: Array) -> Array:
        if is_slice(new):
            return new.stack
        return lax.dynamic_update_index_in_dim(stack, new, repeat, LAYERS)

    return jax.tree.map(put, after, states, is_leaf=is_slice)


def repeating_unit(kinds: Sequence[object]) -> tuple[int, int, int]:
    """Start, period and count of the repetition with the fewest blocks to compile.

    They are `(len(kinds), 0, 0)` where nothing repeats. Layers of equal kinds can share
    a program.
    """
    num_layers = len(kinds)
    best = (num_layers, num_layers, 0, 0)  # blocks to compile, start, period, repeats
    for start in range(num_layers):
        for period in range(1, (num_layers - start) // 2 + 1):
            repeats = 1
            while (
                kinds[start : start + period]
                == (kinds[start + repeats * period : start + (repeats + 1) * period])
            ):
                repeats += 1
            blocks = num_layers - period * (repeats - 1)
            if repeats > 1:
                best = min(best, (blocks, start, period, repeats))
    return best[1:]
