"""Collectives between the parts: the same mathematics, for a mesh.

Where a part is split, `parallelize` puts a wrapper with the same methods around it:

    tensor   sums the output of a part whose `partial_over` names a split dimension:
             attention, and a mixture of experts as a whole where both its routed and
             its shared experts are partial sums
    expert   sends tokens from all devices to the experts, and their outputs back
    tokens   where tokens of a sequence are split, gives attention the tokens before a
             device's tokens, and gives a part that is summed over `tensor` the tokens
             of all devices that it is summed over
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, Mesh

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.model.block import Block
from dsv4_eqx.moe.experts import Experts
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.numerics.validation import invalid_argument
from dsv4_eqx.sharding.context import (
    AbstractSplitSequence,
    SplitSequence,
    SplitSequenceAndHeads,
)
from dsv4_eqx.sharding.expert import ExpertParallel
from dsv4_eqx.sharding.mesh import validate_mesh
from dsv4_eqx.sharding.partial_sums import (
    declares_sum,
    dims_of,
    is_ours,
    partial_dims,
    refuse_by_token,
    validate_inside,
    validate_num_local,
    validate_split,
)
from dsv4_eqx.sharding.rules import rules_with
from dsv4_eqx.sharding.tensor import SummedOver, WithAllTokens

_WRAPPERS: Final = (ExpertParallel, SummedOver, WithAllTokens, AbstractSplitSequence)
# The dimension of the tokens in arguments of a mixture's parts, and of a mixture.
_ROWS, _SEQ = 0, 1


def parallelize(
    module: Any,
    mesh: Mesh | AbstractMesh,
    sequence: tuple[str, ...] = (),
    *,
    dimensions: Mapping[str, str | None] | None = None,
) -> Any:
    """The module with the wrappers that it needs inside `jax.shard_map` over the mesh.

    Axes of size 1 add no wrapper. The arrays are the same; give `shard_map` their
    `partition_specs`.

    A part of your own needs no declaration if none of its arrays is split, unless it is
    inside of a part of the library that has only some heads or tokens on each device.
    Otherwise its class must declare what its output is: `partial_over = ("my_heads",)`
    for a partial sum over some dimensions, `partial_over = ()` for the whole output, or
    for the output of the device's heads or tokens. In the place of a block's attention
    or mixture, it is called with whole sequences.

    **Arguments:**

    - `module`: any module that holds attention or experts.
    - `mesh`: from `make_mesh`.
    - `sequence`: the mesh axes that split sequences, in order; `context`, `tensor`, or
        both, each of more than one device.
    - `dimensions`: of your own modules, as for `shard`.

    **Raises:** ValueError if the module has such wrappers already, or a part lacks the
    `partial_over` that it needs; if the mesh lacks an axis; or if `sequence` or
    `dimensions` are not as described.
    """
    validate_mesh("parallelize", mesh)
    possible = tuple(axis for axis in ("context", "tensor") if mesh.shape[axis] > 1)
    if sequence not in ((), possible, *((axis,) for axis in possible)):
        allowed = f"a tuple of axes of {possible}, in this order"
        raise invalid_argument("parallelize", "sequence", sequence, allowed)
    rules = rules_with("parallelize", dimensions)

    def dims_over(axis: str) -> frozenset[str]:
        is_split = mesh.shape[axis] > 1
        return frozenset(d for d in rules if is_split and rules[d] == axis)

    here = _Surroundings(dims_over("tensor"), dims_over("expert"), sequence, mesh)
    return _wrap(module, "", here)


def _has_ragged_exchange(mesh: Mesh | AbstractMesh) -> bool:
    """Whether XLA has a ragged all-to-all for these devices.

    It has none for CPUs. An abstract mesh has no devices; without ragged exchanges, a
    plan counts padded rows, the most that can be sent.
    """
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform in ("gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class _Surroundings:
    """A module's surroundings: what is split, and what the modules around it do."""

    over_tensor: frozenset[str]  # dimensions that `tensor` splits
    over_expert: frozenset[str]  # dimensions that `expert` splits
    sequence: tuple[str, ...]  # mesh axes that split tokens
    mesh: Mesh | AbstractMesh
    summed: frozenset[str] = frozenset()  # dimensions that a module around it sums over
    place: str = ""  # the field: a mixture's, or `.attention` or `.moe` of a block
    is_inside: bool = False  # whether a module of the library holds it
    is_declared: bool = False  # whether a module around it has `partial_over`


def _wrap(node: Any, path: str, here: _Surroundings) -> Any:
    """A node of the tree, with wrappers inside and around."""
    if jax.tree_util.all_leaves([node]):
        return node
    if isinstance(node, _WRAPPERS):
        raise ValueError(
            "parallelize: the module went through it before; every sum would be "
            "taken twice. Give it the module without wrappers."
        )
    _validate(node, path, here)
    partial, inner = _partial(node, here), here
    if partial:
        # Inside, the devices of `tensor` have the same tokens.
        others = tuple(axis for axis in here.sequence if axis != "tensor")
        summed = here.summed | partial
        inner = dataclasses.replace(inner, sequence=others, summed=summed)
    if _takes_whole_sequences(node, here):
        inner = dataclasses.replace(inner, sequence=())
    exchanges = _has_experts(node, here) and bool(dims_of(node) & here.over_expert)
    if exchanges:
        inner = dataclasses.replace(inner, over_expert=frozenset())
    wrapped = _wrap_children(node, path, inner)
    if exchanges:
        is_ragged = _has_ragged_exchange(here.mesh)
        are_whole = bool((dims_of(node) & here.over_tensor) - inner.summed)
        wrapped = ExpertParallel(wrapped, "expert", is_ragged, are_whole)
    return _wrap_around(node, wrapped, bool(partial), here)


def _wrap_children(node: Any, path: str, here: _Surroundings) -> Any:
    """The node with its children wrapped."""
    if isinstance(node, eqx.Module):
        is_declared = here.is_declared or declares_sum(node)
        here = dataclasses.replace(
            here, is_inside=is_ours(node), is_declared=is_declared
        )

    def wrap_child(key: tuple, child: Any) -> Any:
        name = jax.tree_util.keystr(key)
        has_place = isinstance(node, MoE)
        if isinstance(node, Block):
            has_place = name in (".attention", ".moe")
        place = name if has_place else ""
        return _wrap(child, path + name, dataclasses.replace(here, place=place))

    return jax.tree_util.tree_map_with_path(
        wrap_child, node, is_leaf=lambda x: x is not node
    )


def _wrap_around(node: Any, wrapped: Any, is_partial: bool, here: _Surroundings) -> Any:
    """The node with wrapped children, in the wrappers that it needs itself."""
    splits_tokens = "tensor" in here.sequence
    if isinstance(node, Attention) and here.sequence:
        if is_partial and splits_tokens:
            return SplitSequenceAndHeads(wrapped, here.sequence, "tensor")
        return SplitSequence(wrapped, here.sequence, "tensor" if is_partial else None)
    if is_partial and not splits_tokens:
        wrapped = SummedOver(wrapped, "tensor")
    summed = ("tensor",) if is_partial and splits_tokens else ()
    if _takes_whole_sequences(node, here):
        return WithAllTokens(wrapped, here.sequence, summed, _SEQ)
    if summed:
        dim = _SEQ if isinstance(node, MoE) else _ROWS
        return WithAllTokens(wrapped, summed, summed, dim)
    return wrapped


def _partial(node: Any, here: _Surroundings) -> frozenset[str]:
    """Split dimensions over which the node's output must be summed."""
    if not isinstance(node, MoE):
        return (partial_dims(node) & here.over_tensor) - here.summed
    # Its output is a sum of two outputs: one collective if both are partial sums.
    routed, shared = _partial(node.experts, here), _partial(node.shared, here)
    return routed | shared if routed and shared else frozenset()


def _takes_whole_sequences(node: Any, here: _Surroundings) -> bool:
    """Whether the node may need other devices' tokens: it is not from the library."""
    if not here.sequence or here.place not in (".attention", ".moe"):
        return False
    return not isinstance(node, Attention | MoE)


def _has_experts(node: Any, here: _Surroundings) -> bool:
    """Whether the node is called like `Experts`, with rows of tokens."""
    return isinstance(node, Experts) or here.place == ".experts"


def _validate(node: Any, path: str, here: _Surroundings) -> None:
    """Refuses a split part that does not declare what its output is."""
    if not isinstance(node, eqx.Module):
        return
    is_split = here.sequence or _partial(node, here)
    if isinstance(node, Attention) and is_split:
        validate_inside(node, path)
    if is_ours(node) or here.is_declared:
        return
    sends_rows = _has_experts(node, here)
    if sends_rows and dims_of(node) & here.over_expert:
        validate_num_local(node, path)
    if not declares_sum(node):
        split = here.over_tensor if sends_rows else here.over_tensor | here.over_expert
        validate_split(node, path, split)
        if here.is_inside and here.sequence and not here.place:
            refuse_by_token(node, path, here.sequence)
