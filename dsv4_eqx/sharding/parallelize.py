"""Putting the wrappers in place: the same mathematics, for a mesh."""

from typing import Any, Final

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.moe.experts import Experts, SharedExpert
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.numerics.validation import invalid_argument
from dsv4_eqx.sharding.context import (
    SplitSequence,
    SplitSequenceAndHeads,
    SplitTokens,
    split_sequence,
)
from dsv4_eqx.sharding.expert import ExpertParallel
from dsv4_eqx.sharding.mesh import AXES
from dsv4_eqx.sharding.tensor import SummedOver

_WRAPPERS: Final = (
    ExpertParallel | SummedOver | SplitSequence | SplitSequenceAndHeads | SplitTokens
)


def parallelize(
    module: Any, mesh: Mesh | AbstractMesh, sequence: tuple[str, ...] = ()
) -> Any:
    """The module with the wrappers that `jax.shard_map` over the mesh needs inside.

    Attention, mixtures of experts, and experts on their own are summed over `tensor`,
    experts exchange tokens over `expert`. Axes of size 1 add nothing. The arrays are
    the same; give `shard_map` their `partition_specs`.

    **Arguments:**

    - `module`: any module that holds attention or experts.
    - `mesh`: from `make_mesh`.
    - `sequence`: the mesh axes that split sequences, in order; `context`, `tensor`, or
        both, each of more than one device.

    **Raises:** ValueError if the module has such wrappers already, the mesh lacks an
    axis, or `sequence` is something else.
    """
    validate_mesh("parallelize", mesh)
    able = tuple(axis for axis in ("context", "tensor") if mesh.shape[axis] > 1)
    if sequence not in ((), able, *((axis,) for axis in able)):
        allowed = f"a tuple of axes of {able}, in this order"
        raise invalid_argument("parallelize", "sequence", sequence, allowed)
    tensor = "tensor" if mesh.shape["tensor"] > 1 else None

    def exchanging(node: Any) -> Any:
        if isinstance(node, _WRAPPERS):
            raise ValueError(
                "parallelize: the module went through it before; every sum would be "
                "taken twice. Give it the module without wrappers."
            )
        if isinstance(node, Experts) and mesh.shape["expert"] > 1:
            return ExpertParallel(node, "expert", _has_ragged_exchange(mesh))
        return node

    def wrap(node: Any) -> Any:
        if not is_part(node):
            return node
        if isinstance(node, MoE):
            experts = exchanging(node.experts)
            node = eqx.tree_at(lambda moe: moe.experts, node, experts)
            if tensor in sequence:
                return SplitTokens(node, "tensor")
        if isinstance(node, Attention) and sequence:
            return split_sequence(node, sequence, tensor)
        node = exchanging(node)
        return node if tensor is None else SummedOver(node, tensor)

    def is_part(node: Any) -> bool:
        parts = Attention | MoE | Experts | SharedExpert
        return isinstance(node, parts | _WRAPPERS)

    return jax.tree.map(wrap, module, is_leaf=is_part)


def _has_ragged_exchange(mesh: Mesh | AbstractMesh) -> bool:
    """Whether XLA has a ragged all-to-all for these devices.

    It has none for CPUs. An abstract mesh has no devices, so that a plan counts filled
    rows: the most that is sent.
    """
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform in ("gpu", "tpu")


def validate_mesh(call: str, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that does not have all four axes.

    **Arguments:**

    - `call`: what the user called.
    - `mesh`: what was given.

    **Raises:** ValueError if it is no mesh, lacks an axis, or has axes that are not
    `Auto`.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise invalid_argument(call, "mesh", mesh, "from make_mesh")
    # In this order: `lax.ppermute` counts along the mesh's axes, whatever it is given.
    if tuple(axis for axis in mesh.shape if axis in AXES) != AXES:
        raise ValueError(
            f"{call}: the mesh has the axes {tuple(mesh.shape)} and needs "
            f"{AXES}, whatever their sizes: make it with make_mesh."
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"{call}: the mesh's axes are {mesh.axis_types} and must be Auto: make it "
            "with make_mesh."
        )


def place(module: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The module with every array split over the mesh as its spec says.

    Abstract arrays are given the sharding that they would have.

    **Arguments:**

    - `module`: what to place.
    - `specs`: from `partition_specs`.
    - `mesh`: from `make_mesh`.
    """

    def put(leaf: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, module, specs)
