"""The experts on a CPU: a loop over groups that have rows, and blocks of their rows.

XLA multiplies every row by every matrix there. This reads no matrix that no row needs,
which is what decoding a token costs, and unpacks packed ones a group at a time.
"""

import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from dsv4_eqx.kernels.activation import activate
from dsv4_eqx.numerics.lora_weight import as_arrays, pull_back
from dsv4_eqx.numerics.precision import wide_dtype
from dsv4_eqx.numerics.quantized_weight import is_quantized

# Rows in a block, as many large ones as fit first. Small blocks waste fewer rows at a
# group's end, large ones multiply faster and add to the weights' gradient less often.
_BLOCKS: Final = (128, 32)
# Where groups have hardly more on average, as in decoding. A product with a vector
# reads the matrix as it lies; with more of them, XLA on CPU rearranges it first.
_FEW: Final = 8
_BLOCKS_OF_FEW: Final = (_FEW, 1)
_Index = Int[Array, ""] | int


class _Block(NamedTuple):
    """Consecutive rows, of which only those of one group, not yet done, are its own."""

    start: Int[Array, ""]
    is_own: Bool[Array, " block"]

    def take(self, x: Shaped[Array, "rows ..."]) -> Shaped[Array, "block ..."]:
        return lax.dynamic_slice_in_dim(x, self.start, self.is_own.shape[0])

    def put(self, x: Shaped[Array, "rows ..."], new: Array) -> Array:
        """`x` with the block's own rows replaced."""
        is_own = self.is_own.reshape(-1, *[1] * (new.ndim - 1))
        new = jnp.where(is_own, new, self.take(x))
        return lax.dynamic_update_slice_in_dim(x, new, self.start, 0)


def blocked_forward(rows, weights, gate_up, down, group_sizes, first, limit, keep=True):
    """The output and, to `keep` for the backward pass, what the activation is given."""

    def run_block(block, matrices, outputs, sums):
        gate_up, down = matrices
        before = _multiply(block.take(rows), gate_up)
        hidden = activate(before, block.take(weights), limit).astype(rows.dtype)
        new = (x.astype(rows.dtype) for x in (_multiply(hidden, down), before))
        return tuple(map(block.put, outputs, new)), sums

    widths = (rows.shape[1], gate_up.shape[1]) if keep else (rows.shape[1],)
    outputs = tuple(jnp.zeros_like(rows, shape=(len(rows), n)) for n in widths)
    return _over_filled_groups(run_block, (gate_up, down), first, group_sizes, outputs)


def _multiply(rows: Array, matrix: Array) -> Array:
    """Each row through the matrix, at least float32."""
    # Left to itself, XLA on CPU rounds this in blocks of some sizes and not of others.
    wide = wide_dtype(rows.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    if len(rows) == 1:
        return product("oi,i->o", matrix, rows[0])[None]
    return product("ri,oi->ro", rows, matrix)


def blocked_backward(rows, weights, gate_up, down, sizes, before, cotangent, limit):
    """Gradients of rows, weights and matrices; None for packed ones.

    Of a matrix with an adapter, the gradient is formed and reduced group by group.
    """
    run_activate = functools.partial(activate, limit=limit)

    def run_block(block, matrices, outputs, sums):
        gate_up, down = matrices
        d_out = jnp.where(block.is_own[:, None], block.take(cotangent), 0)
        hidden, pullback = jax.vjp(
            run_activate, block.take(before), block.take(weights)
        )
        d_hidden = jnp.einsum("ro,oh->rh", d_out, down)
        d_before, d_weights = pullback(d_hidden.astype(hidden.dtype))
        d_rows = jnp.einsum("rh,hi->ri", d_before, gate_up)
        hidden = hidden.astype(rows.dtype)
        d_gate_up, d_down = sums
        if d_gate_up is not None:
            d_gate_up += jnp.einsum("rh,ri->hi", d_before, block.take(rows))
        if d_down is not None:
            d_down += jnp.einsum("ro,rh->oh", d_out, hidden)
        outputs = tuple(map(block.put, outputs, (d_rows, d_weights)))
        return outputs, (d_gate_up, d_down)

    outputs = jnp.zeros_like(rows), jnp.zeros_like(weights)

    def run_group(outputs, group):
        own, start, end = group
        arrays = as_arrays(own)
        pairs = list(zip(own, arrays, strict=True))
        sums = [None if is_quantized(w) else jnp.zeros_like(x) for w, x in pairs]
        operands = arrays, start, end, outputs, tuple(sums), blocks
        outputs, sums = _over_blocks(run_block, *operands)
        return outputs, tuple(map(pull_back, own, sums))

    blocks = _block_sizes(len(rows), len(sizes))
    groups = (gate_up, down), *_bounds(sizes)
    outputs, sums = lax.scan(run_group, outputs, groups)
    return *outputs, *sums


def _bounds(
    group_sizes: Int[Array, " groups"],
) -> tuple[Int[Array, " groups"], Int[Array, " groups"]]:
    """Where each group's rows start and end."""
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends


def _over_filled_groups(
    run_block: Callable[..., tuple[PyTree, PyTree]],
    matrices: PyTree[Shaped[Array, "matrices ..."]],
    first: _Index,
    group_sizes: Int[Array, " groups"],
    outputs: PyTree[Shaped[Array, "rows ..."]],
) -> PyTree[Shaped[Array, "rows ..."]]:
    """`_over_blocks` over the groups that have rows: a decoded token reads no other
    matrices. The first group's matrix is number `first`.
    """
    filled = jnp.argsort(group_sizes == 0, stable=True)
    num_rows = len(jax.tree.leaves(outputs)[0])
    blocks = _block_sizes(num_rows, len(group_sizes))
    starts, ends = _bounds(group_sizes)

    def run_group(i, outputs):
        group = filled[i]
        own = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, first + group, keepdims=False),
            matrices,
        )
        own = as_arrays(own)
        start, end = starts[group], ends[group]
        return _over_blocks(run_block, own, start, end, outputs, (), blocks)[0]

    return lax.fori_loop(0, jnp.sum(group_sizes > 0), run_group, outputs)


def _block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Rows in the blocks that run one after another, the largest first."""
    *large, small = _BLOCKS_OF_FEW if num_rows <= _FEW * num_groups else _BLOCKS
    # A block of all rows is the same in every round: XLA would always run it once.
    return *(n for n in large if n < num_rows), min(small, num_rows)


def _over_blocks(
    run_block: Callable[..., tuple[PyTree, PyTree]],
    matrices: PyTree[Array],
    start: Int[Array, ""],
    end: Int[Array, ""],
    outputs: PyTree[Shaped[Array, "rows ..."]],
    sums: PyTree[Array],
    blocks: tuple[int, ...],
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Runs over one group's rows, a block at a time; returns the outputs and its sums.

    `run_block` takes a block, its group's matrices, the outputs and the group's sums,
    and returns the last two. `blocks` are rows in each: as many large ones as fit, then
    smaller ones, of which the last may have rows that are not the group's.
    """
    state = outputs, sums
    num_rows = jax.tree.leaves(outputs)[0].shape[0]
    for size in blocks:
        left = end - start
        count = -(-left // size) if size == blocks[-1] else left // size

        def run(i, state, first=start, size=size):
            first = first + i * size
            # The last block may reach back into rows that are done.
            begin = jnp.minimum(first, num_rows - size)
            index = begin + jnp.arange(size, dtype=begin.dtype)
            block = _Block(begin, (index >= first) & (index < end))
            return run_block(block, matrices, *state)

        state = lax.fori_loop(0, count, run, state)
        start = start + count * size
    return state
