"""`replace_layer`: one layer replaced, whether it is single or stacked with others."""

from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dsv4_eqx.model.block import Block
from dsv4_eqx.model.layers import Layers
from dsv4_eqx.numerics.validation import invalid_argument, is_int, shown

_CALL: Final = "replace_layer"
_LABELS: Final = (bool, int, float, str)


def replace_layer(model: Any, layer: int, block: Block) -> Any:
    """The model with one layer replaced by another block.

    `replace_layer(model, 2, edit(model.layers[2]))` edits a layer, whether it is single
    or stacked with others; gradients flow through it. Arrays may be JAX's, numpy's or
    abstract.

    **Arguments:**

    - `model`: a model, its `layers`, or a tree of the same structure, as of gradients.
    - `layer`: number of the layer, from 0.
    - `block`: any block for a single layer; for a stacked one, a block of the same
        structure, shapes and dtypes as the others in the stack. Where a tree has labels
        instead of arrays, the layers of a stack share one, which `block` must have too.

    **Raises:** ValueError if there is no such layer, or the block cannot be stacked
    with the others.
    """

    def is_layers(node: Any) -> bool:
        return isinstance(node, Layers)

    stacks = [x for x in jax.tree.leaves(model, is_leaf=is_layers) if is_layers(x)]
    if len(stacks) != 1 or not is_int(layer) or not 0 <= layer < len(stacks[0]):
        num_layers = sum(map(len, stacks))
        allowed = f"the number of one of the model's {num_layers} layers"
        raise invalid_argument(_CALL, "layer", layer, allowed)
    section, index, repeat = stacks[0].place(layer)
    if repeat is not None:
        block = _put(getattr(stacks[0], section)[index], block, layer, repeat)

    def replaced(node: Any) -> Any:
        if not is_layers(node):
            return node
        return eqx.tree_at(lambda node: getattr(node, section)[index], node, block)

    return jax.tree.map(replaced, model, is_leaf=is_layers)


def _put(stack: Block, block: Block, layer: int, repeat: int) -> Block:
    """The stack with the block as one of its repetitions."""
    old, structure = jax.tree_util.tree_flatten_with_path(stack)
    new, new_structure = jax.tree.flatten(block)
    if new_structure != structure:
        raise _cannot_be_stacked(layer, "its structure is another")
    for (path, x), y in zip(old, new):
        name = jax.tree_util.keystr(path)
        wanted, given = _shape_in_words(x, 1), _shape_in_words(y, 0)
        if wanted is None and not _are_same(x, y):
            raise ValueError(
                f"{_CALL}: layer {layer} lies in a stack with others, which share "
                f"{shown(x)} at {name}; the block has {shown(y)} there. Give it the "
                "same, or choose single layers of a stack with layer_mask."
            )
        if wanted is not None and given != wanted:
            found = given or shown(y)
            raise _cannot_be_stacked(layer, f"{name} is {found}, not {wanted}")
    parts = [_put_part(x, y, repeat) for (_, x), y in zip(old, new)]
    return jax.tree.unflatten(structure, parts)


def _cannot_be_stacked(layer: int, why: str) -> ValueError:
    return ValueError(
        f"{_CALL}: layer {layer} lies in a stack with others, which one program runs: "
        "the block must have the same structure, shapes and dtypes as "
        f"model.layers[{layer}]; {why}."
    )


def _shape_in_words(x: Any, start: int) -> str | None:
    """Dtype and shape from dimension `start` on; None for what is no such array."""
    if isinstance(x, jax.Array | np.ndarray | np.generic) and x.ndim >= start:
        return f"an array of {x.dtype}{list(x.shape[start:])}"
    if isinstance(x, jax.ShapeDtypeStruct) and x.ndim >= start:
        return f"an abstract array of {x.dtype}{list(x.shape[start:])}"
    return None


def _are_same(x: Any, y: Any) -> bool:
    """Whether two leaves that all layers of a stack share are the same."""
    return x is y or (isinstance(x, _LABELS) and type(x) is type(y) and x == y)


def _put_part(stack: Any, part: Any, repeat: int) -> Any:
    if _shape_in_words(stack, 1) is None or isinstance(stack, jax.ShapeDtypeStruct):
        return stack
    if isinstance(stack, np.ndarray) and not isinstance(part, jax.Array):
        out = stack.copy()
        out[repeat] = part
        return out
    return jnp.asarray(stack).at[repeat].set(part)
