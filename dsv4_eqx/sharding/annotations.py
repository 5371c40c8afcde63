"""The names of an array's dimensions, from the annotation of its field.

`weight: Float[Array, "groups out_per_group in_per_group"]` names the weight's
dimensions. Arrays in a tuple, list or dict have the annotation of the field that holds
the container. A field annotated `...` belongs to a module that stands for an array
(`QuantizedWeight`); its dimensions are those of the field that holds this module, or
what a `LoRAWeight` makes of them.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dsv4_eqx.numerics.lora_weight import is_lora


class AnnotatedLeaf(typing.NamedTuple):
    """An array of a module, and the dimensions in its field's annotation."""

    name: str  # path in the module
    array: Any
    dims: tuple[str, ...] | None  # as annotated, without leading stacked dimensions


def annotated_leaves(module: Any) -> list[AnnotatedLeaf]:
    """Every array of a module, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    annotated = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path) or "the array"
        annotation, of_lora = _annotation(module, path)
        dims = _dims(name, annotation)
        if of_lora is not None and dims is not None:
            weight, field = of_lora
            dims = weight.dims_of(field, dims)
        annotated.append(AnnotatedLeaf(name, leaf, dims))
    return annotated


def float32_leaves(
    call: str, module: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[bool]:
    """Whether each leaf's annotation says float32, in the order of `jax.tree.leaves`.

    `is_leaf` is for modules that stand for an array, which has no part of its own.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_leaf)
    found = []
    for path, _ in leaves:
        name = jax.tree_util.keystr(path) or "the array"
        annotation, _ = _annotation(module, path)
        _refuse_text(call, name, annotation)
        found.append(_dtypes(annotation) == {"float32"})
    return found


def _annotation(module: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """The annotation of the last module field on the way to a leaf; and the
    `LoRAWeight` on this way, if there is one, with the field of it."""
    node, annotation, of_lora = module, None, None
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            inner = _field_types(node).get(key.name)
            stands_for_outer = _shapes(inner) == {"..."}
            annotation = annotation if stands_for_outer else inner
            of_lora = (node, key.name) if is_lora(node) else of_lora
            node = getattr(node, key.name)
        else:
            node = node[getattr(key, "idx", getattr(key, "key", None))]
    return annotation, of_lora


def _field_types(node: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(node):
        return {field.name: field.type for field in dataclasses.fields(node)}
    return getattr(type(node), "__annotations__", {})  # a named tuple


def _dims(name: str, annotation: Any) -> tuple[str, ...] | None:
    _refuse_text("partition_specs", name, annotation)
    shapes = _shapes(annotation)
    if len(shapes) > 1:
        raise ValueError(
            f"partition_specs: {name} is in a field whose annotation has several "
            f"shapes, {sorted(shapes)}; give each array a field of its own."
        )
    return tuple(shapes.pop().split()) if shapes else None


def _refuse_text(call: str, name: str, annotation: Any) -> None:
    if isinstance(annotation, str):
        raise ValueError(
            f"{call}: the annotation of {name} is the string {annotation!r}; take away "
            "its quotes, or `from __future__ import annotations` in the module that "
            "defines it."
        )


def _shapes(annotation: Any) -> set[str]:
    """Dimension strings in an annotation, also inside `X | None` or `tuple[X, ...]`."""
    shape = getattr(annotation, "dim_str", None)
    inner = [_shapes(part) for part in typing.get_args(annotation)]
    return set().union(*inner) if shape is None else {shape}


def _dtypes(annotation: Any) -> set[str]:
    """Names of the dtypes in an annotation, also inside `X | None`."""
    dtypes = getattr(annotation, "dtypes", ())
    inner = [_dtypes(part) for part in typing.get_args(annotation)]
    return set().union(*inner, dtypes if isinstance(dtypes, tuple | list) else ())
