"""What a program of `hopper_attention` does: tiles of 64 heads, one after another.

Three warpgroups work on a tile. One gathers blocks of 64 keys. Each of the others
computes the scores and the softmax of the whole tile, and then its own half of the
output's channels: only the tile's memory binds them together. The first keys of the
next tile are on their way while the output of the last is written.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dsv4_eqx.kernels.hopper_gather import (
    BLOCK,
    block_shape,
    finish_gather,
    opaque_zero,
    read_indices,
    start_gather,
)
from dsv4_eqx.numerics.varying import shape_varying_like

# Heads in a tile: the rows of one product.
HEADS: Final = 64
# Multiprocessors of a Hopper GPU: a program fills one.
PROGRAMS: Final = 132
# Blocks of keys in shared memory: two and the queries are nearly all there is.
_SLOTS: Final = 2
# Warpgroups 0 and 1 compute. 2 x 232 + 40 registers are the 3 x 168 that a program is
# launched with: with more, it would wait for them forever.
GATHERER: Final = 2
COMPUTING_REGISTERS: Final = 232
GATHERING_REGISTERS: Final = 40
LOG2_E: Final = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known of a call before it runs; heads and channels are padded."""

    num_queries: int
    tiles: int
    head_dim: int
    splits: int
    split_blocks: int
    dtype: np.dtype
    log2_scale: float
    num_programs: int
    interprets: bool

    @property
    def half(self):
        """Channels of the output that a warpgroup computes."""
        return self.head_dim // 2

    @property
    def num_pieces(self):
        """Of the work: each is a tile and a part of its query's list."""
        return self.num_queries * self.tiles * self.splits

    @property
    def programs(self):
        """That share the work."""
        return min(self.num_programs, self.num_pieces)

    def own_piece(self, i):
        """A program's i-th piece."""
        return lax.axis_index("program") + i * self.programs

    def num_own_pieces(self):
        """How many a program has."""
        left = self.num_pieces - lax.axis_index("program")
        return lax.div(left + (self.programs - 1), self.programs)

    def place(self, piece):
        """Query, first head and part of the list."""
        rest, head = lax.div(piece, self.tiles), lax.rem(piece, self.tiles) * HEADS
        return lax.div(rest, self.splits), head, lax.rem(rest, self.splits)

    def blocks(self, num_keys, split):
        """The first block of a part of a list, and the number of those with keys."""
        first = split * self.split_blocks
        end = lax.div(num_keys + (BLOCK - 1), BLOCK)
        return first, jnp.clip(end - first, 0, self.split_blocks)


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to global memory, to shared memory, and to barriers there."""

    queries: Any
    window: Any
    entries: Any
    lists: Any
    num_keys: Any
    out: Any
    log_total: Any
    # The queries of a tile, then its output; the halves of the channels.
    tile: Any
    tile_log_total: Any
    keys: Any
    bias: Any
    tile_filled: Any
    tile_read: Any
    filled: Any
    freed: Any


def lists_kernel(
    sizes: Sizes, operands: tuple[Array, ...], interpret: Any
) -> Callable[..., list[Array]]:
    """From what global memory holds, in the order of `_Memory`, to its outputs."""
    rows = sizes.num_queries * sizes.splits
    heads = sizes.tiles * HEADS
    # Parts of an output are not rounded before they are summed.
    dtype = sizes.dtype if sizes.splits == 1 else jnp.float32
    form = functools.partial(block_shape, dtype=sizes.dtype, interpret=sizes.interprets)
    return plgpu.kernel(
        lambda *references: _program(sizes, _Memory(*references)),
        out_type=[
            shape_varying_like((rows, heads, sizes.head_dim), dtype, *operands),
            shape_varying_like((rows, heads), jnp.float32, *operands),
        ],
        scratch_types=[
            form(2, sizes.half),
            plgpu.SMEM((HEADS,), jnp.float32),
            form(_SLOTS, sizes.head_dim),
            plgpu.SMEM((_SLOTS, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=_SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
        ],
        grid=(sizes.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        kernel_name="attend_lists",
    )


def _program(sizes, memory):
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == GATHERER)
    def _():
        plgpu.set_max_registers(GATHERING_REGISTERS, action="decrease")
        _gather(sizes, memory)

    @pl.when(warpgroup < GATHERER)
    def _():
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        _attend(sizes, memory, warpgroup)


def _gather(sizes, memory):
    """Fills the blocks of keys in turn, for all pieces of a program."""

    def gather_piece(i, num_before):
        query, _, split = sizes.place(sizes.own_piece(i))
        first, num_blocks = sizes.blocks(memory.num_keys[query], split)

        def indices(j):
            block = memory.lists.at[query, pl.ds((first + j) * BLOCK, BLOCK)]
            return read_indices(block, interpret=sizes.interprets)

        def gather_block(j, own):
            slot = lax.rem(num_before + j, _SLOTS)

            @pl.when(num_before + j >= _SLOTS)
            def _():
                plgpu.barrier_wait(memory.freed.at[slot])

            start_gather(
                own,
                memory.window,
                memory.entries,
                memory.keys.at[slot],
                memory.bias.at[slot],
                interpret=sizes.interprets,
            )
            following = indices(jnp.minimum(j + 1, num_blocks - 1))
            # Two slots: there is no room for another block before this one is used.
            finish_gather(interpret=sizes.interprets)
            plgpu.barrier_arrive(memory.filled.at[slot])
            return following

        lax.fori_loop(0, num_blocks, gather_block, indices(0))
        return num_before + num_blocks

    num_blocks = lax.fori_loop(0, sizes.num_own_pieces(), gather_piece, 0)
    for slot in range(_SLOTS):

        @pl.when(num_blocks > slot)
        def _():
            plgpu.barrier_wait(memory.freed.at[slot])


def _attend(sizes, memory, warpgroup):
    """Scores and half of the output of all pieces of a program."""
    half, count = sizes.half, sizes.num_own_pieces()

    def in_array(array, piece):
        query, head, split = sizes.place(piece)
        place = query if array is memory.queries else query * sizes.splits + split
        return array.at[place, pl.ds(head, HEADS), pl.ds(warpgroup * half, half)]

    def read_queries(i):
        queries = in_array(memory.queries, sizes.own_piece(i))
        own = memory.tile.at[warpgroup]
        plgpu.copy_gmem_to_smem(queries, own, memory.tile_filled)

    def attend_piece(i, num_before):
        query, head, split = sizes.place(sizes.own_piece(i))
        _, num_blocks = sizes.blocks(memory.num_keys[query], split)
        plgpu.barrier_wait(memory.tile_filled)
        step = functools.partial(_attend_block, sizes, memory, warpgroup, num_before)
        out, top, total = lax.fori_loop(0, num_blocks, step, _nothing_seen(sizes))
        out *= _rows(jnp.where(total > 0, 1 / total, 0), out)
        # The other warpgroup still reads the queries that lie where the output goes.
        plgpu.barrier_arrive(memory.tile_read)
        plgpu.barrier_wait(memory.tile_read)
        to = in_array(memory.out, sizes.own_piece(i))
        if sizes.splits == 1:
            memory.tile[warpgroup] = out.astype(sizes.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory.tile.at[warpgroup], to)
        else:
            to[...] = out

        @pl.when(warpgroup == 0)
        def _():
            memory.tile_log_total[...] = top / LOG2_E + jnp.log(total)
            plgpu.commit_smem()
            row = query * sizes.splits + split
            to = memory.log_total.at[row, pl.ds(head, HEADS)]
            plgpu.copy_smem_to_gmem(memory.tile_log_total, to)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(i + 1 < count)(lambda: read_queries(i + 1))
        return num_before + num_blocks

    read_queries(0)
    lax.fori_loop(0, count, attend_piece, 0)


def _nothing_seen(sizes):
    """Output before division, greatest score and total of a tile that saw no keys."""
    out = jnp.zeros((HEADS, sizes.half), jnp.float32)
    top, total = jnp.full(HEADS, -jnp.inf), jnp.zeros(HEADS)
    if sizes.interprets:
        return out, top, total
    of_row = plgpu.Layout.WGMMA.reduce(1)
    layouts = plgpu.Layout.WGMMA, of_row, of_row
    return tuple(map(plgpu.layout_cast, (out, top, total), layouts))


def _attend_block(sizes, memory, warpgroup, num_before, j, seen):
    """A block more. Scores are multiplied by log2(e), for `exp2`."""
    out, top, total = seen
    slot = lax.rem(num_before + j, _SLOTS)
    plgpu.barrier_wait(memory.filled.at[slot])
    zero = jnp.int32(0) if sizes.interprets else opaque_zero()
    products = products_with_keys(sizes, memory.tile, memory.keys, slot, zero)
    scores = products * sizes.log2_scale
    scores += _bias(sizes, memory, slot, scores)
    top_before = top
    top = jnp.maximum(top, jnp.max(scores, axis=1))
    # No key yet: -inf minus -inf would be no number.
    finite = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(scores - _rows(finite, scores))
    shrink = jnp.exp2(top_before - finite)
    total = total * shrink + jnp.sum(weights, axis=1)
    out *= _rows(shrink, out)
    own = memory.keys.at[slot, :, pl.ds(warpgroup * sizes.half, sizes.half)]
    out = add_product(sizes, out, weights.astype(sizes.dtype), own)
    plgpu.barrier_arrive(memory.freed.at[slot])
    return out, top, total


def _rows(x, like):
    """A number for each row, in all columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _bias(sizes, memory, slot, like):
    """0 in the columns of keys, -inf in others."""
    bias, layout = memory.bias[slot], plgpu.Layout.WGMMA.reduce(0)
    bias = bias if sizes.interprets else plgpu.layout_cast(bias, layout)
    return lax.broadcast_in_dim(bias, like.shape, [1])


def products_with_keys(sizes, tile, keys, slot, zero):
    """Of a tile, in halves of the channels, and a block of keys, in float32."""
    if sizes.interprets:
        both = jnp.concatenate([tile[0], tile[1]], axis=1)
        return product(both, keys[slot].T)

    def multiply(products):
        for i in range(2):
            channels = pl.ds(i * sizes.half, sizes.half)
            right = keys.at[slot, :, channels].transpose((1, 0))
            plgpu.wgmma(products, tile.at[i + zero], right)
        return products[...]

    return pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((HEADS, BLOCK), jnp.float32)
    )


def add_product(sizes, total, left, right):
    """`total` and a product, whose right side is a reference."""
    if sizes.interprets:
        return total + product(left[...], right[...])

    def multiply(products):
        plgpu.wgmma(products, left, right)

    return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(total))


def product(left, right):
    """In float32: the interpreter's."""
    return jnp.dot(left, right, precision="highest", preferred_element_type="float32")
