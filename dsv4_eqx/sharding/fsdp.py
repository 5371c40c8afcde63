"""Fully sharded data parallelism: weights split over `data` as well, gathered in use.

A layer's weights are whole only while it runs: gathered before, and gathered again in
its backward pass, which leaves each device the sum of its own part of the gradients.

The rule for the backward pass: what is kept for it is everything but whole weights. For
`y = gather(w) * x` these are `x` and this device's part of `w`, and `w` is gathered
again for the gradient of `x`. The exception: with `remat=True` a checkpoint around the
whole block keeps its input alone, and recomputes the block, gathering included. The
rule must not be applied inside of that one. It would reach the checkpoints inside of a
block, as around attention's blocks of queries, and keep what they are there to drop.
"""

import math
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dsv4_eqx.model.block import Block
from dsv4_eqx.model.mtp import MTP
from dsv4_eqx.sharding.annotations import AnnotatedLeaf, annotated_leaves
from dsv4_eqx.sharding.gather import gather
from dsv4_eqx.sharding.rules import axes_of, entry_of

_WHOLE: Final = "whole weights"


class Gathered(eqx.Module):
    """A module whose weights are split over a mesh axis, called like the module."""

    module: Any
    axis: str = eqx.field(static=True)
    # Of each array the dimension that is split, from the last one back, or None.
    dims: tuple[int | None, ...] = eqx.field(static=True)
    # Whether what calls it is recomputed in the backward pass as a whole.
    recomputed: bool = eqx.field(static=True, default=False)

    def __call__(self, *args: Any) -> Any:
        """**Arguments:** the module's own."""
        return self._run(lambda module, *args: module(*args), *args)

    def extend(self, *args: Any) -> Any:
        """**Arguments:** those of the module's `extend`."""
        return self._run(lambda module, *args: module.extend(*args), *args)

    def _run(self, function: Any, *args: Any) -> Any:
        def run(module: Any, *args: Any) -> Any:
            return function(gathered(module, self.axis, self.dims), *args)

        if self.recomputed:
            return run(self.module, *args)
        policy = jax.checkpoint_policies.save_anything_except_these_names(_WHOLE)
        return eqx.filter_checkpoint(run, policy=policy)(self.module, *args)


def gathered(module: Any, axis: str, dims: tuple[int | None, ...]) -> Any:
    """The module with whole weights.

    **Arguments:**

    - `module`: with weights split over the axis.
    - `axis`: of the mesh.
    - `dims`: of each array the dimension that is split, from the last one back.
    """

    def whole(x: Array, dim: int | None) -> Array:
        if dim is None:
            return x
        x = gather(x, axis, x.ndim + dim)
        return checkpoint_name(x, _WHOLE)

    leaves, structure = jax.tree.flatten(module)
    leaves = [whole(x, dim) for x, dim in zip(leaves, dims, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def split_further(module: Any, specs: Any, mesh: Mesh | AbstractMesh, axis: str) -> Any:
    """Specs that split every array over one more axis, as far as its sizes allow.

    The largest dimension that the axis divides is split; leading dimensions without a
    name, as of stacked layers, never, nor integers, which are not trained.

    **Arguments:**

    - `module`: what the specs are of.
    - `specs`: from `partition_specs`.
    - `mesh`: the mesh.
    - `axis`: one that the specs do not use.
    """
    structure = jax.tree.structure(module)
    pairs = zip(annotated_leaves(module), structure.flatten_up_to(specs), strict=True)
    return jax.tree.unflatten(
        structure,
        [_split_leaf(leaf, spec, mesh, axis) for leaf, spec in pairs],
    )


def _split_leaf(
    leaf: AnnotatedLeaf, spec: P, mesh: Mesh | AbstractMesh, axis: str
) -> P:
    shape, size = leaf.array.shape, mesh.shape[axis]
    if not jnp.issubdtype(leaf.array.dtype, jnp.inexact):
        return spec
    entries = [axes_of(entry) for entry in spec]
    entries += [()] * (len(shape) - len(entries))
    parts = [math.prod(mesh.shape[name] for name in entry) for entry in entries]
    named = range(len(shape) - len(leaf.dims or ()), len(shape))
    # Rather a dimension that nothing splits, then the largest, then the first.
    able = [
        (not entries[dim], shape[dim], -dim)
        for dim in named
        if shape[dim] % (parts[dim] * size) == 0
    ]
    if not able:
        return spec
    dim = -max(able)[2]
    entries[dim] += (axis,)
    return P(*(entry_of(axes) for axes in entries))


def gather_in_use(
    model: Any, specs: Any, axis: str, *, recomputed: bool = False
) -> Any:
    """The model with wrappers that gather each block's weights while it runs.

    What is outside of blocks is gathered at once.

    **Arguments:**

    - `model`: on one device, inside `shard_map`.
    - `specs`: from `split_further`, in the model's tree.
    - `axis`: that splits the weights further.
    - `recomputed`: whether the backward pass recomputes whole blocks.
    """

    def is_block(node: Any) -> bool:
        return isinstance(node, Block | MTP)

    def wrap(node: Any, specs: Any) -> Any:
        leaves, structure = jax.tree.flatten(node)
        pairs = zip(leaves, structure.flatten_up_to(specs), strict=True)
        dims = tuple(_split_dim(leaf, spec, axis) for leaf, spec in pairs)
        if is_block(node):
            return Gathered(node, axis, dims, recomputed)
        return gathered(node, axis, dims)

    return jax.tree.map(wrap, model, specs, is_leaf=is_block)


def _split_dim(leaf: Array, spec: P, axis: str) -> int | None:
    """The dimension that the axis splits, from the last one back."""
    for dim, entry in enumerate(spec):
        if axis in axes_of(entry):
            return dim - leaf.ndim
    return None
