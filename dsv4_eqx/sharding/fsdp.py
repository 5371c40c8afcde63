"""Fully sharded data parallelism: `data` splits weights too; use gathers them.

A layer's weights are whole only while it runs. They are gathered before it runs, and
again for its backward pass, which leaves each device with the summed gradients of its
part.

The backward pass keeps all residuals but whole weights. For `y = gather(w) * x` these
are `x` and this device's part of `w`; `w` is gathered again for the gradient of `x`.
With `remat=True` this rule must not be applied: a checkpoint around the whole block
keeps only the block's input and recomputes the block, gathering included. There the
rule would also reach the checkpoints inside of a block, such as those around
attention's blocks of queries, and keep what they are meant to drop.
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

from dsv4_eqx.attention.values import observed
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
    # The dimension of each array that is split, counted from the end, or None.
    dims: tuple[int | None, ...] = eqx.field(static=True)
    # Whether a checkpoint around the module recomputes it in the backward pass.
    recomputed: bool = eqx.field(static=True, default=False)

    def __call__(self, *args: Any) -> Any:
        """The module's output."""
        return self._run(lambda module, *args: module(*args), *args)

    def extend(self, *args: Any) -> Any:
        """What the module's `extend` returns."""
        return self._run(lambda module, *args: module.extend(*args), *args)

    def observe(self, *args: Any) -> Any:
        """The module's output, and what its `observe` shows."""
        return self._run(observed, *args)

    def _run(self, function: Any, *args: Any) -> Any:
        def run(module: Any, *args: Any) -> Any:
            return function(gathered(module, self.axis, self.dims), *args)

        if self.recomputed:
            return run(self.module, *args)
        policy = jax.checkpoint_policies.save_anything_except_these_names(_WHOLE)
        return eqx.filter_checkpoint(run, policy=policy)(self.module, *args)


def gathered(module: Any, axis: str, dims: tuple[int | None, ...]) -> Any:
    """The module with whole weights; `dims` as in `Gathered`."""

    def whole(x: Array, dim: int | None) -> Array:
        if dim is None:
            return x
        x = gather(x, axis, x.ndim + dim)
        return checkpoint_name(x, _WHOLE)

    leaves, structure = jax.tree.flatten(module)
    leaves = [whole(x, dim) for x, dim in zip(leaves, dims, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def split_further(module: Any, specs: Any, mesh: Mesh | AbstractMesh, axis: str) -> Any:
    """Specs that split every array over one more axis, where its sizes allow it.

    A dimension that the axis divides is split: preferably one that is not split yet,
    then the largest. Leading dimensions without a name, as of stacked layers, are not
    split, nor are arrays of integers, which are not trained.
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
    named_dims = range(len(shape) - len(leaf.dims or ()), len(shape))
    # First a dimension that is not split, then the largest, then the first one.
    candidates = [
        (not entries[dim], shape[dim], -dim)
        for dim in named_dims
        if shape[dim] % (parts[dim] * size) == 0
    ]
    if not candidates:
        return spec
    dim = -max(candidates)[2]
    entries[dim] += (axis,)
    return P(*(entry_of(axes) for axes in entries))


def gather_in_use(
    model: Any, specs: Any, axis: str, *, recomputed: bool = False
) -> Any:
    """The model, inside `shard_map`, with blocks that gather weights while they run.

    Weights outside of blocks are gathered at once.
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
    """The dimension that the axis splits, counted from the end."""
    for dim, entry in enumerate(spec):
        if axis in axes_of(entry):
            return dim - leaf.ndim
    return None
