"""From shape annotations to shardings.

`weight: Float[Array, "groups out_per_group in_per_group"]` names the weight's
dimensions. A table of rules gives some of those names a mesh axis; that is all there is
to say about how a module is sharded. What is annotated `...` is part of a module that
stands for an array, and has the dimensions of the field that holds that module.
"""

import collections
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Final

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsv4_eqx.dimensions import DIMENSIONS
from dsv4_eqx.numerics.validation import invalid_argument, shown

Rules = Mapping[str, str | tuple[str, ...] | None]

# Whole heads, groups, hidden channels and vocabulary rows go to the devices of
# `tensor`; whole experts to those of `expert`. Everything else is on every device.
DEFAULT_RULES: Final[Rules] = types.MappingProxyType(
    {
        "heads": "tensor",
        "groups": "tensor",
        "expert_hidden": "tensor",
        "shared_hidden": "tensor",
        "vocab": "tensor",
        "experts": "expert",
    }
)


def partition_specs(
    module: Any,
    rules: Rules = DEFAULT_RULES,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> Any:
    """The PartitionSpec of every array in a module, read off the fields' annotations.

    Leading dimensions that an annotation does not name, as of stacked layers, are not
    split. Abstract modules (`jax.ShapeDtypeStruct` leaves) work like real ones.

    **Arguments:**

    - `module`: any Equinox module; containers of modules too.
    - `rules`: mesh axis, or axes, of dimension names. Names without a rule, or with
        None, are not split. Your own modules may use your own names here.
    - `mesh`: if given, the axes must exist and divide the dimensions, and those of
        size 1 are left out: inside `shard_map`, nothing varies over them.

    **Returns:** the module's tree with a PartitionSpec in place of each array.

    **Raises:** ValueError naming leaf, dimension, axis and sizes where an annotation is
    missing, is a string, has several shapes, or uses a name that neither the glossary
    nor the rules know, a leaf is no array, a rule is for a name that neither the
    glossary nor the module knows, an axis is used twice in one leaf, or an axis is
    missing from the mesh or does not divide.
    """
    leaves = annotated_leaves(module)
    _validate_rules(leaves, rules)
    specs = [_leaf_spec(leaf, rules) for leaf in leaves]
    if mesh is not None:
        for leaf, spec in zip(leaves, specs):
            _check_divides(leaf, spec, mesh)
        specs = [_without_unit_axes(spec, mesh) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(module), specs)


class AnnotatedLeaf(typing.NamedTuple):
    """An array of a module and what its field's annotation says."""

    name: str  # path in the module
    array: Any
    dims: tuple[str, ...] | None  # as annotated, without leading stacked dimensions


def annotated_leaves(module: Any) -> list[AnnotatedLeaf]:
    """Every array of a module, in the order of `jax.tree.leaves`.

    **Arguments:**

    - `module`: any Equinox module; containers of modules too.

    **Raises:** ValueError if a field holds several arrays of different annotations, or
    its annotation is a string.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    annotated = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path) or "the array"
        dims = _dims(name, _annotation(module, path))
        annotated.append(AnnotatedLeaf(name, leaf, dims))
    return annotated


def _annotation(module: Any, path: tuple[Any, ...]) -> Any:
    """The annotation of the last module field on the way to a leaf."""
    node, annotation = module, None
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            own = _field_types(node).get(key.name)
            stands_for_outer = getattr(own, "dim_str", None) == "..."
            annotation = annotation if stands_for_outer else own
            node = getattr(node, key.name)
        else:
            node = node[getattr(key, "idx", getattr(key, "key", None))]
    return annotation


def _field_types(node: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(node):
        return {field.name: field.type for field in dataclasses.fields(node)}
    return getattr(type(node), "__annotations__", {})  # a named tuple


def _dims(name: str, annotation: Any) -> tuple[str, ...] | None:
    if isinstance(annotation, str):
        raise ValueError(
            f"partition_specs: the annotation of {name} is the string {annotation!r}; "
            "take away its quotes, or `from __future__ import annotations` in the "
            "module that defines it."
        )
    shapes = _shapes(annotation)
    if len(shapes) > 1:
        raise ValueError(
            f"partition_specs: {name} is in a field whose annotation has several "
            f"shapes, {sorted(shapes)}; give each array a field of its own."
        )
    return tuple(shapes.pop().split()) if shapes else None


def _shapes(annotation: Any) -> set[str]:
    """Dimension strings in an annotation, also inside `X | None` or `tuple[X, ...]`."""
    own = getattr(annotation, "dim_str", None)
    inner = [_shapes(part) for part in typing.get_args(annotation)]
    return set().union(*inner) if own is None else {own}


def _validate_rules(leaves: list[AnnotatedLeaf], rules: Rules) -> None:
    own = {dim for leaf in leaves for dim in leaf.dims or ()}
    for name in rules:
        if name not in DIMENSIONS and name not in own:
            raise ValueError(
                f"partition_specs: there is a rule for {name!r}, which is neither in "
                "dsv4_eqx.DIMENSIONS nor a dimension of the module; correct the name, "
                "or leave the rule out."
            )


def _leaf_spec(leaf: AnnotatedLeaf, rules: Rules) -> P:
    if not hasattr(leaf.array, "ndim"):
        raise ValueError(
            f"partition_specs: {leaf.name} is {shown(leaf.array)}, not an array; mark "
            "its field static (`eqx.field(static=True)`), or make it an array and "
            "annotate its shape."
        )
    if leaf.dims is None:
        raise ValueError(
            f"partition_specs: {leaf.name} has no shape annotation; annotate the field "
            'like `weight: Float[Array, "groups out_per_group in_per_group"]`.'
        )
    unnamed = leaf.array.ndim - len(leaf.dims)
    if unnamed < 0:
        raise ValueError(
            f"partition_specs: {leaf.name} has the shape {leaf.array.shape}, fewer "
            f"dimensions than its annotation {' '.join(leaf.dims)!r}."
        )
    for name in leaf.dims:
        if name not in rules and name not in DIMENSIONS and not name.isdigit():
            raise ValueError(
                f"partition_specs: {leaf.name} has the dimension {name!r}, which is "
                "neither in dsv4_eqx.DIMENSIONS nor in the rules; add it to the rules."
            )
    axes = [rules.get(name) for name in leaf.dims]
    used = collections.Counter(axis for entry in axes for axis in axes_of(entry))
    twice = [axis for axis, count in used.items() if count > 1]
    if twice:
        raise ValueError(
            f"partition_specs: {leaf.name} with the dimensions {leaf.dims} would be "
            f"split twice over the mesh axis {twice[0]!r}."
        )
    return P(*([None] * unnamed + axes))


def _check_divides(leaf: AnnotatedLeaf, spec: P, mesh: Mesh | AbstractMesh) -> None:
    name, shape = leaf.name, leaf.array.shape
    unnamed = len(shape) - len(leaf.dims or ())
    for dim_name, size, entry in zip(
        leaf.dims or (), shape[unnamed:], list(spec)[unnamed:], strict=True
    ):
        for axis in axes_of(entry):
            if axis not in mesh.shape:
                raise ValueError(
                    f"partition_specs: the dimension {dim_name!r} of {name} is split "
                    f"over {axis!r}, and the mesh has only {tuple(mesh.shape)}."
                )
        parts = math.prod(mesh.shape[axis] for axis in axes_of(entry))
        if size % parts != 0:
            raise ValueError(
                f"partition_specs: {name} has the shape {shape}; the mesh axis "
                f"{entry!r} of size {parts} does not divide its dimension "
                f"{dim_name!r} of size {size}."
            )


def _without_unit_axes(spec: P, mesh: Mesh | AbstractMesh) -> P:
    def kept(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(axis for axis in axes_of(entry) if mesh.shape[axis] > 1)

    return P(*(entry_of(kept(entry)) for entry in spec))


def entry_of(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """A PartitionSpec's entry for a dimension that these mesh axes split."""
    return axes if len(axes) > 1 else axes[0] if axes else None


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def validate_rules(rules: Rules) -> None:
    """Refuses rules that the whole model has no collectives for.

    **Arguments:**

    - `rules`: what was given.

    **Raises:** ValueError if they are others than `DEFAULT_RULES`, but for the
    vocabulary's, which may be None.
    """
    if not isinstance(rules, Mapping):
        raise invalid_argument(
            "shard", "rules", rules, "DEFAULT_RULES, or a mapping like it"
        )
    wanted = dict(DEFAULT_RULES)
    given = {name: axis for name, axis in rules.items() if axis is not None}
    if {"vocab": wanted["vocab"], **given} != wanted:
        raise ValueError(
            f"shard: the rules split {given}; the collectives that go with them are "
            f"those of {wanted}, of which only 'vocab' may be None."
        )
