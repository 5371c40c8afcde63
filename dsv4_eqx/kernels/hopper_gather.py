"""Rows of keys from anywhere in global memory into a block in shared memory.

What Hopper's kernels for attention read their keys with. The TMA cannot gather there:
each thread of one warpgroup copies 16-byte chunks by `cp.async`, and writes them where
the TMA would have put them, in tiles of 8 rows x 128 bytes with 128-byte swizzle, so
that products (`wgmma`) take the block as it lies. The interpreter has no inline code:
there a gather is plain reads.

A warpgroup that gathers calls, block after block, `read_indices`, `start_gather` and
`finish_gather`.
"""

from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Int

# Keys in a block: 8 lanes copy a row, so 16 groups of lanes copy four rows each.
BLOCK: Final = 64
_ROWS: Final = 4
# The form of every block of queries or keys in shared memory.
_TILE_BYTES: Final = 8 * 128


def block_transforms() -> tuple[Any, ...]:
    """Tiles and swizzle of a block of 16-bit rows in shared memory."""
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def block_shape(
    num_slots: int, head_dim: int, dtype: DTypeLike, *, interpret: bool
) -> Any:
    """Shared memory for blocks of keys; the interpreter needs no tiles."""
    transforms = () if interpret else block_transforms()
    return plgpu.SMEM((num_slots, BLOCK, head_dim), dtype, transforms=transforms)


def read_indices(lists: Any, *, interpret: bool) -> Int[Array, "..."]:
    """A block of a list: on a GPU, four entries for each thread, in a form of its own.

    `lists` refers to `BLOCK` entries in global memory, at 16 bytes' alignment. They may
    be read long before they are used, so that nothing waits for them.
    """
    if interpret:
        return lists[...]

    @inlined(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            (128 * _ROWS,), jnp.int32, layout=_per_thread()
        ),
    )
    def read(_, lists):
        # Eight neighbouring lanes copy rows 4g to 4g + 3 and read their four indices.
        code = """{
            .reg .b32 group; .reg .b64 offset;
            mov.u32 group, %tid.x; shr.u32 group, group, 3;
            and.b32 group, group, 15;
            mul.wide.u32 offset, group, 16; add.s64 offset, offset, $4;
            ld.global.nc.v4.b32 {$0, $1, $2, $3}, [offset];
        }"""
        four = _inline_asm(code, "=r,=r,=r,=r,l", _address(lists), results=_ROWS)
        i32 = ir.IntegerType.get_signless(32)
        registers = vector.from_elements(ir.VectorType.get((_ROWS,), i32), four)
        return FragmentedArray(
            _registers=np.array([registers], dtype=object),
            _layout=_per_thread().to_mgpu(),
            _is_signed=True,
        )

    return read(lists)


def start_gather(
    indices: Int[Array, "..."],
    window: Any,
    entries: Any,
    slot: Any,
    bias: Any,
    *,
    interpret: bool,
) -> None:
    """Starts to copy the rows that a block of a list names; no row is all zeros.

    Index i means row i of `window`, or row `i - len(window)` of `entries`, or no row if
    it is negative. `bias` gets `BLOCK` float32 numbers: 0 for a row, -inf for none.
    """
    if interpret:
        own = jnp.concatenate([window[...], entries[...]])[jnp.maximum(indices, 0)]
        slot[...] = jnp.where(indices[:, None] >= 0, own, 0)
        bias[...] = jnp.where(indices >= 0, 0.0, -jnp.inf)
        return
    head_dim, ref = slot.shape[-1], plgpu.RefType()
    types = _per_thread(), ref, ref, plgpu.RefType(block_transforms()), ref

    @inlined(arg_types=types)
    def start(_, indices, window, entries, slot, bias):
        i32 = ir.IntegerType.get_signless(32)
        (four,) = indices.registers
        positions = [
            arith.constant(i32, ir.IntegerAttr.get(i32, i)) for i in range(_ROWS)
        ]
        rows = [llvm.extractelement(four, position) for position in positions]
        addresses = [_address(ref) for ref in (slot, bias, window, entries)]
        code = _gather_code(head_dim, ir.MemRefType(window.type).shape[0])
        _inline_asm(code, "r,r,r,r,r,r,l,l", *rows, *addresses)

    start(indices, window, entries, slot, bias)


def finish_gather(*, interpret: bool) -> None:
    """Waits for gathers, and shows what they wrote to products.

    Other warpgroups see it when they wait for a barrier at which this one arrives
    afterwards.
    """
    if interpret:
        plgpu.commit_smem()
        return

    @inlined()
    def finish(_):
        _inline_asm("cp.async.wait_group 0;\n fence.proxy.async.shared::cta;", "")

    finish()


def opaque_zero() -> Int[Array, ""]:
    """Zero, of which the compiler does not know that it is always the same.

    An address that it is added to is computed where it is used, not kept in registers
    through a loop.
    """
    layout = plgpu.Layout.WG_SPLAT(())

    @inlined(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=layout))
    def zero(_):
        (number,) = _inline_asm("mov.b32 $0, 0;", "=r", results=1)
        return FragmentedArray.splat(number, (), is_signed=True)

    return zero()


def inlined(**types) -> Any:
    """`inline_mgpu`: what it decorates takes one argument less than it says."""
    return plgpu.inline_mgpu(**types)


def _inline_asm(code, constraints, *operands, results=0) -> list[Any]:
    """PTX with 32-bit results."""
    i32 = ir.IntegerType.get_signless(32)
    several = llvm.StructType.get_literal([i32] * results)
    type = {0: ir.Type.parse("!llvm.void"), 1: i32}.get(results, several)
    out: Any = llvm.inline_asm(type, operands, code, constraints, has_side_effects=True)
    if results < 2:
        return [out] * results
    return [llvm.extractvalue(i32, out, [i]) for i in range(results)]


def _address(ref):
    """Where a reference's memory begins: 64 bits if global, 32 if shared."""
    bits = 32 if utils.is_smem_ref(ref) else 64
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), utils.memref_ptr(ref))


def _per_thread():
    """The layout that gives each thread of a warpgroup four numbers in one register."""
    return plgpu.Layout.WG_STRIDED((128 * _ROWS,), vec_size=_ROWS)


def _gather_code(head_dim: int, num_window_rows: int) -> str:
    """PTX of the copies that one thread starts.

    Operands 0 to 3 are its indices, 4 the block, 5 the bias, 6 and 7 window and
    entries. Row r and chunk c of a tile lie at byte 128 r + 16 (c ^ r).
    """
    lines = """{
        .reg .b32 thread, lane, group, base, chunk, to, size, none, zero;
        .reg .b64 row, from, begin; .reg .pred first, valid, late;
        mov.u32 thread, %tid.x;
        and.b32 lane, thread, 7; shr.u32 group, thread, 3; and.b32 group, group, 15;
        mov.b32 zero, 0; mov.b32 none, 0xff800000;
    """
    biases = ""
    for i in range(_ROWS):
        biases += f".reg .b32 bias{i}; setp.ge.s32 valid, ${i}, 0;"
        biases += f"selp.b32 bias{i}, zero, none, valid;\n"
    # Groups 2k and 2k + 1 have the rows of the k-th row of tiles.
    lines += f"""{biases}
        shl.b32 to, group, 4; add.u32 to, to, $5; setp.eq.u32 first, lane, 0;
        @first st.shared.v4.b32 [to], {{bias0, bias1, bias2, bias3}};
        shr.u32 base, group, 1; mul.lo.u32 base, base, {head_dim // 64 * _TILE_BYTES};
        add.u32 base, base, $4;
        and.b32 group, group, 1; shl.b32 group, group, 2;
        shl.b32 chunk, group, 7; add.u32 base, base, chunk;
    """
    for i in range(_ROWS):
        lines += f"""
            add.u32 chunk, group, {i}; xor.b32 chunk, chunk, lane;
            shl.b32 chunk, chunk, 4; add.u32 to, base, chunk;
            setp.ge.s32 valid, ${i}, 0; selp.b32 size, 16, 0, valid;
            setp.ge.s32 late, ${i}, {num_window_rows};
            selp.b64 begin, $7, $6, late;
            max.s32 chunk, ${i}, 0;
            @late sub.s32 chunk, chunk, {num_window_rows};
            mul.wide.u32 row, chunk, {2 * head_dim};
            mul.wide.u32 from, lane, 16;
            add.s64 from, from, row; add.s64 from, from, begin;
        """
        for tile in range(head_dim // 64):
            to = f"[to + {tile * _TILE_BYTES + i * 128}]"
            lines += f"cp.async.cg.shared.global {to}, [from + {128 * tile}], 16, size;"
    return lines + "cp.async.commit_group; }"
