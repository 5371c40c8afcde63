"""Grouped products on Hopper GPUs: rows sorted by group, each times its group's matrix.

Two Pallas (Mosaic GPU) kernels. `grouped_matmul` contracts either dimension of matrices
that lie `[matrices, out, in]`; `grouped_outer` sums the outer products of each group's
rows, which is the gradient of such matrices.

What is to be done is worked out ahead by XLA, as a small array. A tile of rows starts
where its group starts, not at a multiple of the tile: a group of 96 rows is one tile
of 128. A subtile of 64 rows, what one warpgroup multiplies, does not end past its
group if this has as many rows: the last one starts earlier instead and shares rows
with the one before. Both write the same numbers to them.

    rows     0         64   106  128      170          300
    group    |----------- 170 rows ---------|-- 130 rows --|
    subtiles |---------|---------|
                            |---------------|
"""

import itertools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsv4_eqx.kernels.hopper_tiles import (
    CHUNK,
    SUBTILE,
    Place,
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
    two_views,
)

# Rows that are copied for a group that has no more.
_FEW: Final = 16


def default_tiles(rows: int, groups: int) -> Tiles:
    """For so many rows in so many groups of about the same size."""
    # With few rows all that counts is how fast matrices are read.
    if rows <= groups:
        return Tiles(block_m=64, block_n=64, stages=12, warpgroups=1)
    if rows <= 48 * groups:
        return Tiles(block_m=64, block_n=128, stages=8)
    return Tiles()


def grouped_matmul(
    rows: Float[Array, "rows channels"],
    matrices: Float[Array, "matrices out in"],
    group_sizes: Int[Array, " groups"],
    *,
    first: Int[Array, ""] | int = 0,
    transposed: bool = False,
    tiles: Tiles | None = None,
    interpret: Any = None,  # parameters of Pallas's interpreter, for tests
) -> Float[Array, "rows other_channels"]:
    """Each row times its group's matrix; 0 for rows past the last group.

    Rows are sorted by group; the first group's matrix is number `first`, and others are
    not read. If transposed, rows have `out` channels and come to have `in`.
    """
    columns, depth = matrices.shape[1:][::-1] if transposed else matrices.shape[1:]
    check_operands("grouped_matmul", rows, matrices, (columns, depth))
    if rows.shape[1] != depth:
        raise ValueError(
            f"grouped_matmul was called with rows of shape {rows.shape}: matrices of "
            f"shape {matrices.shape} take {depth} channels."
        )
    count, dtype = len(rows), rows.dtype
    if count == 0:
        return jnp.zeros_like(rows, shape=(0, columns))
    tiles = tiles or default_tiles(count, len(group_sizes))
    tiles = tiles.fitted(columns, depth)
    rows = padded(rows, SUBTILE)
    schedule = _schedule(group_sizes, len(rows), first, tiles.block_m)

    def body(*refs, **buffers):
        refs = _Refs(*refs, **buffers)
        views = {name: Views.of(getattr(refs, name), interpret) for name in two}
        refs = refs._replace(**views)
        work = _work(refs, tiles, transposed)
        run(work, refs.loaded, refs.freed, tiles, interpret)

    chunks = tiles.block_k // CHUNK
    two = {
        "left": (tiles.stages, tiles.row_warpgroups, chunks, SUBTILE, CHUNK),
        "results": (tiles.warpgroups, tiles.stores, SUBTILE, CHUNK),
    }
    block = (tiles.block_n, tiles.block_k)
    buffers = {
        **{name: two_views(shape, dtype, interpret) for name, shape in two.items()},
        "right": buffer((tiles.stages, *(block[::-1] if transposed else block)), dtype),
        **barriers(tiles, copies=1 + tiles.row_warpgroups * chunks),
    }
    result = jax.ShapeDtypeStruct((len(rows), columns), dtype)
    kernel = kernel_of(body, "grouped_matmul", result, buffers, tiles, interpret)
    return kernel(schedule, rows, matrices)[:count]


class _Tile(NamedTuple):
    """A tile of rows: a column of the schedule.

    Of the warpgroups below each other, number w copies from row `load + 64 w`, at most
    from `last`. In a group of fewer than 64 rows, there is one, and `offset` of the
    rows that it copies come before the group's.
    """

    matrix: Array  # -1 for rows past the last group
    load: Array
    last: Array
    offset: Array
    size: Array  # of the group, at most 64
    num_tiles: Array  # that there are, in every column


def _schedule(
    sizes: Int[Array, " groups"], num_rows: int, first: Array | int, block_m: int
) -> Int[Array, "fields tiles"]:
    """The tiles of all groups, one after the other; three launches."""
    sizes = sizes.astype(jnp.int32)
    tiles = _num_tiles(sizes, block_m)
    ends, tile_ends = running_sums(jnp.stack([sizes, tiles]))
    # What is past the last group is like one more, whose matrix is 0.
    past = num_rows - ends[-1]
    filled = min(num_rows, len(sizes) + 1)
    tile = jnp.arange((num_rows + filled * (block_m - 1)) // block_m, dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= tile_ends[None], axis=1, dtype=jnp.int32)
    is_past = group == len(sizes)
    group = jnp.minimum(group, len(sizes) - 1)
    end = jnp.where(is_past, num_rows, ends[group])
    size = jnp.where(is_past, past, sizes[group])
    begin = end - size
    tile_begin = jnp.where(is_past, tile_ends[-1], (tile_ends - tiles)[group])
    is_whole = size >= SUBTILE
    # Copies end within the rows.
    few = jnp.minimum(begin, num_rows - jnp.where(size <= _FEW, _FEW, SUBTILE))
    fields = _Tile(
        matrix=jnp.where(is_past, -1, first + group),
        load=jnp.where(is_whole, begin + (tile - tile_begin) * block_m, few),
        last=jnp.where(is_whole, end - SUBTILE, few),
        offset=jnp.where(is_whole, 0, begin - few),
        size=jnp.minimum(size, SUBTILE),
        num_tiles=jnp.full_like(tile, tile_ends[-1] + _num_tiles(past, block_m)),
    )
    return jnp.stack([x.astype(jnp.int32) for x in fields])


def _num_tiles(rows: Array, block_m: int) -> Array:
    return lax.div(rows + (block_m - 1), jnp.int32(block_m))


class _Refs(NamedTuple):
    """What the kernel reads and writes."""

    schedule: Any
    rows: Any
    matrices: Any
    out: Any
    left: Any
    right: Any
    results: Any
    loaded: Any
    freed: Any


def _work(refs: _Refs, tiles: Tiles, transposed: bool) -> Work:
    across = refs.out.shape[1] // tiles.block_n
    depth = refs.rows.shape[1] // tiles.block_k
    chunks = tiles.block_k // CHUNK
    place = place_of(tiles)

    def plan(item):
        # Tiles beside each other run at the same time, and so do those of a group:
        # each reads from the cache what the others have read.
        tile, column = lax.div(item, across), lax.rem(item, across)
        tile = _Tile(*(refs.schedule[i, tile] for i in range(len(_Tile._fields))))
        steps = jnp.where(tile.matrix < 0, 0, depth)
        return (tile, column * tiles.block_n), steps

    def load(item, k, slot):
        tile, column = item
        channel = k * tiles.block_k
        _load_rows(refs, tile, channel, slot, chunks)
        channels = pl.ds(channel, tiles.block_k)
        columns = pl.ds(column, tiles.block_n)
        block = (channels, columns) if transposed else (columns, channels)
        source = refs.matrices.at[(tile.matrix, *block)]
        plgpu.copy_gmem_to_smem(source, refs.right.at[slot], refs.loaded.at[slot])

    def multiply(acc, item, k, slot):
        for chunk in range(chunks):
            left = refs.left.tiled.at[slot, place.row, chunk]
            channels = pl.ds(chunk * CHUNK, CHUNK)
            if transposed:
                right = refs.right.at[slot, channels, place.columns]
            else:
                right = refs.right.at[slot, place.columns, channels]
                right = right.transpose((1, 0))
            plgpu.wgmma(acc, left, right)

    def write(item, result):
        tile, column = item
        _store_rows(refs, tile, column + place.column, result, place)

    items = refs.schedule[_Tile._fields.index("num_tiles"), 0] * across
    return Work(items, plan, load, multiply, write, products=chunks)


def _load_rows(refs: _Refs, tile: _Tile, channel: Array, slot: Array, chunks: int):
    """Starts the copies of a tile's rows: few, if it has only few."""
    row_warpgroups = refs.left.rows.shape[1]

    def load(count):
        for i, chunk in itertools.product(range(row_warpgroups), range(chunks)):
            rows = pl.ds(jnp.minimum(tile.load + i * SUBTILE, tile.last), count)
            channels = pl.ds(channel + chunk * CHUNK, CHUNK)
            to = refs.left.rows.at[slot, i, chunk, pl.ds(0, count)]
            source = refs.rows.at[rows, channels]
            plgpu.copy_gmem_to_smem(source, to, refs.loaded.at[slot])

    # The rest keeps what it was: it makes rows that are not written.
    pl.when(tile.size <= _FEW)(lambda: load(_FEW))
    pl.when(tile.size > _FEW)(lambda: load(SUBTILE))


def _store_rows(refs: _Refs, tile: _Tile, column: Array, result: Array, place: Place):
    """Writes what a warpgroup has multiplied."""
    start = tile.load + place.row * SUBTILE
    buffers = Views(*(x.at[place.warpgroup] for x in refs.results))
    # Of two subtiles that would be the same, one is written.
    is_new = start < tile.last + SUBTILE
    is_whole = tile.size == SUBTILE

    @pl.when(is_new & is_whole)
    def _():
        rows = pl.ds(jnp.minimum(start, tile.last), SUBTILE)
        store(refs.out.at[rows], column, result, buffers)

    @pl.when(is_new & jnp.logical_not(is_whole))
    def _():
        _store_few(refs.out, tile, column, result, buffers)


def _store_few(out: Any, tile: _Tile, column: Array, result: Array, buffers: Views):
    """Writes the rows of a group that has less than a subtile."""
    width = buffers.tiled.shape[-1]
    result = result.astype(out.dtype)
    for i in range(result.shape[1] // width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffers.tiled[0] = result[:, i * width : (i + 1) * width]
        plgpu.commit_smem()
        columns = pl.ds(column + i * width, width)
        done = tile.offset
        # A copy's size is fixed: there is one for each power of two.
        for count in (32, 16, 8, 4, 2, 1):

            @pl.when(tile.size & count != 0)
            def _(count=count, done=done, columns=columns):
                source = buffers.rows.at[0, pl.ds(done, count)]
                rows = pl.ds(tile.load + done, count)
                plgpu.copy_smem_to_gmem(source, out.at[rows, columns])

            done = done + (tile.size & count)
