"""One part of a stack of arrays, read where it lies.

A scan over layers hands each of them a copy of its part of whatever is scanned over.
Where a layer reads or writes a few rows of a large array, that copy costs more than the
layer. A `Slice` stands where a module has the part: the whole stack, and which part.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from dsv4_eqx.numerics.lora_weight import LoRAWeight
from dsv4_eqx.numerics.quantized_weight import AbstractWeight


class Slice(eqx.Module):
    """`stack[index]` along one dimension, without a copy; it has no gradient."""

    stack: Shaped[Array, "..."] | AbstractWeight | LoRAWeight
    index: Int[Array, ""] | int
    dim: int = eqx.field(static=True, default=0)  # that the index counts along

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (*self.stack.shape[: self.dim], *self.stack.shape[self.dim + 1 :])

    @property
    def ndim(self) -> int:
        """Dimensions of the part."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the part."""
        return self.stack.dtype


def is_slice(node: Any) -> bool:
    """Whether a node of a tree is a `Slice`, for `jax.tree.map(is_leaf=...)`."""
    return isinstance(node, Slice)


def as_slice(x: Any, dim: int = 0) -> Slice:
    """`x` as it is if it is a `Slice`, else the only part of a stack of one."""
    if isinstance(x, Slice):
        return x
    return Slice(jax.tree.map(lambda x: jnp.expand_dims(x, dim), x), 0, dim)
