"""On Hopper GPUs, the sums of outer products of each group's rows.

See `hopper_grouped`. Rows are what is summed over here, so that rows of other groups,
which share a group's first and last block, have to be cleared.
"""

import dataclasses
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_eqx.kernels.hopper_tiles import (
    SUBTILE,
    Tiles,
    Views,
    Work,
    barriers,
    buffer,
    check_operands,
    kernel_of,
    padded,
    place_of,
    run,
    running_sums,
    store,
)

# Groups have few blocks of rows: results are written most of the time.
_DEFAULT_TILES: Final = Tiles(stages=3, stores=4)


def grouped_outer(
    left: Float[Array, "rows left_channels"],
    right: Float[Array, "rows right_channels"],
    group_sizes: Int[Array, " groups"],
    *,
    dtype: DTypeLike | None = None,
    tiles: Tiles | None = None,
    interpret: Any = None,  # parameters of Pallas's interpreter, for tests
) -> Float[Array, "groups left_channels right_channels"]:
    """For each group the sum over its rows of left x right, 0 if it has none.

    Rows are sorted by group. Past the last group, those of `right` must be finite;
    those of `left` are not used. `block_m` of the tiles is of the channels of `left`.
    """
    sizes = left.shape[1], right.shape[1]
    check_operands("grouped_outer", left, right, sizes)
    if len(left) != len(right):
        raise ValueError(
            f"grouped_outer was called with {len(left)} and {len(right)} rows: they "
            "must be as many."
        )
    to_dtype = jnp.dtype(left.dtype if dtype is None else dtype)
    result = jax.ShapeDtypeStruct((len(group_sizes), *sizes), to_dtype)
    if len(left) == 0:
        return jnp.zeros_like(left, shape=result.shape, dtype=to_dtype)
    tiles = tiles or _DEFAULT_TILES
    if sizes[0] % tiles.block_m:
        tiles = dataclasses.replace(tiles, block_m=SUBTILE, warpgroups=1)
    # A warpgroup clears rows in its part of `left`, which no other may read.
    assert tiles.column_warpgroups == 1
    tiles = tiles.fitted(sizes[1], tiles.block_k)

    def body(*refs, **buffers):
        refs = _Refs(*refs, **buffers)
        run(_work(refs, tiles), refs.loaded, refs.freed, tiles, interpret)

    block_k, stages = tiles.block_k, tiles.stages
    results = tiles.warpgroups, tiles.stores, SUBTILE, 128 // to_dtype.itemsize
    buffers = {
        "left_ring": buffer((stages, block_k, tiles.block_m), left.dtype),
        "right_ring": buffer((stages, block_k, tiles.block_n), left.dtype),
        "results": buffer(results, to_dtype),
        **barriers(tiles, copies=2),
    }
    kernel = kernel_of(body, "grouped_outer", result, buffers, tiles, interpret)
    group_sizes = group_sizes.astype(jnp.int32)
    ends = running_sums(group_sizes)
    left, right = padded(left, block_k, unit=8), padded(right, block_k, unit=8)
    return kernel(ends - group_sizes, ends, left, right)


class _Refs(NamedTuple):
    """What the kernel reads and writes."""

    starts: Any
    ends: Any
    left: Any
    right: Any
    out: Any
    left_ring: Any
    right_ring: Any
    results: Any
    loaded: Any
    freed: Any


class _Tile(NamedTuple):
    """A tile of a group's sum."""

    group: Array
    start: Array
    end: Array
    row: Array
    column: Array


def _work(refs: _Refs, tiles: Tiles) -> Work:
    groups, height, width = refs.out.shape
    down, across = height // tiles.block_m, width // tiles.block_n
    block_k = tiles.block_k
    place = place_of(tiles)

    def plan(item):
        group, tile = lax.div(item, down * across), lax.rem(item, down * across)
        start, end = refs.starts[group], refs.ends[group]
        row = lax.div(tile, across) * tiles.block_m
        column = lax.rem(tile, across) * tiles.block_n
        size = jnp.where(start == end, 0, end - _aligned(start))
        steps = lax.div(size + block_k - 1, block_k)
        return _Tile(group, start, end, row, column), steps

    def first_copied(tile, k):
        # Copies start at multiples of 8 rows, and end within the rows.
        last = refs.left.shape[0] - block_k
        return jnp.minimum(_aligned(tile.start) + k * block_k, last)

    def load(tile, k, slot):
        rows = pl.ds(pl.multiple_of(first_copied(tile, k), 8), block_k)
        for source, first, size, ring in (
            (refs.left, tile.row, tiles.block_m, refs.left_ring),
            (refs.right, tile.column, tiles.block_n, refs.right_ring),
        ):
            source = source.at[rows, pl.ds(first, size)]
            plgpu.copy_gmem_to_smem(source, ring.at[slot], refs.loaded.at[slot])

    def multiply(acc, tile, k, slot):
        left = refs.left_ring.at[slot, :, place.rows]
        copied = first_copied(tile, k)
        # Where the step before has ended, or the group begins.
        begin = jnp.maximum(tile.start, _aligned(tile.start) + k * block_k)

        @pl.when((begin > copied) | (tile.end < copied + block_k))
        def _():
            _keep(left, begin - copied, tile.end - copied)

        plgpu.wgmma(acc, left.transpose((1, 0)), refs.right_ring.at[slot])

    def write(tile, result):
        rows = pl.ds(tile.row + place.row * SUBTILE, SUBTILE)
        buffers = refs.results.at[place.warpgroup]
        out = refs.out.at[tile.group, rows]
        store(out, tile.column, result, Views(buffers, buffers))

    return Work(groups * down * across, plan, load, multiply, write)


def _keep(buffer: Any, begin: Array, end: Array) -> None:
    """Clears all but these rows."""
    row = plgpu.broadcasted_iota(jnp.int32, buffer.shape, 0, layout=plgpu.Layout.WGMMA)
    buffer[...] = jnp.where((row >= begin) & (row < end), buffer[...], 0)
    plgpu.commit_smem()


def _aligned(row: Array) -> Array:
    """The multiple of 8 at or before it."""
    return pl.multiple_of(lax.shift_left(lax.shift_right_logical(row, 3), 3), 8)
