"""Putting the wrappers in place: the same mathematics, for a mesh."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.moe.experts import Experts, SharedExpert
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.sharding.expert import ExpertParallel
from dsv4_eqx.sharding.mesh import AXES
from dsv4_eqx.sharding.tensor import SummedOver


def parallelize(module: Any, mesh: Mesh) -> Any:
    """The module with the wrappers that `jax.shard_map` over the mesh needs inside.

    Attention, mixtures of experts, and experts on their own are summed over `tensor`,
    experts exchange tokens over `expert`. Axes of size 1 add nothing. The arrays are
    the same; give `shard_map` their `partition_specs`.

    **Arguments:**

    - `module`: any module that holds attention or experts.
    - `mesh`: from `make_mesh`.

    **Raises:** ValueError if the module has such wrappers already, or the mesh lacks an
    axis or splits the sequence.
    """
    _check_mesh(mesh)

    def exchanging(node: Any) -> Any:
        if isinstance(node, ExpertParallel | SummedOver):
            raise ValueError(
                "parallelize: the module went through it before; every sum would be "
                "taken twice. Give it the module without wrappers."
            )
        if isinstance(node, Experts) and mesh.shape["expert"] > 1:
            return ExpertParallel(node, "expert")
        return node

    def wrap(node: Any) -> Any:
        if not is_part(node):
            return node
        if isinstance(node, MoE):
            experts = exchanging(node.experts)
            node = eqx.tree_at(lambda moe: moe.experts, node, experts)
        node = exchanging(node)
        return SummedOver(node, "tensor") if mesh.shape["tensor"] > 1 else node

    def is_part(node: Any) -> bool:
        parts = Attention | MoE | Experts | SharedExpert | ExpertParallel | SummedOver
        return isinstance(node, parts)

    return jax.tree.map(wrap, module, is_leaf=is_part)


def _check_mesh(mesh: Mesh) -> None:
    if not set(AXES) <= set(mesh.shape):
        raise ValueError(
            f"parallelize: the mesh has the axes {tuple(mesh.shape)} and needs "
            f"{AXES}, whatever their sizes: make it with make_mesh."
        )
    if mesh.shape["context"] > 1:
        raise ValueError(
            f"parallelize: the mesh has context={mesh.shape['context']}, and splitting "
            "the sequence is not there yet: give its devices to another axis."
        )


def place(module: Any, specs: Any, mesh: Mesh) -> Any:
    """The module with every array split over the mesh as its spec says.

    **Arguments:**

    - `module`: what to place.
    - `specs`: from `partition_specs`.
    - `mesh`: from `make_mesh`.
    """
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        module,
        specs,
    )
