"""Whether an attention's parts fit together, and whether its arguments fit it."""

from typing import Any

from jaxtyping import Array

from dsv4_eqx.attention.compressor import Compressor
from dsv4_eqx.attention.documents import validate_positions
from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.numerics.validation import validate_activations, validate_ids


def validate_parts(
    head_dim: int,
    q_rank: int,
    compressor: Compressor | None,
    indexer: Indexer | None,
) -> None:
    """Refuses a compressor or indexer of other sizes, and an indexer alone."""
    if compressor is not None and compressor.head_dim != head_dim:
        raise ValueError(
            f"Attention: the compressor's head_dim is {compressor.head_dim}, it must "
            f"be head_dim={head_dim}: its entries are the heads' keys."
        )
    if indexer is None:
        return
    if compressor is None:
        raise ValueError("Attention: an indexer selects entries: give a compressor.")
    ratios = indexer.compressor.ratio, compressor.ratio
    if ratios[0] != ratios[1] or indexer.q_rank != q_rank:
        raise ValueError(
            f"Attention: the indexer's ratio and q_rank are {ratios[0]} and "
            f"{indexer.q_rank}; they must be the layer's, {ratios[1]} and {q_rank}."
        )


def validate_sequences(
    x: Array, weight: Any, positions: Array, segment_ids: Array | None
) -> None:
    """Refuses arguments of `Attention` that do not belong together.

    `weight` is an array or a `QuantizedWeight`; its last dimension is that of `x`.
    """
    validate_activations("Attention", x, weight, ("batch", "seq", "dim"))
    validate_ids("Attention", "positions", positions, x.shape[:2])
    if x.size == 0:
        raise ValueError(
            f"Attention was called with x of shape {x.shape}: batch and seq must "
            "be at least 1."
        )
    if segment_ids is not None:
        validate_ids("Attention", "segment_ids", segment_ids, x.shape[:2])
    validate_positions("Attention", positions, segment_ids)
