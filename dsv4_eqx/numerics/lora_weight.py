r"""A frozen weight and its low-rank adapter, in the place of the weight.

LoRA (Hu et al. 2021): $W x + \frac{\alpha}{r} B (A x)$. Where a module multiplies by
its weight with `project` or `project_groups`, both thin products are made, and neither
$B A$ nor a gradient of W's size ever exists. Where it needs an array, as for routed
experts, `as_arrays` forms $W + \frac{\alpha}{r} B A$.
"""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dsv4_eqx.numerics.precision import at_least_float32, wide_einsum
from dsv4_eqx.numerics.quantized_weight import AbstractWeight, dequantize

RANK = "adapter_rank"  # the dimension that A and B share


class LoRAWeight(eqx.Module):
    r"""$W + \frac{\alpha}{r} B A$, where W is an array or packed, and has no gradient.

    The weight's dimensions are, in this order, `lead` ones, `num_outer` that a product
    gives and `num_inner` that it sums over. Each index of `lead`, as of stacked layers,
    groups and experts, has an adapter of its own:

        base  [*lead, *outer, *inner]
        a     [*lead, rank, *inner]
        b     [*lead, *outer, rank]
    """

    base: Float[Array, "..."] | AbstractWeight
    a: Float[Array, "..."]
    b: Float[Array, "..."]
    alpha: float = eqx.field(static=True)
    num_outer: int = eqx.field(static=True)
    num_inner: int = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the array that it stands for."""
        return self.base.ndim

    @property
    def size(self) -> int:
        """Elements of the array that it stands for."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array that it stands for."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.b.shape[-1]

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return self.alpha / self.rank

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        # numpy would make an array of one object of it.
        raise TypeError("a LoRAWeight is no array: as_arrays(weight) makes one of it.")

    def dims_of(self, field: str, dims: tuple[str, ...]) -> tuple[str, ...]:
        """The dimension names of a field, where `dims` are the weight's."""
        num_lead = len(dims) - self.num_outer - self.num_inner
        lead, outer = dims[:num_lead], dims[num_lead : len(dims) - self.num_inner]
        inner = dims[len(dims) - self.num_inner :]
        if field == "a":
            return (*lead, RANK, *inner)
        return (*lead, *outer, RANK) if field == "b" else dims

    def reshaped(self, size: int) -> "LoRAWeight":
        """With all of `lead` in one dimension, and matrices of `size` rows."""

        def matrices(x: Array, rows: int) -> Array:
            return x.reshape(-1, rows, x.shape[-1])

        return LoRAWeight(
            jax.tree.map(lambda x: matrices(x, size), self.base),
            matrices(self.a, self.rank),
            matrices(self.b, size),
            self.alpha,
            num_outer=1,
            num_inner=1,
        )

    def project(
        self,
        x: Float[Array, "..."],
        product: Callable[[Array, Array], Array],
        again: Callable[[Array, Array], Array],
    ) -> Float[Array, "..."]:
        """The weight's product with x, where `product` is that with an array, and
        `again` that with B of what it gives for A.
        """
        base = lax.stop_gradient(dequantize(self.base))
        hidden = product(x, self.a.astype(x.dtype))
        adapted = again(hidden, self.b.astype(hidden.dtype))
        out = product(x, base)
        return out + jnp.asarray(self.scale, out.dtype) * adapted.astype(out.dtype)

    def as_array(self) -> Float[Array, "..."]:
        """The array, added up in at least float32."""
        base = lax.stop_gradient(dequantize(self.base))
        num_lead = base.ndim - self.num_outer - self.num_inner
        lead = base.shape[:num_lead]
        a = at_least_float32(self.a).reshape(*lead, self.rank, -1)
        b = at_least_float32(self.b).reshape(*lead, -1, self.rank)
        delta = wide_einsum("...or,...ri->...oi", b, a).reshape(base.shape)
        wide = at_least_float32(base)
        out = wide + jnp.asarray(self.scale, wide.dtype) * delta.astype(wide.dtype)
        return out.astype(base.dtype)

    def pull_back(self, gradient: Float[Array, "..."]) -> "LoRAWeight":
        """The gradients of A and B from that of the array; none of the base."""
        num_lead = gradient.ndim - self.num_outer - self.num_inner
        lead = gradient.shape[:num_lead]
        a = self.a.reshape(*lead, self.rank, -1)
        b = self.b.reshape(*lead, -1, self.rank)
        wide = self.scale * gradient.reshape(*lead, b.shape[-2], -1).astype(a.dtype)
        d_a = wide_einsum("...or,...oi->...ri", b, wide).astype(self.a.dtype)
        d_b = wide_einsum("...oi,...ri->...or", wide, a).astype(self.b.dtype)
        new = None, d_a.reshape(self.a.shape), d_b.reshape(self.b.shape)
        return eqx.tree_at(
            lambda x: (x.base, x.a, x.b), self, new, is_leaf=lambda x: x is self.base
        )


def is_lora(node: Any) -> TypeGuard[LoRAWeight]:
    """Whether a node of a tree is a weight with an adapter."""
    return isinstance(node, LoRAWeight)


def stands_for_array(node: Any) -> bool:
    """Whether a node of a tree is a module in the place of one array."""
    return isinstance(node, AbstractWeight | LoRAWeight)


def as_arrays(tree: Any) -> Any:
    """The tree with an array in place of everything that stands for one."""

    def array_of(node: Any) -> Any:
        return node.as_array() if is_lora(node) else dequantize(node)

    return jax.tree.map(array_of, tree, is_leaf=stands_for_array)


def pull_back(weight: Any, gradient: Float[Array, "..."] | None) -> Any:
    """The gradient of what stands for an array, from that of the array."""
    if gradient is None or isinstance(weight, jax.Array):
        return gradient
    return weight.pull_back(gradient)
