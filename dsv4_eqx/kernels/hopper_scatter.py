"""Blocks of numbers in registers added to rows anywhere in global memory.

The counterpart of `hopper_gather`: how Hopper's kernels add up gradients of keys. Each
addition is atomic, of four float32 numbers at a time, in no fixed order. There is no
form for the interpreter, which has no inline code.
"""

from typing import Any, Final

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float32, Int

from dsv4_eqx.kernels.hopper_gather import inlined

# Where a thread adds. Operands: result, index, window, entries.
# Of 16 columns a thread has 2q, 2q + 1, 2q + 8 and 2q + 9, where q is its place in
# four lanes. It exchanges two with its neighbour and then has four that follow one
# another: from 2q if it is even, from 2q + 6 if odd.
_ADDRESS: Final = """{{
    .reg .b32 lane, odd, own; .reg .b64 begin, row; .reg .pred late;
    setp.ge.s32 late, $1, {num_window_rows};
    selp.b64 begin, $3, $2, late;
    mov.b32 own, $1; @late sub.s32 own, own, {num_window_rows};
    mul.wide.s32 row, own, {row_bytes}; add.s64 begin, begin, row;
    mov.u32 lane, %tid.x; and.b32 odd, lane, 1; and.b32 lane, lane, 3;
    mul.lo.u32 odd, odd, 24; mad.lo.u32 odd, lane, 8, odd;
    mul.wide.u32 row, odd, 1; add.s64 $0, begin, row;
}}"""
# That exchange. Operands: four results, four numbers.
_EXCHANGE: Final = """{
    .reg .b32 lane, x, y; .reg .pred odd;
    mov.u32 lane, %tid.x; and.b32 lane, lane, 1; setp.ne.u32 odd, lane, 0;
    selp.b32 x, $4, $6, odd; selp.b32 y, $5, $7, odd;
    shfl.sync.bfly.b32 x, x, 1, 31, 0xffffffff;
    shfl.sync.bfly.b32 y, y, 1, 31, 0xffffffff;
    selp.b32 $0, x, $4, odd; selp.b32 $1, y, $5, odd;
    selp.b32 $2, $6, x, odd; selp.b32 $3, $7, y, odd;
}"""


def add_to_rows(
    numbers: Float32[Array, "64 channels"],
    indices: Int[Array, " 64"],
    window: Any,
    entries: Any,
    first: int,
) -> None:
    """Adds to some channels, from `first` on, of the rows that a block of a list names.

    `numbers`, of a multiple of 16 channels, have the layout `WGMMA`, and `indices`
    `WGMMA.reduce(1)`: i means row i of `window`, or row `i - len(window)` of `entries`,
    or no row if it is negative. `window` and `entries` refer to float32 rows in global
    memory. `first` is a multiple of 4.
    """
    layout, ref = plgpu.Layout.WGMMA, plgpu.RefType()

    # The part of each thread: two rows, and of both two of every 8 columns.
    @inlined(arg_types=(layout, layout.reduce(1), ref, ref))
    def add(_, numbers, indices, window, entries):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        zero, one = (arith.constant(i32, ir.IntegerAttr.get(i32, i)) for i in range(2))
        single = [
            llvm.extractelement(pair, column)
            for pair in numbers.registers.flat
            for column in (zero, one)
        ]
        # For 16 columns: their halves, rows, columns.
        single = np.array(single, dtype=object).reshape(-1, 2, 2, 2)
        num_window_rows, head_dim = ir.MemRefType(window.type).shape
        code = _ADDRESS.format(num_window_rows=num_window_rows, row_bytes=4 * head_dim)
        begins = [llvm.ptrtoint(i64, utils.memref_ptr(x)) for x in (window, entries)]
        for i, index in enumerate(indices.registers.flat):
            index = llvm.extractelement(index, zero)
            address = llvm.inline_asm(i64, [index, *begins], code, "=l,r,l,l")
            fours = [_exchanged(list(part.flat)) for part in single[:, :, i]]
            _add_fours(fours, index, address, first)

    add(numbers, indices, window, entries)


def _exchanged(numbers):
    f32 = ir.F32Type.get()
    four = llvm.StructType.get_literal([f32] * 4)
    constraints = ",".join(["=&f"] * 4 + ["f"] * 4)
    result: Any = llvm.inline_asm(
        four, numbers, _EXCHANGE, constraints, has_side_effects=True
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def _add_fours(fours, index, address, first):
    """One branch for all: the assembler would make one of each addition's predicate."""
    count = 4 * len(fours)
    code = f"{{ .reg .pred none; setp.lt.s32 none, ${count}, 0; @none bra DONE;\n"
    for i in range(len(fours)):
        place = f"[${count + 1} + {4 * first + 64 * i}]"
        four = ", ".join(f"${4 * i + j}" for j in range(4))
        code += f"red.relaxed.gpu.global.add.v4.f32 {place}, {{{four}}};\n"
    operands = [*sum(fours, []), index, address]
    constraints = ",".join(["f"] * count + ["r", "l"])
    void = ir.Type.parse("!llvm.void")
    code += "DONE: }"
    llvm.inline_asm(void, operands, code, constraints, has_side_effects=True)
