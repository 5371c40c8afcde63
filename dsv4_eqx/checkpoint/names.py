"""The names that tensors have in checkpoints, and where they go in the model.

Two namings are published: DeepSeek's own and Hugging Face's. Every tensor is a leaf of
the model or a slice of one, in the same element order; files only merge some dimensions
that we keep apart. This table is the one place that knows.
"""

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsv4_eqx.numerics.quantized_weight import is_quantized


class _Row(NamedTuple):
    """A leaf's published names; two names fill the two halves of its `2` dimension.

    `{expert}` stands for one tensor for each expert.
    """

    official: tuple[str, ...]
    hf: tuple[str, ...]
    merged: tuple[int, int] = (0, 0)  # dimensions of the leaf that are one in the file


def _row(official: str, hf: str, merged: tuple[int, int] = (0, 0)) -> _Row:
    return _Row(tuple(official.split()), tuple(hf.split()), merged)


def _compressor(official: str, hf: str) -> dict[str, _Row]:
    return {
        "value": _row(f"{official}.wkv.weight", f"{hf}.kv_proj.weight", (0, 2)),
        "gate": _row(f"{official}.wgate.weight", f"{hf}.gate_proj.weight", (0, 2)),
        "position_bias": _row(f"{official}.ape", f"{hf}.position_bias", (1, 3)),
        "norm.weight": _row(f"{official}.norm.weight", f"{hf}.kv_norm.weight"),
    }


def _hyper(official: str, hf: str) -> dict[str, _Row]:
    return {
        "weight": _row(f"{official}_fn", f"{hf}fn", (1, 3)),
        "base": _row(f"{official}_base", f"{hf}base"),
        "scale": _row(f"{official}_scale", f"{hf}scale"),
    }


def _under(prefix: str, rows: dict[str, _Row]) -> dict[str, _Row]:
    return {f"{prefix}.{path}": row for path, row in rows.items()}


_ATTENTION: Final = {
    "query_down": _row("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "query_norm.weight": _row("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "query_up": _row("attn.wq_b.weight", "self_attn.q_b_proj.weight", (0, 2)),
    "key_value": _row("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "key_value_norm.weight": _row("attn.kv_norm.weight", "self_attn.kv_norm.weight"),
    "sinks": _row("attn.attn_sink", "self_attn.sinks"),
    "output_down.weight": _row("attn.wo_a.weight", "self_attn.o_a_proj.weight", (0, 2)),
    "output_up": _row("attn.wo_b.weight", "self_attn.o_b_proj.weight", (1, 3)),
    **_under("compressor", _compressor("attn.compressor", "self_attn.compressor")),
    **_under(
        "indexer.compressor",
        _compressor("attn.indexer.compressor", "self_attn.compressor.indexer"),
    ),
    "indexer.query_up": _row(
        "attn.indexer.wq_b.weight",
        "self_attn.compressor.indexer.q_b_proj.weight",
        (0, 2),
    ),
    "indexer.head_weights": _row(
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
}
_MOE: Final = {
    "router.weight": _row("ffn.gate.weight", "mlp.gate.weight"),
    "router.bias": _row("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "router.table": _row("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    "experts.gate_up": _row(
        "ffn.experts.{expert}.w1.weight ffn.experts.{expert}.w3.weight",
        "mlp.experts.gate_up_proj",
        (1, 3),
    ),
    "experts.down": _row("ffn.experts.{expert}.w2.weight", "mlp.experts.down_proj"),
    "shared.gate_up": _row(
        "ffn.shared_experts.w1.weight ffn.shared_experts.w3.weight",
        "mlp.shared_experts.gate_proj.weight mlp.shared_experts.up_proj.weight",
    ),
    "shared.down": _row(
        "ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"
    ),
}
_BLOCK: Final = {
    "attention_norm.weight": _row("attn_norm.weight", "input_layernorm.weight"),
    "moe_norm.weight": _row("ffn_norm.weight", "post_attention_layernorm.weight"),
    **_under("attention_connection", _hyper("hc_attn", "attn_hc.")),
    **_under("moe_connection", _hyper("hc_ffn", "ffn_hc.")),
    **_under("attention", _ATTENTION),
    **_under("moe", _MOE),
}
_TOP: Final = {
    "embedding": _row("embed.weight", "model.embed_tokens.weight"),
    "unembedding": _row("head.weight", "lm_head.weight"),
    "norm.weight": _row("norm.weight", "model.norm.weight"),
    **_under("head", _hyper("hc_head", "model.hc_head.hc_")),
}
# Hugging Face has no prediction block: the official names stand in both columns.
_MTP: Final = {
    "embedding_norm.weight": _row("enorm.weight", "enorm.weight"),
    "embedding_in": _row("e_proj.weight", "e_proj.weight"),
    "streams_norm.weight": _row("hnorm.weight", "hnorm.weight"),
    "streams_in": _row("h_proj.weight", "h_proj.weight"),
    "norm.weight": _row("norm.weight", "norm.weight"),
    **_under("head", _hyper("hc_head", "hc_head_")),
    **{f"block.{path}": row._replace(hf=row.official) for path, row in _BLOCK.items()},
}


class Source(NamedTuple):
    """The tensors that a leaf is made of: one for each index of leading dimensions."""

    path: str  # of the leaf in the model
    names: np.ndarray  # of str; its shape is a prefix of the leaf's
    own_shape: tuple[int, ...]  # of what a tensor fills in the leaf
    merged: tuple[int, int]  # of those, the dimensions that are one in the file

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the file."""
        first, last = self.merged
        middle = math.prod(self.own_shape[first:last])
        return (*self.own_shape[:first], middle, *self.own_shape[last:])


def sources(model: Any, *, official: bool) -> Iterator[tuple[Source, Any]]:
    """The published tensors of every array in a model, and the array.

    **Arguments:**

    - `model`: a `DeepSeekV4`, abstract ones too. Packed weights count as one array.
    - `official`: DeepSeek's names rather than Hugging Face's. Prediction blocks have
        DeepSeek's in both.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        prefixes, row, is_stacked = _locate(name, model.layers, official)
        suffixes = row.official if official else row.hf
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        grid, own_shape = _grid(suffixes, shape)
        names = np.stack([_prefixed(prefix, grid) for prefix in prefixes])
        if not is_stacked:
            names = np.asarray(names[0], dtype=object)
        yield Source(name, names, own_shape, _merged(row, shape, own_shape)), leaf


def _merged(
    row: _Row, shape: tuple[int, ...], own_shape: tuple[int, ...]
) -> tuple[int, int]:
    """A row's merged dimensions among those that a tensor fills; (0, 1) if none are."""
    first, last = (dim - len(shape) + len(own_shape) for dim in row.merged)
    return (first, last) if first >= 0 and last - first > 1 else (0, 1)


def _locate(path: str, layers: Any, official: bool) -> tuple[list[str], _Row, bool]:
    """Prefixes of a leaf's tensors, its row, and whether it stacks layers."""
    part, _, rest = path.partition(".")
    if part == "mtp":
        index, _, rest = rest.partition(".")
        return [f"mtp.{index}."], _MTP[rest], False
    if part != "layers":
        return [""], _TOP[path], False
    section, index, rest = rest.split(".", 2)
    prefix = "layers.{}." if official else "model.layers.{}."
    numbers = _layer_numbers(layers, section, int(index))
    return [prefix.format(i) for i in numbers], _BLOCK[rest], section == "repeated"


def _layer_numbers(layers: Any, section: str, index: int) -> list[int]:
    start, period = len(layers.first), len(layers.repeated)
    if section == "first":
        return [index]
    if section == "repeated":
        return [start + index + i * period for i in range(layers.num_repeats)]
    return [start + layers.num_repeats * period + index]


def _grid(
    suffixes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The names that fill an array of `shape`, and the shape that each fills."""
    grid = np.array(suffixes, dtype=object)
    own = shape
    if "{expert}" in suffixes[0]:
        rows = [[name.format(expert=e) for name in suffixes] for e in range(shape[0])]
        grid, own = np.array(rows, dtype=object), own[1:]
    if len(suffixes) == 1:
        return grid[..., 0], own
    return grid, own[1:]


def _prefixed(prefix: str, grid: np.ndarray) -> np.ndarray:
    return np.asarray(prefix + grid, dtype=object)
