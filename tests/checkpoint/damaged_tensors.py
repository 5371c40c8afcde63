"""Wrong tensors in well-formed files: the damage, and what an error must say."""

import ml_dtypes
import numpy as np

from tests.checkpoint.hostile import (
    INDEX,
    SHARDS,
    Stored,
    add,
    both,
    drop,
    edit_tensors,
    replace,
)

FP8 = "layers.0.attn.wq_a.weight"  # (24, 64), one scale
FP4 = "layers.1.ffn.experts.3.w1.weight"  # (32, 64), 32 x 2 scales
NORM = "layers.1.attn_norm.weight"  # (64,), bfloat16
GATE = "layers.0.ffn.gate.weight"  # (4, 64), bfloat16
TABLE = "layers.0.ffn.gate.tid2eid"  # (12, 2), int64
ONE, TWO, _ = SHARDS
BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu
NAN_CODE = np.zeros((24, 64), np.uint8)
NAN_CODE[7, 9] = 0x7F
DOUBLE = Stored("U8", (1,), b"0")
BIG = np.zeros((12, 64), np.float32)
BIG[3, 5] = 3.4e38


def scale_of(weight):
    return weight.removesuffix("weight") + "scale"


def filled(shape, value=1.0, dtype=E8M0):
    return np.full(shape, value, dtype)


def table(value):
    changed = np.zeros((12, 2), np.int64)
    changed[7, 1] = value
    return replace(TABLE, changed)


CASES = {
    "one missing": (drop(NORM), f"{NORM} is missing (shape (64,))"),
    "many missing": (drop(NORM, GATE, FP4, scale_of(FP4)), "3 faults", NORM, GATE, FP4),
    "one extra": (add("x", Stored("U8", (3,), b"abc")), "x is not part of the model"),
    "official and HF names": (
        add("lm_head.weight", Stored("F32", (12, 64), bytes(12 * 64 * 4))),
        "lm_head.weight is head.weight, given twice",
    ),
    "mixed names of one tensor": (
        both(
            add("model.layers.0.ffn.experts.0.w1.weight", Stored("U8", (0,), b"")),
            add("model.norm.weight", Stored("U8", (0,), b"")),
        ),
        "layers.0.ffn.experts.0.w1.weight are the same tensor",
    ),
    "doubled in two files": (
        edit_tensors("norm.weight", lambda t: t.update({FP8: DOUBLE})),
        f"'{FP8}' is in {TWO}, and in {INDEX} in {ONE}",
    ),
    "wrong shape": (replace(NORM, filled((63,), 1, BF16)), NORM, "(63,)", "(64,)"),
    "scalar": (replace(NORM, filled((), 1, BF16)), NORM, "()", "(64,)"),
    "transposed": (replace(GATE, filled((64, 4), 1, BF16)), GATE, "(64, 4)", "(4, 64)"),
    "FP8 transposed": (replace(FP8, filled((64, 24), 1, E4M3)), FP8, "(64, 24)"),
    "FP8 for a norm": (replace(NORM, filled((64,), 1, E4M3)), NORM, "float8_e4m3fn"),
    "FP8 for a gate": (replace(GATE, filled((4, 64), 1, E4M3)), GATE, "without scales"),
    "int for float": (replace(GATE, np.ones((4, 64), np.int32)), GATE, "int32"),
    "float for the table": (
        replace(TABLE, np.ones((12, 2), np.float32)),
        TABLE,
        "float32",
    ),
    "FP8 table with scales": (
        both(
            replace(TABLE, filled((12, 2), 1, E4M3)),
            add(f"{TABLE}_scale_inv", Stored("F8_E8M0", (1, 1), b"\x7f")),
        ),
        TABLE,
        "float8_e4m3fn",
    ),
    "FP4 table with scales": (
        both(
            replace(TABLE, np.zeros((12, 1), np.int8)),
            add(f"{TABLE}_scale_inv", Stored("F8_E8M0", (12, 1), b"\x7f" * 12)),
        ),
        TABLE,
        "(12, 1)",
    ),
    "E8M0 for float": (replace(GATE, filled((4, 64))), GATE, "float8_e8m0fnu"),
    "FP8 without scale": (drop(scale_of(FP8)), FP8, "without scales"),
    "FP4 without scale": (drop(scale_of(FP4)), FP4, "without scales"),
    "scales of blocks of 32": (
        replace(scale_of(FP8), filled((1, 2))),
        scale_of(FP8),
        "(1, 2)",
        "(1, 1)",
    ),
    "scales transposed": (
        replace(scale_of(FP4), filled((2, 32))),
        scale_of(FP4),
        "(2, 32)",
        "(32, 2)",
    ),
    "scale in bfloat16": (
        replace(scale_of(FP8), filled((1, 1), 1, BF16)),
        scale_of(FP8),
        "bfloat16",
        "float8_e8m0fnu",
    ),
    "scale in integers": (
        replace(scale_of(FP8), filled((1, 1), 1, np.uint8)),
        scale_of(FP8),
        "uint8",
    ),
    "scale zero": (
        replace(scale_of(FP8), filled((1, 1), 0, np.float32)),
        scale_of(FP8),
    ),
    "scale negative": (
        replace(scale_of(FP8), filled((1, 1), -2, np.float32)),
        scale_of(FP8),
        "-2.0",
    ),
    "scale NaN": (
        replace(scale_of(FP4), filled((32, 2), np.nan)),
        scale_of(FP4),
        "NaN",
    ),
    "float32 scale NaN": (
        replace(scale_of(FP4), filled((32, 2), np.nan, np.float32)),
        scale_of(FP4),
        "NaN",
    ),
    "scale too large": (
        replace(scale_of(FP8), filled((1, 1), 2.0**127)),
        FP8,
        "2**127",
    ),
    "code NaN": (replace(FP8, NAN_CODE.view(E4M3)), FP8, "NaN"),
    "scale beside bfloat16": (
        add(scale_of(GATE), Stored("F8_E8M0", (1, 1), b"\x7f")),
        f"{scale_of(GATE)} is not part of the model",
    ),
    "expert -1": (table(-1), TABLE, "expert -1 at [7, 1]"),
    "expert 4 of 4": (table(4), TABLE, "expert 4 at [7, 1]"),
    "expert 2**40": (table(2**40), TABLE, "beyond int32"),
    "beyond bfloat16": (
        replace("head.weight", BIG),
        TWO,
        "head.weight",
        "3.39",
        "bfloat16",
    ),
}
