"""From arrays to FP8 and FP4, as a release has them, and in training.

A block's scale is the smallest power of two with which its largest number fits, and
numbers are rounded to the nearest code, ties to even (`act_quant` of the release).
"""

import math
from typing import Any, Final, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dsv4_eqx.numerics.quantized_weight import (
    AbstractWeight,
    QuantizedWeight,
    power_of_two,
)

FP8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
FP4: Final = np.dtype(ml_dtypes.float4_e2m1fn)
# Rows and columns of a matrix that share a scale.
BLOCKS: Final = {FP8: (128, 128), FP4: (1, 32)}
LARGEST_CODE: Final = {FP8: 448.0, FP4: 6.0}
_SCALE_BIAS: Final = 127
# The numbers halfway between two codes of FP4, and whether the upper one is even.
_HALFWAY: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_UPPER_IS_EVEN: Final = (False, True, False, True, False, True, False)


class FakeQuantizedWeight(AbstractWeight):
    r"""A weight in training, which computes as quantised: $W + (Q(W) - W)^\circ$.

    The forward pass has the numbers of FP8 or FP4, the gradient goes straight through
    to the weight ($^\circ$ has none). The weight's last `num_inner` dimensions are the
    columns of a matrix in a checkpoint, the `num_outer` before them its rows; blocks
    with a scale of their own are counted there.
    """

    weight: Float[Array, "..."]
    code_dtype: np.dtype = eqx.field(static=True)
    matrix: tuple[int, int] = eqx.field(static=True)  # rows and columns, on all devices
    num_outer: int = eqx.field(static=True)
    num_inner: int = eqx.field(static=True)
    num_stacked: int = eqx.field(static=True, default=1)  # matrices one above another

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight."""
        return self.weight.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        # numpy would make an array of one object of it.
        raise TypeError("a FakeQuantizedWeight is no array: dequantize(weight) is one.")

    def reshaped(self, size: int) -> "FakeQuantizedWeight":
        """With all leading dimensions in one, and matrices of `size` rows."""
        *_, rows, columns = self.weight.shape
        weight = self.weight.reshape(-1, size, columns)
        new = weight, self.code_dtype, self.matrix, 1, 1
        return FakeQuantizedWeight(*new, self.num_stacked * size // rows)

    def quantize(self) -> QuantizedWeight:
        """The weight packed, as a checkpoint has it.

        **Raises:** ValueError if a mesh splits blocks.
        """
        end = len(self.shape) - self.num_inner
        rows = math.prod(self.shape[end - self.num_outer : end]) // self.num_stacked
        sizes = rows, math.prod(self.shape[end:])
        block = BLOCKS[self.code_dtype]
        for size, of_all, width in zip(sizes, self.matrix, block):
            if size != of_all and size % width != 0:
                raise ValueError(
                    f"qat: a matrix of {self.matrix} is split into parts of {sizes}, "
                    f"and blocks of {block} share a scale; choose another mesh."
                )
        lead = self.shape[: end - self.num_outer]
        matrices = self.weight.reshape(*lead, self.num_stacked, *sizes)
        return quantize(matrices, self.code_dtype, block, self.shape)

    def dequantize(self) -> Float[Array, "..."]:
        """The numbers of the quantised weight, with the weight's gradient."""
        numbers = self.quantize().dequantize()
        return straight_through(self.weight, numbers)

    def pull_back(self, gradient: Float[Array, "..."]) -> "FakeQuantizedWeight":
        """The weight's gradient from that of the array, which is the same."""
        return eqx.tree_at(lambda x: x.weight, self, gradient)


def is_fake_quantized(node: Any) -> TypeGuard[FakeQuantizedWeight]:
    """Whether a node of a tree is a weight that is quantised in training."""
    return isinstance(node, FakeQuantizedWeight)


def quantize(
    matrices: Float[Array, "*lead rows columns"],
    code_dtype: np.dtype,
    block: tuple[int, int],
    shape: tuple[int, ...] | None = None,
    *,
    least: float | None = None,
) -> QuantizedWeight:
    """Packs matrices, with a power of two as the scale of each block.

    `shape` is that of the result, of as many elements. `least` is the largest number of
    a block, at least; by default what a scale can be for.
    """
    shape = matrices.shape if shape is None else shape
    exponents = _exponents(matrices, code_dtype, block, least)
    largest = LARGEST_CODE[code_dtype]
    values = matrices.astype(jnp.float32) * power_of_two(-exponents)
    values = jnp.clip(values, -largest, largest).reshape(shape)
    # Columns of a part that has its own dimension may end within a block.
    width = math.gcd(block[1], shape[-1])
    scales = exponents.reshape(shape)[..., ::width] + _SCALE_BIAS
    if code_dtype == FP8:
        codes = lax.bitcast_convert_type(values.astype(FP8), jnp.uint8)
    else:
        codes = _fp4_codes(values)
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    dtype = np.dtype(matrices.dtype)
    return QuantizedWeight(codes, scales.astype(jnp.uint8), code_dtype, dtype)


def fake_quantize(
    x: Float[Array, "*batch channels"], code_dtype: np.dtype, width: int, least: float
) -> Float[Array, "*batch channels"]:
    """Activations rounded in blocks of channels, with the gradient of `x`."""
    rest = -x.shape[-1] % width  # zeros change no block's largest number
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
    rows = padded.reshape(-1, padded.shape[-1])
    packed = quantize(rows, code_dtype, (1, width), padded.shape, least=least)
    return straight_through(x, packed.dequantize()[..., : x.shape[-1]])


@jax.custom_jvp
def straight_through(
    x: Float[Array, "*shape"], numbers: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The numbers, with the gradient of `x`; what is not finite in `x` stays so."""
    return jnp.where(jnp.isfinite(x), numbers, x)


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[0]


def _exponents(
    matrices: Float[Array, "*lead rows columns"],
    code_dtype: np.dtype,
    block: tuple[int, int],
    least: float | None,
) -> Array:
    """The exponent of the scale of each number's block."""
    *lead, rows, columns = matrices.shape
    largest = LARGEST_CODE[code_dtype]
    least = largest * 2.0**-126 if least is None else least
    up, right = (-size % width for size, width in zip((rows, columns), block))
    sizes = jnp.abs(matrices.astype(jnp.float32))
    sizes = jnp.pad(sizes, [(0, 0)] * len(lead) + [(0, up), (0, right)])
    counts = (rows + up) // block[0], (columns + right) // block[1]
    sizes = sizes.reshape(*lead, counts[0], block[0], counts[1], block[1])
    most = jnp.maximum(jnp.max(sizes, axis=(-3, -1)), np.float32(least))
    bits = lax.bitcast_convert_type(most * np.float32(1 / largest), jnp.uint32)
    is_between = (bits & 0x7FFFFF) != 0
    exponents = (bits >> 23).astype(jnp.int32) - _SCALE_BIAS
    exponents += is_between.astype(jnp.int32)
    each = jnp.repeat(jnp.repeat(exponents, block[0], -2), block[1], -1)
    return each[..., :rows, :columns]


def _fp4_codes(values: Float[Array, "*shape"]) -> Array:
    """The nearest codes of E2M1, ties to even, of numbers of at most 6."""
    sizes = jnp.abs(values)
    codes = jnp.signbit(values).astype(jnp.uint8) << 3
    for halfway, upper_is_even in zip(_HALFWAY, _UPPER_IS_EVEN):
        is_above = sizes >= halfway if upper_is_even else sizes > halfway
        codes = codes + is_above.astype(jnp.uint8)
    return codes
