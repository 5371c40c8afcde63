"""Grouped products of all rows at once: XLA's on TPU, our own kernels on Hopper GPUs.

Matrices lie `[matrices, out, in]` and are never copied: the product contracts the
dimension where it lies.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_eqx.kernels.batching import one_by_one
from dsv4_eqx.kernels.form import Form


def product(
    rows: Float[Array, "rows in_channels"],
    matrices: Float[Array, "matrices out in"],
    group_sizes: Int[Array, " groups"],
    first: Int[Array, ""] | int = 0,
    *,
    transposed: bool = False,
    form: Form,
) -> Float[Array, "rows out_channels"]:
    """Each row, sorted by group, times its group's matrix; the first group's is number
    `first`. If transposed, rows have `out` channels and come to have `in`.
    """
    if form.hopper and _fits_hopper(rows, matrices):
        from dsv4_eqx.kernels.hopper_grouped import grouped_matmul

        return grouped_matmul(
            rows, matrices, group_sizes, first=first, transposed=transposed
        )
    if len(matrices) != len(group_sizes):
        matrices = lax.dynamic_slice_in_dim(matrices, first, len(group_sizes))
    contracted = 1 if transposed else 2
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contracted,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return _ragged_dot(rows, matrices, group_sizes, dimensions)


def outer_product(
    left: Float[Array, "rows out"],
    right: Float[Array, "rows in"],
    group_sizes: Int[Array, " groups"],
    *,
    form: Form,
) -> Float[Array, "groups out in"]:
    """For each group the sum over its rows of left x right."""
    if form.hopper and _fits_hopper(left, right):
        from dsv4_eqx.kernels.hopper_outer import grouped_outer

        return grouped_outer(left, right, group_sizes)
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return _ragged_dot(left, right, group_sizes, dimensions)


def _ragged_dot(
    left: Array,
    right: Array,
    group_sizes: Array,
    dimensions: lax.RaggedDotDimensionNumbers,
) -> Array:
    """`lax.ragged_dot_general`, which has no rule for `jax.vmap`."""

    @one_by_one
    def call(left: Array, right: Array, group_sizes: Array) -> Array:
        return lax.ragged_dot_general(left, right, group_sizes, dimensions)

    return call(left, right, group_sizes)


def _fits_hopper(left: Array, right: Array) -> bool:
    is_half = left.dtype in (jnp.bfloat16, jnp.float16)
    sizes = (*left.shape[1:], *right.shape[1:])
    return is_half and left.dtype == right.dtype and all(n % 64 == 0 for n in sizes)
