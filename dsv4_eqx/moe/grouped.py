"""The grouped matrix product: each row with the matrix of its own group.

Rows lie sorted by group. XLA's `ragged_dot` is the right thing on TPU and GPU; on CPU
it multiplies every row by every matrix, so there a loop over blocks of rows takes its
place, which stops when the rows end. The choice is made here and nowhere else.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_eqx.primitives.varying import alike

# Small blocks waste fewer rows at a group's end, large ones multiply faster.
_LARGEST_BLOCK: Final = 64


def grouped_matmul(
    rows: Float[Array, "rows in"],
    matrices: Float[Array, "groups out in"],
    group_sizes: Int[Array, " groups"],
) -> Float[Array, "rows out"]:
    """`matrices[group of row] @ row` for every row; reverse-mode differentiable.

    It does not batch under `vmap`: flatten the rows instead.

    **Arguments:**

    - `rows`: sorted by group; rows past the last group give unspecified finite values.
    - `matrices`: one for each group.
    - `group_sizes`: rows of each group.
    """
    rows, matrices, group_sizes = alike(rows, matrices, group_sizes)
    return _grouped_matmul(rows, matrices, group_sizes)


@jax.custom_vjp
def _grouped_matmul(rows, matrices, group_sizes):
    return lax.platform_dependent(
        rows, matrices, group_sizes, cpu=_blocked_matmul, default=_ragged_matmul
    )


def _forward(rows, matrices, group_sizes):
    return _grouped_matmul(rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(residuals, cotangent):
    rows, matrices, group_sizes = residuals
    d_rows = lax.platform_dependent(
        cotangent,
        jnp.swapaxes(matrices, 1, 2),
        group_sizes,
        cpu=_blocked_matmul,
        default=_ragged_matmul,
    )
    past_end = jnp.arange(rows.shape[0]) >= jnp.sum(group_sizes)
    d_rows = jnp.where(past_end[:, None], 0, d_rows)
    d_matrices = lax.platform_dependent(
        cotangent, rows, group_sizes, cpu=_blocked_outer, default=_ragged_outer
    )
    return d_rows, d_matrices, None


_grouped_matmul.defvjp(_forward, _backward)


def _ragged_matmul(rows, matrices, group_sizes):
    return lax.ragged_dot(rows, jnp.swapaxes(matrices, 1, 2), group_sizes)


def _ragged_outer(left, right, group_sizes):
    """For each group the sum over its rows of left x right."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(left, right, group_sizes, dimensions)


def _blocks(num_rows: int, group_sizes, block: int):
    """Group and first row of every block of rows, and how many blocks there are."""
    group_ends = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // block)
    block_ends = jnp.cumsum(blocks)
    most = -(-num_rows // block) + group_sizes.shape[0]
    index = jnp.arange(most, dtype=group_sizes.dtype)
    group = jnp.searchsorted(block_ends, index, side="right").astype(index.dtype)
    group = jnp.minimum(group, group_sizes.shape[0] - 1)
    first_row = (group_ends - group_sizes)[group]
    first_block = (block_ends - blocks)[group]
    return group, first_row + (index - first_block) * block, block_ends[-1]


def _block_size(num_rows: int) -> int:
    return max(1, min(_LARGEST_BLOCK, num_rows))


def _blocked_matmul(rows, matrices, group_sizes):
    block = _block_size(rows.shape[0])
    group, start, num_blocks = _blocks(rows.shape[0], group_sizes, block)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def multiply(i, out):
        # A block may reach into the next group's rows: that group's own block comes
        # later and overwrites them.
        taken = lax.dynamic_slice_in_dim(padded, start[i], block)
        matrix = lax.dynamic_index_in_dim(matrices, group[i], keepdims=False)
        product = jnp.einsum("ri,oi->ro", taken, matrix)
        return lax.dynamic_update_slice_in_dim(out, product, start[i], 0)

    out = jnp.zeros_like(padded, shape=(padded.shape[0], matrices.shape[1]))
    out = lax.fori_loop(0, num_blocks, multiply, alike(out, rows)[0])
    return out[: rows.shape[0]]


def _blocked_outer(left, right, group_sizes):
    """For each group the sum over its rows of left x right."""
    num_rows = left.shape[0]
    block = _block_size(num_rows)
    group, start, num_blocks = _blocks(num_rows, group_sizes, block)
    group_ends = jnp.cumsum(group_sizes)
    left, right = (jnp.pad(x, ((0, block), (0, 0))) for x in (left, right))
    in_block = jnp.arange(block, dtype=group_sizes.dtype)

    def accumulate(i, sums):
        own = start[i] + in_block < group_ends[group[i]]
        l_rows = lax.dynamic_slice_in_dim(left, start[i], block)
        r_rows = lax.dynamic_slice_in_dim(right, start[i], block)
        product = jnp.einsum("ro,ri->oi", jnp.where(own[:, None], l_rows, 0), r_rows)
        total = lax.dynamic_index_in_dim(sums, group[i], keepdims=False) + product
        return lax.dynamic_update_index_in_dim(sums, total, group[i], 0)

    shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
    sums = jnp.zeros_like(left, shape=shape)
    return lax.fori_loop(0, num_blocks, accumulate, alike(sums, left)[0])
