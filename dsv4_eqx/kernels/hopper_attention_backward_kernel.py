"""What a program of `hopper_attention_backward` does: one tile of 64 heads.

Three warpgroups work on it. One gathers blocks of 64 keys, the first of the others
computes P and the second dS, which they exchange through shared memory, and then each
computes half of the channels of d_queries and d_keys:

    gathers     K0 ........... | K1 ........... | K2 ...
    P               S  P ..wait| d_queries | d_keys .. | S  P ...
    dS              dP .... dS | d_queries | d_keys .. | dP ...

Keys are free before d_keys, so that the next block arrives meanwhile.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_eqx.kernels.hopper_attention_kernel import (
    COMPUTING_REGISTERS,
    GATHERER,
    GATHERING_REGISTERS,
    HEADS,
    LOG2_E,
    add_product,
    product,
    products_with_keys,
)
from dsv4_eqx.kernels.hopper_gather import (
    BLOCK,
    block_shape,
    finish_gather,
    opaque_zero,
    read_indices,
    start_gather,
)
from dsv4_eqx.kernels.hopper_scatter import add_to_rows

# The two warpgroups that compute.
_WEIGHTS: Final = 0
_SCORES: Final = 1
# Channels of the keys' gradient that a warpgroup has in registers at a time.
_CHUNK: Final = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known of a call before it runs; heads, channels and lists are padded."""

    num_queries: int
    tiles: int
    head_dim: int
    num_keys: int
    dtype: np.dtype
    scale: float
    interprets: bool

    @property
    def half(self):
        """Channels of the gradients that a warpgroup computes."""
        return self.head_dim // 2

    @property
    def chunk(self):
        """Channels of the keys' gradient that it computes at a time."""
        return self.half if self.interprets else _CHUNK


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to global memory, to shared memory, and to barriers there."""

    queries: Any
    window: Any
    entries: Any
    lists: Any
    num_blocks: Any
    log2_sum: Any
    mean: Any
    d_out: Any
    # Where the gradients of keys are added, or, in the interpreter, one reference to
    # those of each query.
    d_keys: tuple[Any, ...]
    d_queries: Any
    # Each in halves of the channels.
    queries_tile: Any
    d_out_tile: Any
    keys: Any
    bias: Any
    # P and dS.
    weights: Any
    d_scores: Any
    tiles_filled: Any
    keys_filled: Any
    keys_freed: Any
    weights_filled: Any
    d_scores_filled: Any
    both_freed: Any


def memory_and_barriers(sizes: Sizes) -> dict[str, Any]:
    """What of `Memory` is a program's own."""
    tiles = functools.partial(
        block_shape, dtype=sizes.dtype, interpret=sizes.interprets
    )
    return {
        "queries_tile": tiles(2, sizes.half),
        "d_out_tile": tiles(2, sizes.half),
        "keys": tiles(1, sizes.head_dim),
        "bias": plgpu.SMEM((BLOCK,), jnp.float32),
        "weights": tiles(1, BLOCK),
        "d_scores": tiles(1, BLOCK),
        "tiles_filled": plgpu.Barrier(num_arrivals=4),
        "keys_filled": plgpu.Barrier(),
        "keys_freed": plgpu.Barrier(num_arrivals=2),
        "weights_filled": plgpu.Barrier(),
        "d_scores_filled": plgpu.Barrier(),
        "both_freed": plgpu.Barrier(),
    }


def differentiate_tile(sizes: Sizes, memory: Memory) -> None:
    """All that a program does."""
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    query, tile = lax.div(program, sizes.tiles), lax.rem(program, sizes.tiles)

    @pl.when(warpgroup == GATHERER)
    def _():
        plgpu.set_max_registers(GATHERING_REGISTERS, action="decrease")
        _gather(sizes, memory, query)

    for own in (_WEIGHTS, _SCORES):

        @pl.when(warpgroup == own)
        def _(own=own):
            plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
            _differentiate(sizes, memory, own, query, tile)


def _gather(sizes, memory, query):
    """Fills the block of keys time and again."""
    count = memory.num_blocks[query]

    def indices(block):
        part = memory.lists.at[query, pl.ds(block * BLOCK, BLOCK)]
        return read_indices(part, interpret=sizes.interprets)

    def gather_block(block, own):
        @pl.when(block > 0)
        def _():
            plgpu.barrier_wait(memory.keys_freed)

        rows = memory.window, memory.entries, memory.keys.at[0], memory.bias
        start_gather(own, *rows, interpret=sizes.interprets)
        following = indices(jnp.minimum(block + 1, count - 1))
        finish_gather(interpret=sizes.interprets)
        plgpu.barrier_arrive(memory.keys_filled)
        return following

    lax.fori_loop(0, count, gather_block, indices(0))


def _differentiate(sizes, memory, own, query, tile):
    """What the first or the second warpgroup computes of a tile."""
    heads = pl.ds(tile * HEADS, HEADS)
    halves = [pl.ds(i * sizes.half, sizes.half) for i in range(2)]
    if own == _WEIGHTS:
        source, tiled, of_heads = memory.queries, memory.queries_tile, memory.log2_sum
    else:
        source, tiled, of_heads = memory.d_out, memory.d_out_tile, memory.mean
    for i, channels in enumerate(halves):
        part = source.at[query, heads, channels]
        plgpu.copy_gmem_to_smem(part, tiled.at[i], memory.tiles_filled)
    of_heads = _load(sizes, of_heads.at[query, heads], plgpu.Layout.WGMMA.reduce(1))
    plgpu.barrier_wait(memory.tiles_filled)
    count = memory.num_blocks[query]

    def step(block, d_queries):
        part = memory.lists.at[query, pl.ds(block * BLOCK, BLOCK)]
        indices = _load(sizes, part, plgpu.Layout.WGMMA.reduce(1))
        zero = jnp.int32(0) if sizes.interprets else opaque_zero()
        _exchange(sizes, memory, own, of_heads, block, zero)
        own_keys = memory.keys.at[zero, :, halves[own]]
        d_scores, weights = memory.d_scores.at[zero], memory.weights.at[zero]
        d_queries = add_product(sizes, d_queries, d_scores, own_keys)
        is_last = block + 1 == count
        arrive = functools.partial(plgpu.barrier_arrive, memory.keys_freed)
        pl.when(jnp.logical_not(is_last))(arrive)
        for first in range(0, sizes.half, sizes.chunk):
            channels = pl.ds(first, sizes.chunk)
            pairs = (
                (weights, memory.d_out_tile.at[own + zero, :, channels]),
                (d_scores, memory.queries_tile.at[own + zero, :, channels]),
            )
            d_keys = _transposed_products(sizes, pairs)
            at = query, tile, block, own * sizes.half + first
            _add_to_rows(sizes, memory, indices, d_keys, at)
        if own == _SCORES:
            arrive = functools.partial(plgpu.barrier_arrive, memory.both_freed)
            pl.when(jnp.logical_not(is_last))(arrive)
        return d_queries

    d_queries = lax.fori_loop(0, count, step, _zeros(sizes, sizes.half))
    # All that reads this half of the queries any more was this warpgroup.
    own_tile = memory.queries_tile.at[own]
    own_tile[...] = d_queries.astype(sizes.dtype)
    plgpu.commit_smem()
    to = memory.d_queries.at[query, heads, halves[own]]
    plgpu.copy_smem_to_gmem(own_tile, to)
    plgpu.wait_smem_to_gmem(0)


def _exchange(sizes, memory, own, of_heads, block, zero):
    """Writes P or dS of a block, and waits for the other."""
    plgpu.barrier_wait(memory.keys_filled)
    tiled = memory.queries_tile if own == _WEIGHTS else memory.d_out_tile
    products = products_with_keys(sizes, tiled, memory.keys, zero, zero)
    of_heads = lax.broadcast_in_dim(of_heads, products.shape, [0])
    if own == _WEIGHTS:
        bias = _load(sizes, memory.bias, plgpu.Layout.WGMMA.reduce(0))
        bias = lax.broadcast_in_dim(bias, products.shape, [1])
        scores = products * (sizes.scale * LOG2_E) - of_heads + bias
        weights = jnp.exp2(scores).astype(sizes.dtype)

        # The other warpgroup still multiplied with the block before.
        @pl.when(block > 0)
        def _():
            plgpu.barrier_wait(memory.both_freed)

        memory.weights[zero] = weights
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.weights_filled)
        plgpu.barrier_wait(memory.d_scores_filled)
    else:
        plgpu.barrier_wait(memory.weights_filled)
        weights = _load(sizes, memory.weights.at[zero], plgpu.Layout.WGMMA)
        d_scores = weights.astype(jnp.float32) * (products - of_heads) * sizes.scale
        memory.d_scores[zero] = d_scores.astype(sizes.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.d_scores_filled)


def _load(sizes, ref, layout):
    if sizes.interprets:
        return ref[...]
    # Older ones have to be given an index.
    index = ((),) if jax.__version_info__ < (0, 11, 2) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _zeros(sizes, columns):
    """What products with 64 rows are added to."""
    zeros = jnp.zeros((HEADS, columns), jnp.float32)
    return zeros if sizes.interprets else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)


def _transposed_products(sizes, pairs):
    """Sum of the products of each left side's transpose and its right side."""
    if sizes.interprets:
        return sum(product(left[...].T, right[...]) for left, right in pairs)

    def multiply(products):
        for left, right in pairs:
            plgpu.wgmma(products, left.transpose((1, 0)), right)

    return pl.run_state(multiply)(
        plgpu.WGMMAAccumulatorRef.init(_zeros(sizes, sizes.chunk))
    )


def _add_to_rows(sizes, memory, indices, d_keys, at):
    """Adds some channels of a block's gradients to those of the keys, row by row."""
    query, tile, block, first = at
    if sizes.interprets:
        (kept,) = memory.d_keys
        rows, channels = pl.ds(block * BLOCK, BLOCK), pl.ds(first, sizes.chunk)
        kept[query, tile, rows, channels] = d_keys
        return
    window, entries = memory.d_keys
    add_to_rows(d_keys, indices, window, entries, first)
