"""Putting the wrappers in place: the same mathematics, for a mesh."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.moe.experts import Experts
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.sharding.expert import ExpertParallel
from dsv4_eqx.sharding.tensor import SummedOver


def parallelize(module: Any, mesh: Mesh) -> Any:
    """The module with the wrappers that `jax.shard_map` over the mesh needs inside.

    Attention and mixtures of experts are summed over `tensor`, experts exchange tokens
    over `expert`. Axes of size 1 add nothing. The arrays are the same; give
    `shard_map` their `partition_specs`.

    **Arguments:**

    - `module`: any module that holds attention or experts.
    - `mesh`: from `make_mesh`.

    **Raises:** ValueError if the module has such wrappers already.
    """

    def wrap(node: Any) -> Any:
        if isinstance(node, ExpertParallel | SummedOver):
            raise ValueError(
                "parallelize: the module went through it before; every sum would be "
                "taken twice. Give it the module without wrappers."
            )
        if isinstance(node, Experts) and mesh.shape["expert"] > 1:
            return ExpertParallel(node, "expert")
        if isinstance(node, MoE):
            node = eqx.tree_at(lambda moe: moe.experts, node, wrap(node.experts))
        if isinstance(node, Attention | MoE) and mesh.shape["tensor"] > 1:
            return SummedOver(node, "tensor")
        return node

    def is_part(node: Any) -> bool:
        wrappers = ExpertParallel | SummedOver
        return isinstance(node, Attention | MoE | Experts | wrappers)

    return jax.tree.map(wrap, module, is_leaf=is_part)


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
