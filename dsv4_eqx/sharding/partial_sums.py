"""What a split part declares: over which dimensions its output is a partial sum.

    class MyAttention(eqx.Module):
        partial_over = ("my_heads",)
        query: Float[Array, "my_heads head_dim dim"]

means: where each device has some of `my_heads`, each returns a partial sum, and the
output is the sum over devices. `partial_over = ()` means that every device returns the
whole output, although arrays may be split. A part without split arrays need not declare
anything, unless it is inside a part whose heads or tokens are split.
"""

from typing import Any, Final

import equinox as eqx
import jax

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.attention.compressor import Compressor
from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.hyper_connection import HyperConnection, HyperHead
from dsv4_eqx.model.block import Block
from dsv4_eqx.model.layers import Layers
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.model.mtp import MTP
from dsv4_eqx.moe.experts import Experts, SharedExpert
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.moe.router import HashRouter, TopKRouter
from dsv4_eqx.numerics.lora_weight import LoRAWeight
from dsv4_eqx.numerics.quantized_weight import AbstractWeight
from dsv4_eqx.primitives.linear import GroupedLinear
from dsv4_eqx.primitives.norm import RMSNorm, UnweightedRMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding
from dsv4_eqx.sharding.annotations import annotated_leaves
from dsv4_eqx.sharding.fsdp import Gathered
from dsv4_eqx.sharding.tensor import SplitEmbedding

_OURS: Final = (
    *(DeepSeekV4, Layers, Block, MTP, Gathered, SplitEmbedding),
    *(AbstractWeight, LoRAWeight),
    *(Attention, Compressor, Indexer, MoE, Experts, SharedExpert),
    *(TopKRouter, HashRouter, HyperConnection, HyperHead),
    *(RMSNorm, UnweightedRMSNorm, GroupedLinear, RotaryEmbedding),
)


def partial_dims(part: Any) -> frozenset[str]:
    """The dimensions over which a part declares its output to be a partial sum."""
    declared = getattr(part, "partial_over", ())
    name = f"{type(part).__name__}.partial_over"
    is_tuple = isinstance(declared, tuple)
    if not is_tuple or not all(isinstance(x, str) for x in declared):
        raise ValueError(
            f"{name} is {declared!r}: must be a tuple of dimension names, like "
            '("heads",).'
        )
    dims = dims_of(part) if declared else frozenset()
    unknown = [dim for dim in declared if dim not in dims]
    if unknown:
        raise ValueError(
            f"{name} names {unknown[0]!r}, which is no dimension of its arrays: those "
            f"are {sorted(dims)}."
        )
    if "experts" in declared:
        raise ValueError(
            f"{name} names 'experts': devices that split the experts have other tokens "
            "each, which are sent to their experts, not added up. Leave it out."
        )
    return frozenset(declared)


def dims_of(module: Any) -> frozenset[str]:
    """The dimensions of all arrays in a module."""
    return frozenset(d for leaf in annotated_leaves(module) for d in leaf.dims or ())


def is_ours(node: Any) -> bool:
    """Whether a node of a tree is a module of the library."""
    return isinstance(node, _OURS)


def declares_sum(node: Any) -> bool:
    """Whether a node of a tree is a module with `partial_over`."""
    return isinstance(node, eqx.Module) and hasattr(node, "partial_over")


def validate_split(part: Any, path: str, split: frozenset[str]) -> None:
    """Refuses a part without `partial_over` of which an array of its own is split."""
    # The model itself handles a split vocabulary: nothing is summed over it.
    split_dims = sorted((_own_dims(part) & split) - {"vocab"})
    if split_dims:
        name, dim = type(part).__name__, split_dims[0]
        raise ValueError(
            f"{_at(path)}{name} has arrays that are split along {dim!r}, "
            "and does not say what its output is then. Write into the class "
            f"`partial_over = ({dim!r},)` if that is a sum over {dim!r}, of which each "
            "device has a part, or `partial_over = ()` if each has the whole output."
        )


def validate_inside(part: Any, path: str) -> None:
    """Refuses modules in a part of which each device has some heads or tokens.

    They fit where they declare it by an empty `partial_over`.
    """

    def is_foreign(node: Any) -> bool:
        return isinstance(node, eqx.Module) and not is_ours(node)

    nodes = jax.tree_util.tree_leaves_with_path(part, is_leaf=is_foreign)
    for key, node in nodes:
        if is_foreign(node) and (not declares_sum(node) or partial_dims(node)):
            name, outer = type(node).__name__, type(part).__name__
            raise ValueError(
                f"{_at(path + jax.tree_util.keystr(key))}{name} is inside "
                f"of {outer}, of which each device has some heads or tokens alone. If "
                "what it makes of some is that part of what it makes of all, write "
                "`partial_over = ()` into the class; otherwise write an attention of "
                "your own around it."
            )


def refuse_by_token(part: Any, path: str, axes: tuple[str, ...]) -> None:
    """Refuses a part without `partial_over` where each device has other tokens."""
    name = type(part).__name__
    raise ValueError(
        f"{_at(path)}{name} would be called with some tokens of a "
        f"sequence, which is split over {' and '.join(axes)}. If each token goes its "
        "own way in it, write `partial_over = ()` into the class."
    )


def validate_num_local(part: Any, path: str) -> None:
    """Refuses split experts that do not say how many of them a device holds."""
    if not hasattr(part, "num_local"):
        raise ValueError(
            f"{_at(path)}{type(part).__name__} has arrays that are split "
            "along 'experts', so that tokens are sent to the device that has theirs. "
            "Give it a property `num_local`, the number that a device holds, as "
            "`Experts` has."
        )


def _own_dims(module: Any) -> frozenset[str]:
    """The dimensions of a module's arrays, without those of other parts inside it."""

    def is_part(node: Any) -> bool:
        is_inner = isinstance(node, eqx.Module) and node is not module
        return is_inner and (declares_sum(node) or not is_ours(node))

    def drop(node: Any) -> Any:
        return None if is_part(node) else node

    return dims_of(jax.tree.map(drop, module, is_leaf=is_part))


def _at(path: str) -> str:
    return f"{path.removeprefix('.')}: " if path else ""
