"""The indexer's scores on Hopper GPUs: paper section 2.3.1, eq. 16.

One Pallas (Mosaic GPU) kernel. A block of entries stays in registers, while one query
after another comes through a ring of buffers in shared memory. Products are transposed,
entries x heads, so that the sum over heads runs along rows, within a few threads. One
warpgroup copies. The others have some of the block's entries each, and while one adds
up its products, another multiplies.

As many programs run as there are multiprocessors. The work is cut into items: a tile of
queries and a block of entries. Each tile has as many items as have entries that one of
its queries sees, so a program takes every n-th of those and finds by halves which tile
an item belongs to.

    tile     0    1       2            3
    starts   0    1       3            6               10
    items    |0   |1  2   |3   4   5   |6   7   8   9  |
"""

import dataclasses
import math
from typing import Any, Final

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dsv4_eqx.kernels.batching import one_by_one
from dsv4_eqx.kernels.hopper_scores_kernel import (
    SWIZZLED,
    Sizes,
    Tiles,
    scores_kernel,
)
from dsv4_eqx.numerics.varying import match_varying

# Columns of a product to aim at, where there are fewer heads.
_COLUMNS: Final = 64
# Programs may use so much of a multiprocessor's memory. There are 227 KiB.
_MEMORY: Final = 224 * 1024
# Registers of a thread that multiplies, besides those of operands and results.
_OTHER_REGISTERS: Final = 32


def default_tiles(batch: int, queries: int, num_entries: int) -> Tiles:
    """For so many queries and entries of each batch row."""
    # Few queries: what counts is how fast entries are read.
    if queries <= 16:
        return Tiles(queries=16, stages=3, key_slots=2)
    # Short items, where there are so few that some programs would have one more.
    if batch * queries * num_entries <= 1 << 23:
        return Tiles(queries=16)
    return Tiles()


def index_scores(
    queries: Float[Array, "batch queries index_heads index_dim"],
    weights: Float32[Array, "batch queries index_heads"],
    keys: Float[Array, "rows index_dim"],
    first_rows: Int[Array, " batch"],
    num_entries: int,
    num_seen: Int[Array, "batch queries"],
    *,
    tiles: Tiles | None = None,
    interpret: Any = None,  # parameters of Pallas's interpreter, for tests
) -> Float32[Array, "batch queries {num_entries}"]:
    """Each entry's sum over heads of weight x relu(query . key).

    Queries are 16-bit floats of a multiple of 8 heads, of 64 channels. Each batch row's
    `num_entries` keys lie one after the other, from `first_rows` on. A query sees no
    more than the first `num_seen` of them. Blocks of entries that no query of a tile
    sees are left as memory was: anything, NaN too. Mask by `jnp.where`.
    """
    _check(queries, keys)
    batch, count, heads, dim = queries.shape
    if 0 in (batch, count, num_entries):
        return jnp.zeros_like(weights, shape=(batch, count, num_entries))
    tiles = tiles or default_tiles(batch, count, num_entries)
    sizes = _sizes(queries, num_entries, tiles, bool(interpret))
    queries = _padded(queries, 1, sizes.num_queries)
    weights = _padded(weights, 1, sizes.num_queries)
    # The interpreter of jax 0.10 copies whole blocks only; the TMA needs one.
    tiles = sizes.tiles
    keys = _padded(keys, 0, len(keys) + tiles.block if interpret else tiles.rows)
    operands = (
        _starts(num_seen, sizes),
        first_rows.astype(jnp.int32),
        queries.reshape(batch, -1, dim),
        weights,
        keys,
    )
    scores = one_by_one(scores_kernel(sizes, operands, interpret))(*operands)
    scores = match_varying(scores, *operands)[0]
    return scores[:, :count, :num_entries]


def _check(queries: Array, keys: Array) -> None:
    heads, dim = queries.shape[2:]
    is_half = queries.dtype in (jnp.bfloat16, jnp.float16)
    if not is_half or queries.dtype != keys.dtype:
        raise ValueError(
            f"index_scores was called with {queries.dtype} and {keys.dtype}: both must "
            "be bfloat16 or both float16."
        )
    if heads % 8 or heads > 128 or dim % SWIZZLED:
        raise ValueError(
            f"index_scores was called with queries of shape {queries.shape}: heads "
            "must be a multiple of 8, at most 128, and channels one of 64."
        )


def _padded(x: Array, axis: int, size: int) -> Array:
    """With zeros at the end of an axis that is shorter."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(size - x.shape[axis], 0))
    return jnp.pad(x, widths) if x.shape[axis] < size else x


def _sizes(queries: Array, num_entries: int, tiles: Tiles, interprets: bool) -> Sizes:
    batch, count, heads, dim = queries.shape
    step = max(1, _COLUMNS // heads)
    # A tile's weights are copied by 128 threads, each the same number of bytes.
    unit = math.lcm(step, 32 // math.gcd(32, heads))
    whole = -(-min(tiles.queries, count) // unit) * unit
    tiles = _fitted(tiles, whole, step, heads, dim)
    # Copies leave out what is past an array's end, if its rows are multiples of 16
    # bytes and it is not smaller than what is copied. Only the interpreter of jax 0.10
    # does not.
    width = max(-(-num_entries // 4) * 4, tiles.rows)
    if interprets:
        width = -(-width // tiles.block) * tiles.block
        count = -(-count // whole) * whole
    return Sizes(
        batch=batch,
        num_queries=max(count, whole),
        heads=heads,
        dim=dim,
        num_entries=num_entries,
        width=width,
        step=step,
        tiles=tiles,
        interprets=interprets,
    )


def _fitted(tiles: Tiles, queries: int, step: int, heads: int, dim: int) -> Tiles:
    """With no more warpgroups and stages than there are registers and memory for."""
    columns = step * heads
    # Two 16-bit keys in a register; a thread has weights for a quarter of the columns.
    operands = tiles.rows * (dim // 2 + columns) // 128 + heads // 4
    tiles = dataclasses.replace(tiles, queries=queries)
    while tiles.warpgroups > 1 and tiles.registers < operands + _OTHER_REGISTERS:
        tiles = dataclasses.replace(tiles, warpgroups=tiles.warpgroups - 1)
    keys = 2 * tiles.key_slots * tiles.block * dim
    scores = 4 * tiles.stores * queries * tiles.block
    weights = 4 * tiles.weight_slots * queries * heads
    stages = (_MEMORY - keys - scores - weights) // (2 * columns * dim)
    if stages < 1:
        raise ValueError(
            f"index_scores was called with queries of {heads} heads and {dim} "
            f"channels: {tiles} do not fit into shared memory."
        )
    return dataclasses.replace(tiles, stages=min(tiles.stages, stages))


def _starts(
    num_seen: Int[Array, "batch queries"], sizes: Sizes
) -> Int[Array, " tiles_and_end"]:
    """The first item of each tile of queries, and the number of all items."""
    seen = jnp.minimum(num_seen.astype(jnp.int32), sizes.num_entries)
    seen = _padded(seen, 1, sizes.query_tiles * sizes.tiles.queries)
    seen = jnp.max(seen.reshape(sizes.num_tiles, -1), axis=1)
    items = (jnp.maximum(seen, 0) + sizes.tiles.block - 1) // sizes.tiles.block
    return jnp.pad(jnp.cumsum(items, dtype=jnp.int32), (1, 0))
