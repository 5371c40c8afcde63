"""The experts' products: each row through the matrices of its own group.

Rows lie sorted by group. XLA's `ragged_dot` is the right thing on TPU; on CPU, and on
GPU as JAX lowers it by default, it multiplies every row by every matrix, so there a
loop takes its place that runs over the groups and, in each, over blocks of the rows
that it has. The choice is made here and nowhere else.
"""

import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from dsv4_eqx.primitives.packed import PackedWeight, is_packed, unpacked
from dsv4_eqx.primitives.precision import at_least_float32, wide_dtype
from dsv4_eqx.primitives.varying import alike

# Rows in a block, as many large ones as fit first. Small blocks waste fewer rows at a
# group's end, large ones multiply faster and add to the weights' gradient less often.
_BLOCKS: Final = (128, 32)
# Where groups have hardly more on average, as in decoding. A product with a vector
# reads the matrix as it lies; with more of them, XLA on CPU rearranges it first.
_FEW: Final = 8
_BLOCKS_OF_FEW: Final = (_FEW, 1)
_Index = Int[Array, ""] | int


def grouped_swiglu(
    rows: Float[Array, "rows dim"],
    weights: Float[Array, " rows"],
    gate_up: Float[Array, "matrices both_hidden dim"] | PackedWeight,
    down: Float[Array, "matrices dim hidden"] | PackedWeight,
    group_sizes: Int[Array, " groups"],
    limit: float,
    *,
    first: _Index = 0,
) -> Float[Array, "rows dim"]:
    """A clamped SwiGLU of each row with its group's matrices, times the row's weight.

    The weight is applied in float32, before `down`. Under `vmap` it works on CPU and
    outside `jit` alone, since `ragged_dot` does not batch: flatten the rows instead.

    **Arguments:**

    - `rows`: sorted by group; what lies past the last group gives finite values.
    - `weights`: of the rows.
    - `gate_up`, `down`: matrices of each group, the gate in the first half, and perhaps
        others that are not read. Packed ones are unpacked a group at a time and get no
        gradient.
    - `group_sizes`: rows of each group.
    - `limit`: as for `clamped_swiglu`.
    - `first`: which matrix is the first group's.
    """
    if rows.shape[0] == 0:
        return rows
    operands = rows, weights, gate_up, down, group_sizes, jnp.asarray(first)
    leaves, structure = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(structure, alike(*leaves))
    return _grouped_swiglu(*operands, limit)


def clamped_swiglu(
    gate_up: Float[Array, "*batch both_hidden"], limit: float
) -> Float[Array, "*batch hidden"]:
    """silu(min(gate, limit)) times the other half clipped to +-limit, float32.

    **Arguments:**

    - `gate_up`: the gate in the first half of the channels.
    - `limit`: `swiglu_limit`.
    """
    gate, up = jnp.split(at_least_float32(gate_up), 2, axis=-1)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _grouped_swiglu(rows, weights, gate_up, down, group_sizes, first, limit):
    def blocked(*operands):
        return _blocked_forward(*operands, limit=limit, keep=False)[0]

    def ragged(*operands):
        return _ragged_forward(*operands, limit=limit)[0]

    operands = rows, weights, gate_up, down, group_sizes, first
    return lax.platform_dependent(*operands, default=blocked, tpu=ragged)


def _forward(rows, weights, gate_up, down, group_sizes, first, limit):
    operands = rows, weights, gate_up, down, group_sizes, first
    out, before = lax.platform_dependent(
        *operands,
        default=lambda *operands: _blocked_forward(*operands, limit=limit),
        tpu=lambda *operands: _ragged_forward(*operands, limit=limit),
    )
    return out, (*operands, before)


def _backward(limit, residuals, cotangent):
    rows, weights, gate_up, down, group_sizes, first, before = residuals
    own = _of_groups((gate_up, down), first, len(group_sizes))
    d_rows, d_weights, *d_own = lax.platform_dependent(
        *(rows, weights, *own, group_sizes, before, cotangent),
        default=lambda *operands: _blocked_backward(*operands, limit=limit),
        tpu=lambda *operands: _ragged_backward(*operands, limit=limit),
    )
    d_matrices = [
        None if d is None else _among_all(d, first, matrices)
        for matrices, d in zip((gate_up, down), d_own)
    ]
    return d_rows, d_weights, *d_matrices, None, None


_grouped_swiglu.defvjp(_forward, _backward)


def _of_groups(matrices: PyTree, first: _Index, num_groups: int) -> PyTree:
    """The matrices that are some group's."""

    def take(x: Array) -> Array:
        if len(x) == num_groups:
            return x
        return lax.dynamic_slice_in_dim(x, first, num_groups)

    return jax.tree.map(take, matrices)


def _among_all(d_own: Array, first: _Index, matrices: Array) -> Array:
    """The gradient of all matrices, from that of those which are some group's."""
    if d_own.shape == matrices.shape:
        return d_own
    zeros = jnp.zeros_like(matrices)
    return lax.dynamic_update_slice_in_dim(zeros, d_own, first, 0)


def _activate(before, weights, limit):
    """What `down` multiplies, from what `gate_up` gave; float32."""
    hidden = clamped_swiglu(before, limit)
    return hidden * weights[:, None].astype(hidden.dtype)


def _ragged_forward(rows, weights, gate_up, down, group_sizes, first, limit):
    own = _of_groups((gate_up, down), first, len(group_sizes))
    gate_up, down = unpacked(own)
    before = lax.ragged_dot(rows, jnp.swapaxes(gate_up, 1, 2), group_sizes)
    hidden = _activate(before, weights, limit).astype(rows.dtype)
    return lax.ragged_dot(hidden, jnp.swapaxes(down, 1, 2), group_sizes), before


def _ragged_backward(rows, weights, gate_up, down, sizes, before, cotangent, limit):
    trained = not is_packed(gate_up), not is_packed(down)
    gate_up, down = unpacked((gate_up, down))
    past_end = jnp.arange(rows.shape[0]) >= jnp.sum(sizes)
    cotangent = jnp.where(past_end[:, None], 0, cotangent)
    activate = functools.partial(_activate, limit=limit)
    hidden, pullback = jax.vjp(activate, before, weights)
    d_hidden = lax.ragged_dot(cotangent, down, sizes)
    d_before, d_weights = pullback(d_hidden.astype(hidden.dtype))
    d_rows = lax.ragged_dot(d_before, gate_up, sizes)
    d_gate_up = _ragged_outer(d_before, rows, sizes) if trained[0] else None
    hidden = hidden.astype(rows.dtype)
    d_down = _ragged_outer(cotangent, hidden, sizes) if trained[1] else None
    return d_rows, d_weights, d_gate_up, d_down


def _ragged_outer(left, right, group_sizes):
    """For each group the sum over its rows of left x right."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(left, right, group_sizes, dimensions)


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


def _blocked_forward(
    rows, weights, gate_up, down, group_sizes, first, limit, keep=True
):
    """The output and, to `keep` for the backward pass, what the activation is given."""

    def run_block(block, matrices, outputs, sums):
        gate_up, down = matrices
        before = _multiply(block.take(rows), gate_up)
        hidden = _activate(before, block.take(weights), limit).astype(rows.dtype)
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


def _blocked_backward(rows, weights, gate_up, down, sizes, before, cotangent, limit):
    activate = functools.partial(_activate, limit=limit)

    def run_block(block, matrices, outputs, sums):
        gate_up, down = matrices
        d_out = jnp.where(block.is_own[:, None], block.take(cotangent), 0)
        hidden, pullback = jax.vjp(activate, block.take(before), block.take(weights))
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

    def zeros(matrices):
        return None if is_packed(matrices) else jnp.zeros_like(matrices[0])

    outputs = jnp.zeros_like(rows), jnp.zeros_like(weights)
    sums = zeros(gate_up), zeros(down)

    def run_group(outputs, group):
        own, start, end = group
        return _over_blocks(run_block, own, start, end, outputs, sums, blocks)

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
    """Runs over the groups that have rows: a decoded token reads no other matrices.

    **Arguments:** as for `_over_blocks`, of all groups; `group_sizes`: rows of each;
    `first`: which matrix is the first group's.
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
    """Runs over one group's rows, a block at a time.

    **Arguments:**

    - `run_block`: takes a block, its group's matrices, the outputs and the group's
        sums, and returns the last two.
    - `matrices`: of the group.
    - `start`, `end`: its rows.
    - `outputs`: what the blocks write their rows to.
    - `sums`: what the group starts from.
    - `blocks`: rows in each; as many large ones as fit, then smaller ones, of which
        the last may have rows that are not the group's.

    **Returns:** the outputs and the group's sums.
    """
    matrices = unpacked(matrices)
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
