"""Reading a Hugging Face `config.json` of a DeepSeek-V4 into the fields of `Config`.

Two forms are in use: the release's (`compress_ratios`, `num_hash_layers`,
`qk_rope_head_dim`, `rope_scaling`) and the one that transformers writes (`layer_types`,
`compress_rates`, `mlp_layer_types`, `rope_parameters`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dsv4_eqx.config.hf_rotary import mapping, rotary_from_hf, unnested, yarn_to_hf
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, KIND_OF_RATIO, SLIDING, TOPK_MOE
from dsv4_eqx.numerics.validation import invalid_argument, is_int, path_of, shown

_CALL: Final = "Config.from_hf"

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
# Keys that say nothing about the arrays' shapes, the mathematics, or the files.
NOT_OF_THE_MODEL: Final = frozenset(
    "auto_map bos_token_id chunk_size_feed_forward eos_token_id id2label "
    "is_encoder_decoder label2id output_attentions output_hidden_states "
    "output_router_logits pad_token_id problem_type return_dict router_aux_loss_coef "
    "router_jitter_noise transformers_version use_cache _name_or_path "
    "_experts_implementation".split()
)
_OF_FILES: Final = frozenset(
    "architectures dtype expert_dtype quantization_config torch_dtype".split()
)
_SCHEDULE: Final = frozenset(
    "layer_types compress_ratios compress_rates compress_rate_csa compress_rate_hca "
    "mlp_layer_types num_hash_layers rope_scaling rope_parameters "
    "partial_rotary_factor qk_rope_head_dim rope_theta compress_rope_theta".split()
)
_EITHER: Final = (
    ("compress_ratios", "layer_types"),
    ("qk_rope_head_dim", "partial_rotary_factor"),
)


def fields_from_hf(
    source: str | os.PathLike | Mapping[str, Any],
    fields: Sequence[dataclasses.Field],
) -> dict[str, Any]:
    """The values of `Config`'s `fields` in `source`; see `Config.from_hf`.

    **Arguments:**

    - `source`: a `config.json`, a directory that holds one, or its mapping.
    - `fields`: of `Config`.

    **Raises:** as `Config.from_hf`; most values' ranges are left to `Config`.
    """
    raw = dict(source) if isinstance(source, Mapping) else _read_json(source)
    for key, value in _FIXED.items():
        found = raw.pop(key, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise invalid_argument(_CALL, key, found, f"{value!r} for a DeepSeek-V4")
    raw = unnested(raw)
    names = {field.name for field in fields}
    plain = names - _SCHEDULE
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    known = names | _SCHEDULE | NOT_OF_THE_MODEL | _OF_FILES
    unknown = sorted(map(str, raw.keys() - known))
    missing = sorted((required & plain) - raw.keys())
    # There is no default schedule: transformers' has the opposite phase of the
    # released models.
    for either, other in _EITHER:
        if raw.get(either) is None and raw.get(other) is None:
            missing.append(f"{either} or {other}")
    if unknown or missing:
        raise ValueError(
            f"{_CALL}: unknown keys {unknown}, missing keys {missing}; this is not the "
            "configuration of a DeepSeek-V4."
        )
    values = {name: raw[name] for name in plain & raw.keys()}
    return values | _schedule_from_hf(raw) | rotary_from_hf(raw)


def fields_to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `fields_from_hf` reads back, and transformers too; see `Config.to_hf`.

    **Arguments:**

    - `fields`: of `Config`, by name.
    """
    kinds, ratios = fields["layer_types"], fields["compress_ratios"]
    rates = {kind: ratio for kind, ratio in zip(kinds, ratios) if kind != SLIDING}
    written = {"architectures": ["DeepseekV4ForCausalLM"]} | _FIXED | dict(fields)
    if all(rates.get(kind, 0) == ratio for kind, ratio in zip(kinds, ratios)):
        # transformers looks both up, whichever kinds of layers there are.
        written["compress_rates"] = {CSA: 4, HCA: 128} | rates
    return written | {
        "layer_types": list(kinds),
        "compress_ratios": [*ratios, *[0] * fields["num_nextn_predict_layers"]],
        "mlp_layer_types": list(fields["mlp_layer_types"]),
        "rope_scaling": yarn_to_hf(fields["rope_scaling"]),
    }


def _read_json(source: str | os.PathLike) -> dict[str, Any]:
    path = path_of(_CALL, "source", source)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_CALL}: {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{_CALL}: {path} holds {shown(raw)}, not a JSON object.")
    return raw


def _schedule_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    if not is_int(layers) or layers < 1:
        raise invalid_argument(
            _CALL, "num_hidden_layers", layers, "an integer, at least 1"
        )
    kinds, ratios = _list(raw, "layer_types", layers), _ratios(raw, layers)
    rates = _rates(raw)
    if kinds is None:
        kinds = [_kind_of(ratio) for ratio in ratios or ()]
    if ratios is None:
        rates = {CSA: 4, HCA: 128} | rates
        ratios = [rates.get(kind, 0) if isinstance(kind, str) else 0 for kind in kinds]
    for kind, ratio in zip(kinds, ratios):
        if isinstance(kind, str) and rates.get(kind, ratio) != ratio:
            allowed = f"{rates[kind]} in {kind!r}, as in compress_rates"
            raise invalid_argument(_CALL, "compress_ratios", ratios, allowed)
    return dict(
        layer_types=tuple(kinds),
        compress_ratios=tuple(ratios),
        mlp_layer_types=tuple(_mlp_kinds(raw, layers)),
    )


def _list(raw: Mapping[str, Any], key: str, layers: int) -> Sequence[Any] | None:
    """A list with an entry for each layer, or None where it is absent or null."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise invalid_argument(_CALL, key, value, "a list")
    if len(value) < layers:
        raise ValueError(
            f"{_CALL}: {key} has {len(value)} entries, num_hidden_layers is {layers}; "
            "it needs one for each layer."
        )
    return value


def _ratios(raw: Mapping[str, Any], layers: int) -> Sequence[Any] | None:
    ratios = _list(raw, "compress_ratios", layers)
    if ratios is None:
        return None
    tail = ratios[layers:]
    if not all(is_int(ratio) and ratio == 0 for ratio in tail):
        raise ValueError(
            f"{_CALL}: compress_ratios has {len(ratios)} entries with the tail "
            f"{shown(tail)} for {layers} layers; it needs one for each layer, then "
            "zeros for the prediction blocks."
        )
    # It may be longer: DSpark's draft blocks come after the prediction block.
    blocks = raw.get("num_nextn_predict_layers", 0)
    if tail and is_int(blocks) and blocks > len(tail):
        allowed = f"at most {len(tail)}, the zeros of compress_ratios after the layers"
        raise invalid_argument(_CALL, "num_nextn_predict_layers", blocks, allowed)
    return ratios[:layers]


def _kind_of(ratio: Any) -> str:
    if not is_int(ratio) or ratio not in KIND_OF_RATIO:
        raise ValueError(
            f"{_CALL}: compress_ratios has {shown(ratio)}, whose kind is not known "
            f"(known: {KIND_OF_RATIO}); name the kinds in layer_types."
        )
    return KIND_OF_RATIO[ratio]


def _mlp_kinds(raw: Mapping[str, Any], layers: int) -> Sequence[Any]:
    kinds, hashed = _list(raw, "mlp_layer_types", layers), raw.get("num_hash_layers")
    if hashed is not None and not (is_int(hashed) and 0 <= hashed <= layers):
        allowed = f"an integer in [0, {layers}], as there are {layers} layers"
        raise invalid_argument(_CALL, "num_hash_layers", hashed, allowed)
    if kinds is not None and hashed is None:
        return kinds
    num_hashed = min(3, layers) if hashed is None else hashed
    expected = [HASH_MOE] * num_hashed + [TOPK_MOE] * (layers - num_hashed)
    if kinds is not None and list(kinds) != expected:
        allowed = f"that of num_hash_layers={hashed}, which is given too"
        raise invalid_argument(_CALL, "mlp_layer_types", kinds, allowed)
    return expected


def _rates(raw: Mapping[str, Any]) -> dict[str, int]:
    """Tokens in an entry of each kind that the file gives them for."""
    rates = dict(mapping(raw, "compress_rates"))
    for kind, key in ((CSA, "compress_rate_csa"), (HCA, "compress_rate_hca")):
        if raw.get(key) is not None:
            rates[kind] = raw[key]
    for kind, rate in rates.items():
        if kind not in (CSA, HCA) or not is_int(rate) or rate < 1:
            allowed = f"an integer, at least 1, for {CSA!r} and {HCA!r}"
            raise invalid_argument(_CALL, "compress_rates", rates, allowed)
    return rates
