"""Which parameters a training run moves, for `eqx.partition` and for optax.

A mask is a tree of booleans in the model's shape. Layers that are scanned lie in one
array each, so that a mask of some of them has arrays of booleans there: partition by
`trainable(model, layers=...)`, and give the updates to `apply_mask`.
"""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.model.layers import Layers
from dsv4_eqx.model.mtp import MTP
from dsv4_eqx.moe.router import TopKRouter
from dsv4_eqx.numerics.lora_weight import LoRAWeight, is_lora
from dsv4_eqx.numerics.validation import (
    as_python,
    invalid_argument,
    is_int,
    validate_flag,
)
from dsv4_eqx.sharding.annotations import annotated_leaves


def trainable(
    model: Any,
    *,
    mtp: bool = False,
    indexers: bool = False,
    layers: Iterable[Any] | None = None,
) -> Any:
    """Marks what a loss over tokens reaches.

    That is every floating-point array except those of indexers and of prediction (MTP)
    blocks, and routers' biases. The gradient of these is zero, but it takes memory, and
    an optimizer with weight decay would shrink them all the same. A weight with an
    adapter is frozen; for the adapters alone, there is `lora_mask`.

    `trained, rest = eqx.partition(model, trainable(model))`

    **Arguments:**

    - `model`: a model, or a part of one; its arrays may be abstract.
    - `mtp`: whether the prediction blocks' own loss is part of it.
    - `indexers`: whether `indexer_loss` is part of it.
    - `layers`: if given, only these layers, counted from 0, and with `mtp` the
        prediction blocks. Where layers are stacked, an array is marked if it holds one
        of them; `apply_mask` then keeps the others still.

    **Raises:** ValueError if there is no such layer, the model has no `Layers` to
    choose from, or `mtp` or `indexers` is not a boolean.
    """
    validate_flag("trainable", "mtp", mtp)
    validate_flag("trainable", "indexers", indexers)
    left_out = (*(() if indexers else (Indexer,)), *(() if mtp else (MTP,)))

    def is_part(node: Any) -> bool:
        return isinstance(node, (*left_out, TopKRouter, LoRAWeight))

    def mark(node: Any) -> Any:
        if isinstance(node, left_out):
            return jax.tree.map(lambda _: False, node)
        marks = jax.tree.map(_is_inexact, node)
        if is_lora(node):
            base = jax.tree.map(lambda _: False, node.base)
            marks = eqx.tree_at(lambda weight: weight.base, marks, base)
        if isinstance(node, TopKRouter) and node.bias is not None:
            marks = eqx.tree_at(lambda router: router.bias, marks, False)
        return marks

    marks = jax.tree.map(mark, model, is_leaf=is_part)
    if layers is None:
        return marks
    wanted = _mark_layers("trainable", model, layers, others=(MTP,) if mtp else ())
    return jax.tree.map(lambda x, y: x and bool(np.any(y)), marks, wanted)


def indexer_mask(model: Any) -> Any:
    """Marks the indexers' arrays, for the stage that trains nothing else.

    `trained, rest = eqx.partition(model, indexer_mask(model))`

    **Arguments:**

    - `model`: a model, or a part of one; its arrays may be abstract.
    """

    def mark(node: Any) -> Any:
        is_indexer = isinstance(node, Indexer)
        return jax.tree.map(lambda x: is_indexer and _is_inexact(x), node)

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, Indexer))


def decay_mask(model: Any) -> Any:
    """Marks what weight decay is for: the matrices, as the annotations tell them.

    Those are floating-point arrays whose annotation names two or more dimensions, but
    for compressors' position biases. Norms, sinks, other biases and gating factors have
    one, however many their stacked arrays have.

    `optax.adamw(1e-3, mask=decay_mask)`

    **Arguments:**

    - `model`: a model, what is left of one by `eqx.partition`, or a part of one.

    **Raises:** ValueError if an annotation is a string, or has several shapes.
    """

    def is_matrix(dims: tuple[str, ...]) -> bool:
        return len(dims) >= 2 and "ratio" not in dims

    marks = [
        _is_inexact(leaf.array) and is_matrix(leaf.dims or ())
        for leaf in annotated_leaves(model)
    ]
    return jax.tree.unflatten(jax.tree.structure(model), marks)


def layer_mask(model: Any, layers: Iterable[Any]) -> Any:
    """Marks the arrays of some layers.

    Where a stacked array holds these layers and others, its mask is an array of
    booleans, which broadcasts against it.

    **Arguments:**

    - `model`: a model.
    - `layers`: numbers of layers, from 0.

    **Raises:** ValueError if there is no such layer, or the model has no `Layers`.
    """
    return _mark_layers("layer_mask", model, layers)


def _mark_layers(
    call: str, model: Any, layers: Any, others: tuple[type, ...] = ()
) -> Any:
    """The mask of some layers; modules of the `others` are marked whole."""
    if not isinstance(layers, Iterable):
        raise invalid_argument(call, "layers", layers, "numbers of layers, as [2]")
    wanted = {as_python(layer) for layer in layers}
    unknown = [layer for layer in wanted if not is_int(layer)]
    if unknown:
        raise invalid_argument(call, "layers", unknown, "numbers of layers, as [2]")

    def is_part(node: Any) -> bool:
        return isinstance(node, (Layers, *others))

    if not any(isinstance(x, Layers) for x in jax.tree.leaves(model, is_leaf=is_part)):
        raise invalid_argument(call, "model", type(model).__name__, "one with Layers")

    def mark(node: Any) -> Any:
        if isinstance(node, Layers):
            return _mark_some(call, node, wanted)
        return jax.tree.map(lambda _: isinstance(node, others), node)

    return jax.tree.map(mark, model, is_leaf=is_part)


def _mark_some(call: str, layers: Layers, wanted: set[int]) -> Layers:
    unknown = wanted - set(range(len(layers)))
    if unknown:
        allowed = f"numbers of layers, in [0, {len(layers)})"
        raise invalid_argument(call, "layers", sorted(unknown), allowed)
    places = [layers.place(layer) for layer in wanted]
    marks = layers
    for section in ("first", "repeated", "last"):
        for i, block in enumerate(getattr(layers, section)):
            repeats = [repeat for *at, repeat in places if at == [section, i]]
            marks = eqx.tree_at(
                lambda layers, section=section, i=i: getattr(layers, section)[i],
                marks,
                _mark_repeats(block, repeats, layers.num_repeats),
            )
    return marks


def _mark_repeats(block: Any, repeats: list[int | None], num_repeats: int) -> Any:
    """A boolean where all repetitions, or the only one, are marked alike."""
    if not repeats or None in repeats or len(repeats) == num_repeats:
        return jax.tree.map(lambda _: bool(repeats), block)
    marked = np.isin(np.arange(num_repeats), np.array(repeats, int))
    return jax.tree.map(lambda x: marked.reshape(-1, *[1] * (x.ndim - 1)), block)


def apply_mask(mask: Any, updates: Any) -> Any:
    """The updates, or gradients, with zeros where the mask is false.

    **Arguments:**

    - `mask`: from `layer_mask`, `trainable` or `decay_mask`.
    - `updates`: in the model's shape, None for what is not trained.
    """

    def one(marked: Any, update: Any) -> Any:
        if update is None or marked is True:
            return update
        zero = jnp.zeros((), update.dtype)
        return jnp.where(jnp.asarray(marked), update, zero)

    return jax.tree.map(one, mask, updates)


def _is_inexact(x: Any) -> bool:
    is_array = isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return is_array and bool(jnp.issubdtype(x.dtype, jnp.inexact))
