"""What one program of the kernel for scores does; `hopper_scores` says what for.

A ring of slots in shared memory has two barriers for each slot: one that it is loaded,
one that it is free again. Queries have a ring, and blocks of entries. Weights have one
slot more than these: they are read until an item ends, while entries move into
registers as soon as it begins.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv4_eqx.kernels.hopper_tiles import computing_registers
from dsv4_eqx.numerics.varying import shape_varying_like

# Channels across which shared memory is laid out against bank conflicts.
SWIZZLED: Final = 64
# Of numbers in the registers of a warpgroup that multiplies.
_LAYOUT: Final = plgpu.Layout.WGMMA
# Multiprocessors of an H100 or H200. On another GPU this is only slower.
_PROGRAMS: Final = 132
_INTERPRETED_PROGRAMS: Final = 2
_LOADING_REGISTERS: Final = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How scores are cut up: what a benchmark tries out."""

    queries: int = 32  # of an item
    stages: int = 4  # queries that wait in shared memory, at most
    key_slots: int = 1  # blocks of entries that do, besides the one in registers
    stores: int = 2  # buffers in which a warpgroup's scores wait to be written
    warpgroups: int = 4  # that multiply
    rows: int = 64  # entries that each of them has

    @property
    def block(self) -> int:
        """Entries of an item."""
        return self.warpgroups * self.rows

    @property
    def weight_slots(self) -> int:
        """Tiles of weights in shared memory: one is in use."""
        return self.key_slots + 1

    @property
    def registers(self) -> int:
        """Of a thread that multiplies."""
        return computing_registers(self.warpgroups, _LOADING_REGISTERS)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known of a call before it runs."""

    batch: int
    num_queries: int  # of a batch row, as the kernel sees them
    heads: int
    dim: int
    num_entries: int
    width: int  # of the result
    step: int  # queries multiplied at a time
    tiles: Tiles
    interprets: bool

    @property
    def columns(self) -> int:
        """Of a product."""
        return self.step * self.heads

    @property
    def chunks(self) -> int:
        """Of the channels."""
        return self.dim // SWIZZLED

    @property
    def query_tiles(self) -> int:
        """Of a batch row."""
        return -(-self.num_queries // self.tiles.queries)

    @property
    def num_tiles(self) -> int:
        """Of all batch rows."""
        return self.batch * self.query_tiles

    @property
    def programs(self) -> int:
        """That share the items."""
        most = _INTERPRETED_PROGRAMS if self.interprets else _PROGRAMS
        return min(most, self.num_tiles * -(-self.num_entries // self.tiles.block))


class _Refs(NamedTuple):
    """Global memory, shared memory, and barriers there."""

    starts: Any
    first_rows: Any
    queries: Any
    weights: Any
    keys: Any
    out: Any
    # Of keys there are two views: for copies that start at any row, and for registers.
    key_slots: Any
    query_slots: Any
    weight_slots: Any
    scores: Any
    keys_loaded: Any
    keys_freed: Any
    weights_freed: Any
    loaded: Any
    freed: Any


def scores_kernel(
    sizes: Sizes, operands: tuple[Array, ...], interpret: Any
) -> Callable[..., Array]:
    """Takes what global memory holds, in the order of `_Refs`, and returns scores."""

    def body(*references):
        refs = _Refs(*references)
        if interpret:
            refs = refs._replace(key_slots=(refs.key_slots,) * 2)
        _program(refs, sizes)

    shape = sizes.batch, sizes.num_queries, sizes.width
    return plgpu.kernel(
        body,
        out_type=shape_varying_like(shape, jnp.float32, *operands),
        scratch_types=_scratch(sizes, operands[-1].dtype),
        grid=(sizes.programs,),
        grid_names=("program",),
        num_threads=sizes.tiles.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="index_scores",
        interpret=interpret,
    )


def _scratch(sizes: Sizes, dtype: DTypeLike) -> list:
    """Shared memory and barriers, in the order of `_Refs`."""
    tiles = sizes.tiles
    layout = plgpu.TilingTransform((8, SWIZZLED)), plgpu.SwizzleTransform(128)
    slots = tiles.key_slots, tiles.warpgroups, sizes.chunks, tiles.rows, SWIZZLED
    # Mosaic copies to tiles of 8 rows from multiples of 8 rows only. As long as rows
    # are not wider than a swizzle, the bytes lie the same way without tiles.
    key_slots = [plgpu.SMEM(slots, dtype, transforms=x) for x in (layout[1:], layout)]
    query_slots = tiles.stages, sizes.columns, sizes.dim
    weight_slots = tiles.weight_slots, tiles.queries, sizes.heads
    scores = tiles.warpgroups, tiles.stores, tiles.queries, tiles.rows

    def loaded(slots, copies):
        return plgpu.Barrier(num_arrivals=copies, num_barriers=slots)

    def freed(slots):
        return plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=slots)

    return [
        key_slots[1] if sizes.interprets else plgpu.RefUnion(*key_slots),
        plgpu.SMEM(query_slots, dtype, transforms=layout),
        plgpu.SMEM(weight_slots, jnp.float32),
        plgpu.SMEM(scores, jnp.float32),
        loaded(tiles.key_slots, copies=tiles.warpgroups * sizes.chunks + 1),
        freed(tiles.key_slots),
        freed(tiles.weight_slots),
        loaded(tiles.stages, copies=1),
        freed(tiles.stages),
    ]


def _program(refs: _Refs, sizes: Sizes) -> None:
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    num_items = refs.starts[sizes.num_tiles] - program
    num_items = lax.div(num_items + (sizes.programs - 1), sizes.programs)

    def item(i):
        return _item(refs.starts, program + i * sizes.programs, sizes)

    # Alone, a warpgroup has as many as it can have.
    shares = sizes.tiles.warpgroups > 1

    @pl.when(warpgroup == sizes.tiles.warpgroups)
    def _():
        if shares:
            plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")
        _load(refs, sizes, item, num_items)

    @pl.when(warpgroup < sizes.tiles.warpgroups)
    def _():
        if shares:
            plgpu.set_max_registers(sizes.tiles.registers, action="increase")
        _score(refs, sizes, item, num_items, warpgroup)


class _Item(NamedTuple):
    """A tile of queries and a block of entries."""

    batch: Array
    query: Array
    steps: Array
    entry: Array


def _item(starts: Any, number: Array, sizes: Sizes) -> _Item:
    """The item of that number."""
    tile, after = jnp.int32(0), jnp.int32(sizes.num_tiles)
    for _ in range((sizes.num_tiles - 1).bit_length()):
        middle = lax.shift_right_logical(tile + after, 1)
        is_reached = starts[middle] <= number
        tile = jnp.where(is_reached, middle, tile)
        after = jnp.where(is_reached, after, middle)
    query = lax.rem(tile, sizes.query_tiles) * sizes.tiles.queries
    left = jnp.minimum(sizes.num_queries - query, sizes.tiles.queries)
    return _Item(
        batch=lax.div(tile, sizes.query_tiles),
        query=query,
        steps=lax.div(left + (sizes.step - 1), sizes.step),
        entry=(number - starts[tile]) * sizes.tiles.block,
    )


def _load(refs: _Refs, sizes: Sizes, item: Any, num_items: Array) -> None:
    """Copies the entries and queries of all items of a program."""
    tiles = sizes.tiles
    rings = (
        (refs.keys_freed, tiles.key_slots),
        (refs.weights_freed, tiles.weight_slots),
        (refs.freed, tiles.stages),
    )

    def wait_free(ring, number):
        barriers, slots = ring
        barrier = barriers.at[lax.rem(number, slots)]
        pl.when(number >= slots)(lambda: plgpu.barrier_wait(barrier))

    def load_item(i, done):
        work = item(i)
        wait_free(rings[0], i)
        wait_free(rings[1], i)
        _load_keys_and_weights(refs, sizes, work, i)

        def load_step(t, _):
            wait_free(rings[2], done + t)
            slot = lax.rem(done + t, tiles.stages)
            first = pl.multiple_of(work.query * sizes.heads + t * sizes.columns, 8)
            queries = refs.queries.at[work.batch, pl.ds(first, sizes.columns)]
            own = refs.query_slots.at[slot]
            plgpu.copy_gmem_to_smem(queries, own, refs.loaded.at[slot])

        lax.fori_loop(0, work.steps, load_step, None)
        return done + work.steps

    steps = lax.fori_loop(0, num_items, load_item, jnp.int32(0))
    # No barrier may be left completed but not waited for.
    for ring, number in zip(rings, (num_items, num_items, steps), strict=True):
        slots = ring[1]

        def drain(i, _, ring=ring):
            wait_free(ring, i)

        lax.fori_loop(jnp.maximum(number, slots), number + slots, drain, None)


def _load_keys_and_weights(refs: _Refs, sizes: Sizes, work: _Item, i: Array) -> None:
    """Copies what a program's i-th item needs but for the queries."""
    tiles = sizes.tiles
    slot, weight_slot = lax.rem(i, tiles.key_slots), lax.rem(i, tiles.weight_slots)
    barrier = refs.keys_loaded.at[slot]
    queries = pl.ds(work.query, tiles.queries)
    weights = refs.weights.at[work.batch, queries]
    plgpu.copy_gmem_to_smem(weights, refs.weight_slots.at[weight_slot], barrier)
    row = refs.first_rows[work.batch] + work.entry
    for warpgroup in range(tiles.warpgroups):
        rows = pl.ds(row + warpgroup * tiles.rows, tiles.rows)
        for chunk in range(sizes.chunks):
            keys = refs.keys.at[rows, pl.ds(chunk * SWIZZLED, SWIZZLED)]
            own = refs.key_slots[0].at[slot, warpgroup, chunk]
            plgpu.copy_gmem_to_smem(keys, own, barrier)


def _score(
    refs: _Refs, sizes: Sizes, item: Any, num_items: Array, warpgroup: Array
) -> None:
    """A warpgroup's part of all items of a program."""
    tiles = sizes.tiles

    def score_item(i, done):
        work = item(i)
        slot, store = lax.rem(i, tiles.key_slots), lax.rem(i, tiles.stores)
        weight_slot = lax.rem(i, tiles.weight_slots)
        plgpu.barrier_wait(refs.keys_loaded.at[slot])
        keys = _keys(refs, sizes, refs.key_slots[1].at[slot, warpgroup])
        # Copies come only after what has been read.
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.keys_freed.at[slot])
        scores = refs.scores.at[warpgroup, store]
        # What was in this buffer has been written.
        plgpu.wait_smem_to_gmem(tiles.stores - 1, wait_read_only=True)

        def score_step(t, _):
            slot = lax.rem(done + t, tiles.stages)
            products = _products(refs, sizes, keys, slot)
            for query in range(sizes.step):
                own = products[:, query * sizes.heads : (query + 1) * sizes.heads]
                # Nothing may stand between a load and the layout that it is to have.
                weights = refs.weight_slots[weight_slot, t * sizes.step + query]
                scores[t * sizes.step + query] = _weighted_sum(own, weights, sizes)

        lax.fori_loop(0, work.steps, score_step, None)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.weights_freed.at[weight_slot])
        queries = pl.ds(work.query, tiles.queries)
        entries = pl.ds(work.entry + warpgroup * tiles.rows, tiles.rows)
        plgpu.copy_smem_to_gmem(scores, refs.out.at[work.batch, queries, entries])
        return done + work.steps

    lax.fori_loop(0, num_items, score_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _keys(refs: _Refs, sizes: Sizes, slot: Any) -> list[Array]:
    """A warpgroup's entries in registers, in chunks of channels."""
    # Always 1, which the compiler cannot know. Without a product, registers stay in the
    # order of the loads (`ldmatrix`), and each step moves them all to where matrix
    # instructions want them.
    one = (refs.starts[0] + 1).astype(refs.keys.dtype)
    chunks = (slot[chunk] for chunk in range(sizes.chunks))
    return [_laid_out(chunk, sizes, _LAYOUT) * one for chunk in chunks]


def _products(refs: _Refs, sizes: Sizes, keys: list[Array], slot: Array) -> Array:
    """Of a warpgroup's entries and the heads in a slot, in float32."""
    queries = refs.query_slots.at[slot]
    plgpu.barrier_wait(refs.loaded.at[slot])
    if sizes.interprets:
        products = jnp.dot(
            jnp.concatenate(keys, axis=1),
            queries[...].T,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        # Unlike matrix instructions, this has read as threads do.
        plgpu.commit_smem()
    else:

        def multiply(products):
            for chunk, own in enumerate(keys):
                channels = pl.ds(chunk * SWIZZLED, SWIZZLED)
                own_queries = queries.at[:, channels].transpose((1, 0))
                plgpu.wgmma(products, own, own_queries)
            return products[...]

        products = plgpu.WGMMAAccumulatorRef(
            (sizes.tiles.rows, sizes.columns), jnp.float32
        )
        products = pl.run_scoped(multiply, products)
    plgpu.barrier_arrive(refs.freed.at[slot])
    return products


def _weighted_sum(products: Array, weights: Array, sizes: Sizes) -> Array:
    """Over heads, rectified."""
    weights = _laid_out(weights, sizes, _LAYOUT.reduce(0))
    weights = lax.broadcast_in_dim(weights, products.shape, [1])
    return jnp.sum(jnp.maximum(products, 0) * weights, axis=1)


def _laid_out(x: Array, sizes: Sizes, layout: Any) -> Array:
    """In registers as the matrix instructions want it; the interpreter has none."""
    return x if sizes.interprets else plgpu.layout_cast(x, layout)
