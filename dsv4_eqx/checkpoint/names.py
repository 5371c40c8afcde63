"""The names that tensors have in checkpoints, and where they go in the model.

Two namings are published: DeepSeek's own and Hugging Face's. Every tensor is a leaf of
the model or a slice of one, in the same element order; files only merge some dimensions
that we keep apart. This table is the one place that knows.

A third naming is what transformers writes: it turns its own names back into DeepSeek's
by patterns that catch only some of them, others for a model that it loaded than for one
that it made. What is certain is a tensor for each expert under a `model.` prefix. Of a
model that it loaded under its own names it renames nothing but some norms.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsv4_eqx.model.dspark import DSpark
from dsv4_eqx.numerics.lora_weight import stands_for_array


class _Row(NamedTuple):
    """A leaf's published names; two names fill the two halves of its `2` dimension.

    `{expert}` stands for one tensor for each expert.
    """

    official: str  # one name, or two with a space between them
    hf: str
    merged: tuple[int, int] = (0, 0)  # dimensions of the leaf that are one in the file


def _compressor(official: str, hf: str) -> dict[str, _Row]:
    return {
        "value": _Row(f"{official}.wkv.weight", f"{hf}.kv_proj.weight", (0, 2)),
        "gate": _Row(f"{official}.wgate.weight", f"{hf}.gate_proj.weight", (0, 2)),
        "position_bias": _Row(f"{official}.ape", f"{hf}.position_bias", (1, 3)),
        "norm.weight": _Row(f"{official}.norm.weight", f"{hf}.kv_norm.weight"),
    }


def _hyper(official: str, hf: str) -> dict[str, _Row]:
    return {
        "weight": _Row(f"{official}_fn", f"{hf}fn", (1, 3)),
        "base": _Row(f"{official}_base", f"{hf}base"),
        "scale": _Row(f"{official}_scale", f"{hf}scale"),
    }


def _under(prefix: str, rows: dict[str, _Row]) -> dict[str, _Row]:
    return {f"{prefix}.{path}": row for path, row in rows.items()}


_ATTENTION: Final = {
    "query_down": _Row("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "query_norm.weight": _Row("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "query_up": _Row("attn.wq_b.weight", "self_attn.q_b_proj.weight", (0, 2)),
    "key_value": _Row("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "key_value_norm.weight": _Row("attn.kv_norm.weight", "self_attn.kv_norm.weight"),
    "sinks": _Row("attn.attn_sink", "self_attn.sinks"),
    "output_down.weight": _Row("attn.wo_a.weight", "self_attn.o_a_proj.weight", (0, 2)),
    "output_up": _Row("attn.wo_b.weight", "self_attn.o_b_proj.weight", (1, 3)),
    **_under("compressor", _compressor("attn.compressor", "self_attn.compressor")),
    **_under(
        "indexer.compressor",
        _compressor("attn.indexer.compressor", "self_attn.compressor.indexer"),
    ),
    "indexer.query_up": _Row(
        "attn.indexer.wq_b.weight",
        "self_attn.compressor.indexer.q_b_proj.weight",
        (0, 2),
    ),
    "indexer.head_weights": _Row(
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
}
_MOE: Final = {
    "router.weight": _Row("ffn.gate.weight", "mlp.gate.weight"),
    "router.bias": _Row("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "router.table": _Row("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    "experts.gate_up": _Row(
        "ffn.experts.{expert}.w1.weight ffn.experts.{expert}.w3.weight",
        "mlp.experts.gate_up_proj",
        (1, 3),
    ),
    "experts.down": _Row("ffn.experts.{expert}.w2.weight", "mlp.experts.down_proj"),
    "shared.gate_up": _Row(
        "ffn.shared_experts.w1.weight ffn.shared_experts.w3.weight",
        "mlp.shared_experts.gate_proj.weight mlp.shared_experts.up_proj.weight",
    ),
    "shared.down": _Row(
        "ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"
    ),
}
_BLOCK: Final = {
    "attention_norm.weight": _Row("attn_norm.weight", "input_layernorm.weight"),
    "moe_norm.weight": _Row("ffn_norm.weight", "post_attention_layernorm.weight"),
    **_under("attention_connection", _hyper("hc_attn", "attn_hc.")),
    **_under("moe_connection", _hyper("hc_ffn", "ffn_hc.")),
    **_under("attention", _ATTENTION),
    **_under("moe", _MOE),
}
_TOP: Final = {
    "embedding": _Row("embed.weight", "model.embed_tokens.weight"),
    "unembedding": _Row("head.weight", "lm_head.weight"),
    "norm.weight": _Row("norm.weight", "model.norm.weight"),
    **_under("head", _hyper("hc_head", "model.hc_head.hc_")),
}
# Hugging Face has no prediction block: the official names stand in both columns.
_MTP: Final = {
    "embedding_norm.weight": _Row("enorm.weight", "enorm.weight"),
    "embedding_in": _Row("e_proj.weight", "e_proj.weight"),
    "streams_norm.weight": _Row("hnorm.weight", "hnorm.weight"),
    "streams_in": _Row("h_proj.weight", "h_proj.weight"),
    "norm.weight": _Row("norm.weight", "norm.weight"),
    **_under("head", _hyper("hc_head", "hc_head_")),
    **{f"block.{path}": row._replace(hf=row.official) for path, row in _BLOCK.items()},
}
# Of the drafter; the number before is that of the stage that has it, first or last.
_DSPARK: Final = {
    "main_in": _Row("0 main_proj.weight", "", (1, 3)),
    "main_norm.weight": _Row("0 main_norm.weight", ""),
    "norm.weight": _Row("-1 norm.weight", ""),
    **_under("head", _hyper("-1 hc_head", "")),
    "markov_in": _Row("-1 markov_head.markov_w1.weight", ""),
    "markov_out": _Row("-1 markov_head.markov_w2.weight", ""),
    "confidence": _Row("-1 confidence_head.proj.weight", ""),
}


_MIXED: Final = re.compile(r"^model\.layers\.\d+\.(?:ffn|mlp)\.experts\.\d+\.w[123]\.")
# In this order, each on what the ones before have left.
_TO_OFFICIAL: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.compressor\.indexer\.(?:q_b_proj|wq_b)\.", ".indexer.wq_b."),
        (
            r"\.compressor\.indexer\.(?:scorer\.)?weights_proj\.",
            ".indexer.weights_proj.",
        ),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.position_bias$", ".ape"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"\.weight_scale_inv$", ".scale"),
    )
)
# On the names of Hugging Face, where those are not mixed.
_TO_HF: Final = (
    (
        re.compile(
            r"^(model\.layers\.\d+\.self_attn\.(?:compressor\.(?:indexer\.)?)?)norm\."
        ),
        r"\1kv_norm.",
    ),
)


class Source(NamedTuple):
    """The tensors that a leaf is made of: one for each index of leading dimensions."""

    path: str  # of the leaf in the model
    names: np.ndarray  # of str; its shape is a prefix of the leaf's
    part_shape: tuple[int, ...]  # of the part of the leaf that one tensor fills
    merged: tuple[int, int]  # first and last + 1 of its dimensions that the file merges

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the file."""
        first, last = self.merged
        shape = self.part_shape
        return (*shape[:first], math.prod(shape[first:last]), *shape[last:])


def sources(model: Any, *, official: bool) -> Iterator[tuple[Source, Any]]:
    """The tensors of every array, or what stands for one, in either naming."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=stands_for_array)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        prefixes, row, is_stacked = _locate(name, model.layers, official)
        suffixes = (row.official if official else row.hf).split()
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        grid, part_shape = _grid(suffixes, shape)
        names = [np.asarray(prefix + grid, dtype=object) for prefix in prefixes]
        names = np.stack(names) if is_stacked else names[0]
        yield Source(name, names, part_shape, _merged(row, shape, part_shape)), leaf


def drafter_sources(drafter: DSpark) -> Iterator[tuple[Source, Any]]:
    """The tensors of every array of a drafter, which has official names alone."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(drafter, is_leaf=stands_for_array)
    last = len(drafter.stages) - 1
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith("stages."):
            _, stage, rest = name.split(".", 2)
            row = _BLOCK[rest]
            suffixes = row.official.split()
        else:
            row = _DSPARK[name]
            place, *suffixes = row.official.split()
            stage = 0 if place == "0" else last
        grid, part_shape = _grid(suffixes, leaf.shape)
        names = np.asarray(f"mtp.{stage}." + grid, dtype=object)
        merged = _merged(row, leaf.shape, part_shape)
        yield Source(name, names, part_shape, merged), leaf


def _merged(
    row: _Row, shape: tuple[int, ...], part_shape: tuple[int, ...]
) -> tuple[int, int]:
    """A row's merged dimensions among those that a tensor fills; (0, 1) if none are."""
    first, last = (dim - len(shape) + len(part_shape) for dim in row.merged)
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
    suffixes: list[str], shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The names that fill an array of `shape`, and the shape that each fills."""
    grid = np.array(suffixes, dtype=object)
    if "{expert}" in suffixes[0]:
        rows = [[name.format(expert=e) for name in suffixes] for e in range(shape[0])]
        grid, shape = np.array(rows, dtype=object), shape[1:]
    return (grid[..., 0], shape) if len(suffixes) == 1 else (grid, shape[1:])


def is_mixed(names: Iterable[str]) -> bool:
    """Whether these are the mixed names, of a model that transformers saved."""
    return any(_MIXED.match(name) for name in names)


def published_names(names: Iterable[str], *, mixed: bool) -> dict[str, str]:
    """The published name that each name means -> that name; official ones of mixed."""
    prefix, patterns = ("model.", _TO_OFFICIAL) if mixed else ("", _TO_HF)
    found = {}
    for name in names:
        meant = name.removeprefix(prefix)
        for pattern, replacement in patterns:
            meant = pattern.sub(replacement, meant)
        if meant in found:
            raise ValueError(f"{found[meant]} and {name} are the same tensor, {meant}")
        found[meant] = name
    return found
