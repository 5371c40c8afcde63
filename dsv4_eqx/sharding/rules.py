"""From dimension names to shardings, in one table.

A rule gives a dimension name a mesh axis; every array with that dimension is split over
this axis. `weight: Float[Array, "groups out_per_group
in_per_group"]` and the rule `{"groups": "tensor"}` make `P("tensor", None, None)`.
"""

import collections
import math
import types
from collections.abc import Mapping
from typing import Any, Final

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv4_eqx.dimensions import DIMENSIONS
from dsv4_eqx.numerics.validation import invalid_argument, shown
from dsv4_eqx.sharding.annotations import AnnotatedLeaf, annotated_leaves

Rules = Mapping[str, str | tuple[str, ...] | None]

# `tensor` splits heads, groups, hidden channels and the vocabulary, `expert` splits the
# experts. All other dimensions are whole on every device.
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
    """The PartitionSpec of every array in a module, from its fields' annotations.

    Leading dimensions that an annotation does not name, as of stacked layers, are not
    split. Abstract modules (`jax.ShapeDtypeStruct` leaves) work like real ones.

    **Arguments:**

    - `module`: any Equinox module; containers of modules too.
    - `rules`: for each dimension name the mesh axis, or axes, that split it. Names
        without a rule, or with None, are not split. Names of your own are allowed.
    - `mesh`: if given, its axes must exist and divide the dimensions, and axes of size
        1 are left out of the specs, as `shard_map` needs it.

    **Returns:** the module's tree with a PartitionSpec in place of each array.

    **Raises:** ValueError naming array, dimension, axis and sizes if an array has no
    annotation, or one that is a string or has several shapes; if a dimension is neither
    in `DIMENSIONS` nor in the rules; if a rule is for a name that is neither in
    `DIMENSIONS` nor in the module; if a field that is not static holds something other
    than arrays; if an axis would split an array twice; or if the mesh lacks an axis or
    an axis does not divide a dimension.
    """
    leaves = annotated_leaves(module)
    _validate_rules(leaves, rules)
    specs = [_leaf_spec(leaf, rules) for leaf in leaves]
    if mesh is not None:
        for leaf, spec in zip(leaves, specs):
            _validate_divides(leaf, spec, mesh)
        specs = [_without_unit_axes(spec, mesh) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(module), specs)


def rules_with(
    call: str,
    dimensions: Mapping[str, str | None] | None,
    *,
    split_vocab: bool = True,
) -> Rules:
    """`DEFAULT_RULES` and the rules for the user's own dimensions."""
    dimensions = {} if dimensions is None else dimensions
    allowed = 'a mapping like {"lora_rank": None, "my_heads": "tensor"}'
    if not isinstance(dimensions, Mapping):
        raise invalid_argument(call, "dimensions", dimensions, allowed)
    for name, axis in dimensions.items():
        if not isinstance(name, str) or axis not in (None, "tensor"):
            raise ValueError(
                f"{call}: the dimension {name!r} is to be split over {axis!r}; it can "
                "be split over 'tensor', or over nothing (None). The other axes split "
                "the batch and the sequence, so that their devices have other tokens."
            )
        if name in DIMENSIONS:
            raise ValueError(
                f"{call}: {name!r} is one of dsv4_eqx.DIMENSIONS, and how it is split "
                "is settled; give a dimension of your own another name."
            )
    vocab = DEFAULT_RULES["vocab"] if split_vocab else None
    return {**DEFAULT_RULES, "vocab": vocab, **dimensions}


def place(module: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The module with every array split over the mesh as its spec says.

    Abstract arrays become abstract arrays with the sharding.
    """

    def put(leaf: Any, spec: P) -> Any:
        # As a compiled program says it of its results, so that none is compiled again
        # when it is called with them.
        while spec and spec[-1] is None:
            spec = P(*spec[:-1])
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, module, specs)


def entry_of(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """A PartitionSpec's entry for a dimension that these mesh axes split."""
    return axes if len(axes) > 1 else axes[0] if axes else None


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def _validate_rules(leaves: list[AnnotatedLeaf], rules: Rules) -> None:
    module_dims = {dim for leaf in leaves for dim in leaf.dims or ()}
    for name in rules:
        if name not in DIMENSIONS and name not in module_dims:
            raise ValueError(
                f"partition_specs: there is a rule for {name!r}, which is neither in "
                "dsv4_eqx.DIMENSIONS nor a dimension of the module; correct the name, "
                "or leave the rule out."
            )


def _leaf_spec(leaf: AnnotatedLeaf, rules: Rules) -> P:
    """The spec by the rules, for any mesh."""
    dims = _validate_leaf(leaf, rules)
    axes = [rules.get(name) for name in dims]
    used = collections.Counter(axis for entry in axes for axis in axes_of(entry))
    twice = [axis for axis, count in used.items() if count > 1]
    if twice:
        raise ValueError(
            f"partition_specs: {leaf.name} with the dimensions {dims} would be "
            f"split twice over the mesh axis {twice[0]!r}."
        )
    num_stacked = leaf.array.ndim - len(dims)
    return P(*([None] * num_stacked + axes))


def _validate_leaf(leaf: AnnotatedLeaf, rules: Rules) -> tuple[str, ...]:
    """The leaf's dimensions; an error if one of them is unknown."""
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
    if leaf.array.ndim < len(leaf.dims):
        raise ValueError(
            f"partition_specs: {leaf.name} has the shape {leaf.array.shape}, fewer "
            f"dimensions than its annotation {' '.join(leaf.dims)!r}."
        )
    for name in leaf.dims:
        if name not in rules and name not in DIMENSIONS and not name.isdigit():
            raise ValueError(
                f"partition_specs: {leaf.name} has the dimension {name!r}, which is "
                "neither in dsv4_eqx.DIMENSIONS nor in the rules. If it is one of your "
                f"own, say how it is split: partition_specs(..., {{{name!r}: None}}) "
                f"or shard(..., dimensions={{{name!r}: None}})."
            )
    return leaf.dims


def _validate_divides(leaf: AnnotatedLeaf, spec: P, mesh: Mesh | AbstractMesh) -> None:
    name, shape, dims = leaf.name, leaf.array.shape, leaf.dims or ()
    num_stacked = len(shape) - len(dims)
    sizes, entries = shape[num_stacked:], list(spec)[num_stacked:]
    for dim, size, entry in zip(dims, sizes, entries, strict=True):
        for axis in axes_of(entry):
            if axis not in mesh.shape:
                raise ValueError(
                    f"partition_specs: the dimension {dim!r} of {name} is split "
                    f"over {axis!r}, and the mesh has only {tuple(mesh.shape)}."
                )
        parts = math.prod(mesh.shape[axis] for axis in axes_of(entry))
        if size % parts != 0:
            raise ValueError(
                f"partition_specs: {name} has the shape {shape}; the mesh axis "
                f"{entry!r} of size {parts} does not divide its dimension "
                f"{dim!r} of size {size}."
            )


def _without_unit_axes(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """The spec without axes of one device."""

    def kept(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(axis for axis in axes_of(entry) if mesh.shape[axis] > 1)

    return P(*(entry_of(kept(entry)) for entry in spec))
