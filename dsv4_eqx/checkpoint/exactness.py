"""Whether experts in FP4 become FP8 without loss: the rule of 2^14.

FP8 (E4M3) holds v * 2^k for every number v of FP4 (E2M1) if and only if -8 <= k <= 6.
In a block of 128 x 128 with a single scale, of which the release's FP8 consists, k of
its 1 x 32 tiles may therefore differ by 14.
"""

from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.numerics.quantize import BLOCKS, FP4, FP8
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, is_quantized
from dsv4_eqx.sharding.sharded_model import model_on_device

_MOST: Final = 14


class FP8Exactness(NamedTuple):
    """Whether an expert's matrix is the same in FP8."""

    log2_spread: int  # of the scales within a block, in the block where it is largest
    is_exact: bool


def fp8_exactness(model: Any) -> dict[str, FP8Exactness]:
    """For each matrix in FP4, whether FP8 in blocks of 128 x 128 has the same numbers.

    It is certain where the scales within each block are at most 2^14 apart. Tiles of
    zeros do not count.

    **Arguments:**

    - `model`: from `from_pretrained(..., keep_quantized=True)` or `pack_qat`.

    **Returns:** an `FP8Exactness` by the matrix's name in a release, as in
    `layers.3.ffn.experts.0.w1.weight`.

    **Raises:** ValueError if no weight is packed in FP4 with powers of two as scales.
    """
    call = "fp8_exactness"
    found = {}
    for source, leaf in sources(model_on_device(call, model), official=True):
        is_fp4 = is_quantized(leaf) and leaf.code_dtype == FP4
        if not is_fp4 or leaf.scales.dtype != np.uint8:
            continue
        spreads = np.asarray(_spreads(leaf))
        for index in np.ndindex(source.names.shape):
            spread = int(spreads[index])
            name = str(source.names[index])
            found[name] = FP8Exactness(spread, spread <= _MOST)
    if not found:
        raise ValueError(
            f"{call}: no weight is packed in FP4: load the release by "
            "from_pretrained(..., keep_quantized=True)."
        )
    return found


def _spreads(weight: QuantizedWeight) -> np.ndarray:
    """Of each matrix, how far exponents differ within a block."""
    scales = np.asarray(jax.device_get(weight.scales)).astype(np.int32)
    codes = np.asarray(jax.device_get(weight.codes))
    tiles = codes.reshape(*scales.shape, -1) & 0x77  # without signs
    is_zero = ~tiles.any(axis=-1)
    rows, columns = BLOCKS[FP8]
    columns = columns * scales.shape[-1] // weight.shape[-1]  # in tiles
    *lead, height, width = scales.shape
    pads = [(0, 0)] * len(lead) + [(0, -height % rows), (0, -width % columns)]

    def in_blocks(x: np.ndarray, fill: int) -> np.ndarray:
        x = np.pad(np.where(is_zero, fill, x), pads, constant_values=fill)
        return x.reshape(*lead, x.shape[-2] // rows, rows, -1, columns)

    largest = in_blocks(scales, -1).max(axis=(-3, -1))
    smallest = in_blocks(scales, 256).min(axis=(-3, -1))
    spread = np.where(largest < 0, 0, largest - smallest)
    return spread.max(axis=(-2, -1))
