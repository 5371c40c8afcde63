"""Reading a Hugging Face `config.json` of a DeepSeek-V4 into the fields of `Config`.

Two forms are in use: the release's (`compress_ratios`, `num_hash_layers`,
`qk_rope_head_dim`, `rope_scaling`) and the one that transformers writes (`layer_types`,
`compress_rates`, `mlp_layer_types`, `rope_parameters`).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dsv4_eqx.primitives.rotary import YarnScaling

SLIDING: Final = "sliding_attention"
CSA: Final = "compressed_sparse_attention"
HCA: Final = "heavily_compressed_attention"
HASH_MOE: Final = "hash_moe"
TOPK_MOE: Final = "moe"

KIND_OF_RATIO: Final = {0: SLIDING, 4: CSA, 128: HCA}

# What every DeepSeek-V4 shares: another value is another model.
_FIXED: Final[dict[str, Any]] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
# Keys that say nothing about the arrays' shapes or the mathematics.
_IGNORED: Final = frozenset(
    "architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "expert_dtype id2label is_encoder_decoder label2id output_attentions "
    "output_hidden_states output_router_logits pad_token_id problem_type "
    "quantization_config return_dict router_aux_loss_coef router_jitter_noise "
    "torch_dtype transformers_version use_cache _name_or_path "
    "_experts_implementation".split()
)
_SCHEDULE: Final = frozenset(
    "layer_types compress_ratios compress_rates compress_rate_csa compress_rate_hca "
    "mlp_layer_types num_hash_layers rope_scaling rope_parameters "
    "partial_rotary_factor qk_rope_head_dim rope_theta compress_rope_theta".split()
)


def fields_from_hf(
    source: str | os.PathLike | Mapping[str, Any],
    fields: Sequence[dataclasses.Field],
) -> dict[str, Any]:
    """The values of `Config`'s `fields` in `source`; see `Config.from_hf`."""
    raw = dict(source) if isinstance(source, Mapping) else _read_json(source)
    for key, value in _FIXED.items():
        if raw.pop(key, value) != value:
            raise ValueError(
                f"Config.from_hf: {key} must be {value!r} for DeepSeek-V4."
            )
    names = {field.name for field in fields}
    plain = names - _SCHEDULE
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    unknown = sorted(raw.keys() - names - _SCHEDULE - _IGNORED)
    missing = sorted((required & plain) - raw.keys())
    if unknown or missing:
        raise ValueError(
            f"Config.from_hf: unknown keys {unknown}, missing keys {missing}; this "
            "is not the configuration of a DeepSeek-V4."
        )
    values = {name: raw[name] for name in plain & raw.keys()}
    return values | _schedule_from_hf(raw) | _rotary_from_hf(raw)


def _read_json(source: str | os.PathLike) -> dict[str, Any]:
    path = pathlib.Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Config.from_hf: {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"Config.from_hf: {path} holds no JSON object.")
    return raw


def _schedule_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"Config.from_hf: num_hidden_layers is {layers!r}.")
    kinds = raw.get("layer_types")
    ratios = raw.get("compress_ratios")
    if kinds is None and ratios is None:
        raise ValueError(
            "Config.from_hf: give compress_ratios or layer_types; there is no default "
            "schedule (transformers' has the opposite phase of the released models)."
        )
    if ratios is not None:
        tail = ratios[layers:]
        if len(ratios) < layers or any(tail):
            raise ValueError(
                f"Config.from_hf: compress_ratios has {len(ratios)} entries with the "
                f"tail {tail} for {layers} layers; it needs one for each layer, then "
                "zeros for the prediction blocks."
            )
        ratios = ratios[:layers]
    if kinds is None:
        ratios = ratios or ()
        unknown = sorted(set(ratios) - KIND_OF_RATIO.keys(), key=str)
        if unknown:
            raise ValueError(
                f"Config.from_hf: compress_ratios has {unknown}, whose kind is not "
                f"known (known: {KIND_OF_RATIO}); name the kinds in layer_types."
            )
        kinds = [KIND_OF_RATIO[ratio] for ratio in ratios]
    if ratios is None:
        ratios = [_rates(raw).get(kind, 0) for kind in kinds]
    hashed = raw.get("num_hash_layers", 3)
    mlp_kinds = raw.get("mlp_layer_types")
    if mlp_kinds is None:
        mlp_kinds = [HASH_MOE if i < hashed else TOPK_MOE for i in range(layers)]
    return dict(
        layer_types=tuple(kinds),
        compress_ratios=tuple(ratios),
        mlp_layer_types=tuple(mlp_kinds),
    )


def _rates(raw: Mapping[str, Any]) -> dict[str, int]:
    rates = {CSA: 4, HCA: 128, **(raw.get("compress_rates") or {})}
    legacy = {CSA: raw.get("compress_rate_csa"), HCA: raw.get("compress_rate_hca")}
    return rates | {kind: rate for kind, rate in legacy.items() if rate is not None}


def _rotary_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    nested = raw.get("rope_parameters") or {}
    main, compress = nested.get("main", {}), nested.get("compress", {})
    scaling = compress or nested or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"Config.from_hf: rope type {kind!r}; 'default' or 'yarn'.")
    fraction = main.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    rotary_dim = raw.get("qk_rope_head_dim")
    if rotary_dim is None:
        if fraction is None:
            raise ValueError(
                "Config.from_hf: give qk_rope_head_dim or partial_rotary_factor."
            )
        rotary_dim = int(raw["head_dim"] * fraction)
    return dict(
        qk_rope_head_dim=rotary_dim,
        rope_theta=main.get("rope_theta", raw.get("rope_theta", 10000.0)),
        compress_rope_theta=compress.get(
            "rope_theta", raw.get("compress_rope_theta", 160000.0)
        ),
        rope_scaling=_yarn(scaling) if kind == "yarn" else None,
    )


def _yarn(scaling: Mapping[str, Any]) -> YarnScaling:
    missing = {"factor", "original_max_position_embeddings"} - scaling.keys()
    if missing:
        raise ValueError(f"Config.from_hf: rope scaling lacks {sorted(missing)}.")
    return YarnScaling(
        factor=scaling["factor"],
        original_max_position=scaling["original_max_position_embeddings"],
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
    )
