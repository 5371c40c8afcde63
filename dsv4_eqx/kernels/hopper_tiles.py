"""What the grouped products on Hopper GPUs share: tiles, buffers, the loop over tiles.

As many blocks run as there are multiprocessors. In each, one warpgroup copies operands
through a ring of buffers in shared memory, ahead of the others, which multiply: also
across tiles, so that the next one's operands arrive while results are written.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dsv4_eqx.kernels.batching import one_by_one
from dsv4_eqx.numerics.varying import match_varying, shape_varying_like

# Rows of a subtile: what a warpgroup's matrix instruction takes.
SUBTILE: Final = 64
# Channels, of 2 bytes, in the 128 bytes across which shared memory is swizzled, so that
# a column of a subtile does not lie in one memory bank.
CHUNK: Final = 64
# Multiprocessors of an H100 or H200. On another GPU this is only slower.
_BLOCKS: Final = 132
# Registers of a multiprocessor; of a thread at most; of one that only loads.
_REGISTERS: Final = 65536
_MOST_REGISTERS: Final = 240
_LOADING: Final = 40
_THREADS: Final = 128  # of a warpgroup
_INTERPRETED_BLOCKS: Final = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a grouped product is cut up: what a benchmark tries out."""

    # Rows of a tile of the result, 64 for each warpgroup that multiplies. Where it is
    # 64 and there are more warpgroups, they share out the columns.
    block_m: int = 128
    block_n: int = 256  # columns; fewer where these do not divide the result's
    block_k: int = 64  # channels, or rows, that are multiplied at a time
    stages: int = 4  # buffers for those
    warpgroups: int = 2  # that multiply
    stores: int = 2  # buffers, for each of them, in which results wait to be written

    def __post_init__(self):
        shared_out = self.row_warpgroups * self.column_warpgroups == self.warpgroups
        if not shared_out or self.block_n % self.unit or self.block_k % CHUNK:
            raise ValueError(f"Tiles of these sizes cannot be multiplied: {self}.")

    @property
    def row_warpgroups(self) -> int:
        """Warpgroups below each other."""
        return self.block_m // SUBTILE

    @property
    def column_warpgroups(self) -> int:
        """Warpgroups beside each other."""
        return self.warpgroups // self.row_warpgroups

    @property
    def unit(self) -> int:
        """What `block_n` is a multiple of."""
        return CHUNK * self.column_warpgroups

    def fitted(self, columns: int, depth: int) -> "Tiles":
        """With blocks that divide `columns` and `depth`, which are multiples of 64."""
        tiles = self
        if columns % tiles.unit:
            tiles = dataclasses.replace(tiles, warpgroups=tiles.row_warpgroups)
        return dataclasses.replace(
            tiles,
            block_n=_largest_divisor(columns, tiles.block_n, tiles.unit),
            block_k=_largest_divisor(depth, tiles.block_k, CHUNK),
        )


def _largest_divisor(size: int, most: int, unit: int) -> int:
    return max(n for n in range(unit, most + 1, unit) if size % n == 0)


class Place(NamedTuple):
    """Where this warpgroup's part is in a tile."""

    warpgroup: Array
    row: Array  # in subtiles
    column: Array
    width: int

    @property
    def rows(self) -> Any:
        """Its rows."""
        return pl.ds(pl.multiple_of(self.row * SUBTILE, SUBTILE), SUBTILE)

    @property
    def columns(self) -> Any:
        """Its columns."""
        return pl.ds(pl.multiple_of(self.column, self.width), self.width)


def computing_registers(warpgroups: int, loading: int) -> int:
    """How many registers a thread that computes may ask for, where one warpgroup loads.

    What a program starts with is all that its warpgroups can share out: one that asks
    for more waits for ever.
    """
    count = warpgroups + 1
    start = _REGISTERS // (_THREADS * count) // 8 * 8
    each = (start * count - loading) // warpgroups // 8 * 8
    return min(each, _MOST_REGISTERS)


def place_of(tiles: Tiles) -> Place:
    """Of the warpgroup that runs this."""
    warpgroup = lax.axis_index("warpgroup")
    width = tiles.block_n // tiles.column_warpgroups
    row = lax.div(warpgroup, tiles.column_warpgroups)
    column = lax.rem(warpgroup, tiles.column_warpgroups) * width
    return Place(warpgroup, row, column, width)


def buffer(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Memory laid out as matrix instructions want it."""
    return plgpu.SMEM(shape, dtype, transforms=_layout(dtype))


def _layout(dtype: jnp.dtype) -> tuple[Any, Any]:
    tiling = plgpu.TilingTransform(  # pyright: ignore[reportAbstractUsage]
        (8, 128 // dtype.itemsize)
    )
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def two_views(shape: tuple[int, ...], dtype: jnp.dtype, interpret: Any) -> Any:
    """As `buffer`, and once more for copies that start at any row: see `Views`.

    Mosaic copies what is tiled only from and to multiples of 8 rows. Where rows are as
    long as the swizzle, the bytes lie the same way without tiles.
    """
    if interpret:
        return buffer(shape, dtype)
    return plgpu.RefUnion(
        buffer(shape, dtype),
        plgpu.SMEM(shape, dtype, transforms=_layout(dtype)[1:]),
    )


class Views(NamedTuple):
    """One buffer twice: for matrix instructions and registers, and for copies."""

    tiled: Any
    rows: Any

    @classmethod
    def of(cls, ref: Any, interpret: Any) -> "Views":
        """What `two_views` has become in the kernel."""
        return cls(ref, ref) if interpret else cls(*ref)


def barriers(tiles: Tiles, copies: int) -> dict[str, Any]:
    """For each stage: `loaded` by so many copies, `freed` by all that multiply."""
    stages = tiles.stages
    return {
        "loaded": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "freed": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=stages),
    }


def check_operands(name: str, left: Array, right: Array, sizes: tuple[int, ...]):
    """Refuses operands not of one 16-bit dtype, and channels no multiple of 64."""
    is_half = left.dtype in (jnp.bfloat16, jnp.float16)
    if not is_half or left.dtype != right.dtype:
        raise ValueError(
            f"{name} was called with {left.dtype} and {right.dtype}: both must be "
            "bfloat16, or both float16."
        )
    if any(size % CHUNK for size in sizes):
        raise ValueError(
            f"{name} was called with shapes {left.shape} and {right.shape}: channels "
            f"must be multiples of {CHUNK}."
        )


def padded(rows: Array, least: int, unit: int = 1) -> Array:
    """With rows of zeros below: at least so many, and a multiple of `unit`."""
    count = max(least, -(-len(rows) // unit) * unit)
    if count == len(rows):
        return rows
    return jnp.pad(rows, ((0, count - len(rows)), (0, 0)))


def running_sums(x: Array) -> Array:
    """As `jnp.cumsum` of each row, in one launch; of few numbers."""
    index = jnp.arange(x.shape[-1])
    x = jnp.where(index[:, None] >= index[None], x[..., None, :], 0)
    return jnp.sum(x, axis=-1, dtype=x.dtype)


def kernel_of(
    body: Callable[..., None],
    name: str,
    result: jax.ShapeDtypeStruct,
    buffers: dict[str, Any],
    tiles: Tiles,
    interpret: Any,
) -> Callable[..., Array]:
    """`body`, run by all warpgroups of all blocks."""

    @one_by_one
    def call(*operands):
        out_type = shape_varying_like(result.shape, result.dtype, *operands)
        kernel = plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=buffers,
            grid=(_num_blocks(interpret),),
            grid_names=("block",),
            num_threads=tiles.warpgroups + 1,
            thread_name="warpgroup",
            kernel_name=name,
            interpret=interpret,
        )
        return match_varying(kernel(*operands), *operands)[0]

    return call


def _num_blocks(interpret: Any) -> int:
    return _INTERPRETED_BLOCKS if interpret else _BLOCKS


class Work(NamedTuple):
    """What there is to do."""

    items: Array | int  # tiles of the result
    # From an item's number, what it is, and its number of steps.
    plan: Callable[[Array], tuple[Any, Array]]
    # Starts the copies of a step's operands into a slot of the ring.
    load: Callable[[Any, Array, Array], None]
    # Adds their product to an accumulator.
    multiply: Callable[[Any, Any, Array, Array], None]
    # Writes the accumulated sum.
    store: Callable[[Any, Array], None]
    products: int = 1  # that `multiply` starts


def run(work: Work, loaded: Any, freed: Any, tiles: Tiles, interpret: Any) -> None:
    """Every block does every n-th item; one of its warpgroups loads for the others."""
    warpgroup = lax.axis_index("warpgroup")
    block, blocks = lax.axis_index("block"), _num_blocks(interpret)
    count = lax.div(work.items - block + blocks - 1, blocks)

    def plan(i):
        return work.plan(block + i * blocks)

    @pl.when(warpgroup == tiles.warpgroups)
    def _():
        if tiles.warpgroups > 1:
            plgpu.set_max_registers(_LOADING, action="decrease")
        _load_all(work, plan, count, freed, tiles.stages)

    @pl.when(warpgroup < tiles.warpgroups)
    def _():
        if tiles.warpgroups > 1:
            each = computing_registers(tiles.warpgroups, _LOADING)
            plgpu.set_max_registers(each, action="increase")
        _multiply_all(work, plan, count, loaded, freed, tiles)
        plgpu.wait_smem_to_gmem(0)


def _load_all(work: Work, plan, count: Array, freed: Any, stages: int) -> None:
    def wait_free(step):
        plgpu.barrier_wait(freed.at[lax.rem(step, stages)])

    def load_item(i, done):
        item, steps = plan(i)

        def load_step(k, _):
            pl.when(done + k >= stages)(lambda: wait_free(done + k))
            work.load(item, k, lax.rem(done + k, stages))

        lax.fori_loop(0, steps, load_step, None)
        return done + steps

    steps = lax.fori_loop(0, count, load_item, jnp.int32(0))
    # No barrier may be left completed but not waited for.
    left = jnp.maximum(steps - stages, 0)
    lax.fori_loop(left, steps, lambda step, _: wait_free(step), None)


def _multiply_all(
    work: Work, plan, count: Array, loaded: Any, freed: Any, tiles: Tiles
) -> None:
    def free(step):
        plgpu.barrier_arrive(freed.at[lax.rem(step, tiles.stages)])

    def multiply_item(i, done):
        item, steps = plan(i)

        def multiply_steps(acc):
            def multiply_step(k, _):
                slot = lax.rem(done + k, tiles.stages)
                plgpu.barrier_wait(loaded.at[slot])
                work.multiply(acc, item, k, slot)
                # This step's may be under way still; those before are done.
                plgpu.wgmma_wait(work.products)
                pl.when(k > 0)(lambda: free(done + k - 1))

            lax.fori_loop(0, steps, multiply_step, None)
            return acc[...]

        width = tiles.block_n // tiles.column_warpgroups
        acc = plgpu.ACC(  # pyright: ignore[reportPrivateImportUsage]
            (SUBTILE, width), jnp.float32
        )
        result = pl.run_scoped(multiply_steps, acc)
        pl.when(steps > 0)(lambda: free(done + steps - 1))
        work.store(item, result)
        return done + steps

    lax.fori_loop(0, count, multiply_item, jnp.int32(0))


def store(rows: Any, column: Array, result: Array, buffers: Views) -> None:
    """Writes a subtile's columns, from that one on, through buffers taken in turns."""
    stores, _, width = buffers.tiled.shape
    result = result.astype(rows.dtype)
    for i in range(result.shape[1] // width):
        if i == 0:
            # Since the last tile was written, its copies had time to end.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        elif i >= stores:
            plgpu.wait_smem_to_gmem(stores - 1, wait_read_only=True)
        buffers.tiled[i % stores] = result[:, i * width : (i + 1) * width]
        plgpu.commit_smem()
        columns = pl.ds(column + i * width, width)
        plgpu.copy_smem_to_gmem(buffers.rows.at[i % stores], rows.at[:, columns])
