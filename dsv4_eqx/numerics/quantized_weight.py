"""Weights that stay as small as a checkpoint has them.

The release stores most weights in 8 or 4 bits, with a power of two as the scale of each
block of columns; others have any float32 there. A `QuantizedWeight` stands where a
module has an array; `dequantize` makes arrays of all of them, exactly, where a
computation begins.
"""

import abc
import math
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt, UInt8

_EXPONENT_BIAS = 127  # of float32 and of the scales, E8M0
_MANTISSA_BITS = 23


class AbstractWeight(eqx.Module):
    """What stands where a module has an array, and of which one is made when needed.

    Its fields annotated `...` are split over a mesh like the array.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Dtype of the array that it stands for."""

    @property
    def ndim(self) -> int:
        """Dimensions of the array that it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements of the array that it stands for."""
        return math.prod(self.shape)

    @abc.abstractmethod
    def dequantize(self) -> Float[Array, "..."]:
        """The array, in `dtype`."""


class QuantizedWeight(AbstractWeight):
    r"""A weight in FP8 (E4M3) or FP4 (E2M1) with a scale for each block of columns.

    $W_{ij} = \mathrm{code}_{ij} \cdot 2^{s_{i, \lfloor j / b \rfloor} - 127}$. Of two
    4-bit codes in a byte, the even column's is the low one. Scales of four bytes are
    the bits of float32 numbers, which stand in place of the powers of two.

    Everything is stored as integers: a packed weight is not trained, and Equinox's
    filters leave it out of gradients. Its fields are split over a mesh like the array
    that it stands for, which is what the `...` says.
    """

    codes: UInt8[Array, "..."]
    scales: UInt[Array, "..."]  # uint8: E8M0, or uint32: float32
    code_dtype: np.dtype = eqx.field(static=True)
    array_dtype: np.dtype = eqx.field(static=True)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array that it stands for."""
        return self.array_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        *leading, num_bytes = self.codes.shape
        return (*leading, num_bytes * codes_per_byte(self.code_dtype))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        # numpy would make an array of one object of it.
        raise TypeError(
            "a QuantizedWeight is no array: dequantize(weight) makes one of it."
        )

    def dequantize(self) -> Float[Array, "..."]:
        """The array, in `dtype`; exact unless that has no such normal number.

        With float32 scales it is the product in float32.
        """
        if codes_per_byte(self.code_dtype) == 2:
            halves = [_fp4_values(self.codes & 15), _fp4_values(self.codes >> 4)]
            values = jnp.stack(halves, axis=-1)
        else:
            codes = lax.bitcast_convert_type(self.codes, self.code_dtype)
            values = codes.astype(jnp.float32)
        values = values.reshape(*self.scales.shape, -1)
        if self.scales.dtype == jnp.uint32:
            scales = lax.bitcast_convert_type(self.scales[..., None], jnp.float32)
            return (values * scales).astype(self.dtype).reshape(self.shape)
        # In two steps, since the smallest scale is no normal float32.
        scales = self.scales[..., None].astype(jnp.int32) - _EXPONENT_BIAS
        half = scales >> 1
        values = values * power_of_two(half) * power_of_two(scales - half)
        return values.astype(self.dtype).reshape(self.shape)


def codes_per_byte(code_dtype: np.dtype) -> int:
    """How many codes a byte holds: 1 of FP8, 2 of FP4."""
    return 8 // jnp.finfo(code_dtype).bits


def is_quantized(node: Any) -> TypeGuard[QuantizedWeight]:
    """Whether a node of a tree is a packed weight."""
    return isinstance(node, QuantizedWeight)


def dequantize(tree: Any) -> Any:
    """The tree with an array in place of every `AbstractWeight`, as packed ones are."""

    def is_weight(node: Any) -> bool:
        return isinstance(node, AbstractWeight)

    def array_of(node: Any) -> Any:
        return node.dequantize() if is_weight(node) else node

    return jax.tree.map(array_of, tree, is_leaf=is_weight)


def _fp4_values(codes: Array) -> Array:
    """Float32 of E2M1 codes: their bits moved to where float32 has them."""
    codes = codes.astype(jnp.uint32)
    magnitude = codes & 7  # 0, 1/2, then (1 + m/2) 2^(e-1) of the bits eem
    exponent = (magnitude >> 1) + (_EXPONENT_BIAS - 1)
    normal = exponent << _MANTISSA_BITS | (magnitude & 1) << (_MANTISSA_BITS - 1)
    half_or_zero = magnitude * ((_EXPONENT_BIAS - 1) << _MANTISSA_BITS)
    bits = jnp.where(magnitude > 1, normal, half_or_zero) | (codes & 8) << 28
    return lax.bitcast_convert_type(bits, jnp.float32)


def power_of_two(exponent: Array) -> Array:
    """Float32 of two to a power, of at least -126."""
    bits = (exponent + _EXPONENT_BIAS) << _MANTISSA_BITS
    return lax.bitcast_convert_type(bits, jnp.float32)
