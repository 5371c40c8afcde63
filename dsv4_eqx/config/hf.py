"""Reading a Hugging Face `config.json` of a DeepSeek-V4 into the fields of `Config`.

Two forms are in use: the release's (`compress_ratios`, `num_hash_layers`,
`qk_rope_head_dim`, `rope_scaling`) and the one that transformers writes (`layer_types`,
`compress_rates`, `mlp_layer_types`, `rope_parameters`).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

from dsv4_eqx.config.drafter import drafter_from_hf
from dsv4_eqx.config.files import read_json, whole_numbers
from dsv4_eqx.config.hf_keys import (
    CALL,
    FIXED,
    SCHEDULE,
    has_drafter,
    validate_keys,
    warn_of_unread,
)
from dsv4_eqx.config.hf_rotary import mapping, rotary_from_hf, yarn_to_hf
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, KIND_OF_RATIO, SLIDING, TOPK_MOE
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_int,
    shown,
    validate_int,
)

_TOKEN_IDS: Final = {"bos_token_id": 0, "eos_token_id": 1}  # transformers' defaults
_FRACTION: Final = "partial_rotary_factor"
_LISTS: Final = ("layer_types", "compress_ratios", "mlp_layer_types")


def fields_from_hf(
    source: str | os.PathLike | Mapping[str, Any],
    fields: Sequence[dataclasses.Field],
    num_hidden_layers: int | None,
) -> dict[str, Any]:
    """The values of `Config`'s fields in `source`; it checks most ranges itself."""
    raw = source if isinstance(source, Mapping) else read_json(CALL, source)
    raw = {
        key: value
        for key, value in whole_numbers(raw).items()
        if value is not None or key not in SCHEDULE
    }
    names = {field.name for field in fields}
    validate_keys(raw, names)
    rotary = rotary_from_hf(raw)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    _refuse_missing(raw.keys() | rotary.keys(), required)
    if num_hidden_layers is None:
        drafter_from_hf(raw)  # to refuse one that fits no model
    else:
        raw = _cut(raw, num_hidden_layers)
    values = _TOKEN_IDS | {name: raw[name] for name in (names - SCHEDULE) & raw.keys()}
    values |= _schedule_from_hf(raw) | rotary
    if has_drafter(raw):
        values["num_nextn_predict_layers"] = 0
    warn_of_unread(raw, names)
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    }


def fields_to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`Config`'s fields as `fields_from_hf` reads them back, and transformers too."""
    kinds, ratios = fields["layer_types"], fields["compress_ratios"]
    rates = {kind: ratio for kind, ratio in zip(kinds, ratios) if kind != SLIDING}
    written = {"architectures": ["DeepseekV4ForCausalLM"]} | FIXED
    for name, value in fields.items():
        written[name] = list(value) if isinstance(value, tuple) else value
    if all(rates.get(kind, 0) == ratio for kind, ratio in zip(kinds, ratios)):
        # transformers looks both up, whichever kinds of layers there are.
        written["compress_rates"] = {CSA: 4, HCA: 128} | rates
    written["compress_ratios"] += [0] * fields["num_nextn_predict_layers"]
    written["rope_scaling"] = yarn_to_hf(fields["rope_scaling"])
    return written


def generation_to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers writes of these fields into `generation_config.json`."""
    given = {name: fields[name] for name in _TOKEN_IDS if fields[name] is not None}
    ids = {name: list(x) if isinstance(x, tuple) else x for name, x in given.items()}
    return {"_from_model_config": True} | ids if ids else {}


def _refuse_missing(given: Set[str], required: Set[str]) -> None:
    missing = sorted(required - SCHEDULE - given)
    # There is no default schedule: transformers' has the opposite phase of the
    # released models.
    for names in ("compress_ratios", "layer_types"), ("qk_rope_head_dim", _FRACTION):
        if given.isdisjoint(names):
            missing.append(" or ".join(names))
    if missing:
        raise ValueError(
            f"{CALL}: missing keys {missing}, which the configuration of a DeepSeek-V4 "
            "has; add them as they are for these weights."
        )


def _cut(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The first layers of a configuration, with its prediction blocks."""
    name, hashed = "num_hidden_layers", raw.get("num_hash_layers")
    layers = validate_int(CALL, name, raw[name])
    layers = validate_int(CALL, name, num_layers, most=layers)
    cut: dict[str, Any] = {name: layers}
    for key in _LISTS:
        if isinstance(raw.get(key), list):
            cut[key] = raw[key][:layers]
    if isinstance(hashed, int):
        cut["num_hash_layers"] = min(hashed, layers)
    return {**raw, **cut}


def _schedule_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    layers = validate_int(CALL, "num_hidden_layers", raw["num_hidden_layers"])
    kinds = _list(raw, "layer_types", layers)
    ratios = _list(raw, "compress_ratios", layers)
    rates = _rates(raw)
    if kinds is None:
        kinds = [_kind_of(ratio) for ratio in ratios or ()]
    if ratios is None:
        rates = {CSA: 4, HCA: 128} | rates
        ratios = [rates.get(kind, 0) if isinstance(kind, str) else 0 for kind in kinds]
    for kind, ratio in zip(kinds, ratios):
        if isinstance(kind, str) and rates.get(kind, ratio) != ratio:
            allowed = f"{rates[kind]} in {kind!r}, as in compress_rates"
            raise invalid_argument(CALL, "compress_ratios", ratios, allowed)
    mlp_kinds = _mlp_kinds(raw, layers)
    return dict(layer_types=kinds, compress_ratios=ratios, mlp_layer_types=mlp_kinds)


def _list(raw: Mapping[str, Any], key: str, layers: int) -> list[Any] | None:
    """A list's entries for the layers, or None where it is absent or null."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list):
        raise invalid_argument(CALL, key, value, "a list")
    found = f"{CALL}: {key} has {len(value)} entries, num_hidden_layers is {layers}"
    if len(value) < layers:
        raise ValueError(f"{found}; it needs one for each layer.")
    # Only ratios go on, for the prediction blocks, or for those of DSpark's drafter.
    tail = value[layers:]
    is_ratios = key == "compress_ratios"
    if tail and not (is_ratios and all(is_int(entry) and entry == 0 for entry in tail)):
        zeros = ", but for zeros of the prediction blocks" if is_ratios else ""
        raise ValueError(
            f"{found}; nothing may follow the layers{zeros}, and {shown(tail)} does. "
            "The first layers of a larger model are read by "
            f"from_hf(..., num_hidden_layers={layers})."
        )
    blocks = raw.get("num_nextn_predict_layers", 0)
    if tail and is_int(blocks) and blocks > len(tail):
        allowed = f"at most {len(tail)}, the zeros of compress_ratios after the layers"
        raise invalid_argument(CALL, "num_nextn_predict_layers", blocks, allowed)
    return value[:layers]


def _kind_of(ratio: Any) -> str:
    if not is_int(ratio) or ratio not in KIND_OF_RATIO:
        raise ValueError(
            f"{CALL}: compress_ratios has {shown(ratio)}, whose kind is not known "
            f"(known: {KIND_OF_RATIO}); name the kinds in layer_types."
        )
    return KIND_OF_RATIO[ratio]


def _mlp_kinds(raw: Mapping[str, Any], layers: int) -> Sequence[Any]:
    kinds, hashed = _list(raw, "mlp_layer_types", layers), raw.get("num_hash_layers")
    if hashed is not None and not (is_int(hashed) and 0 <= hashed <= layers):
        allowed = f"an integer in [0, {layers}], as there are {layers} layers"
        raise invalid_argument(CALL, "num_hash_layers", hashed, allowed)
    if kinds is not None and hashed is None:
        return kinds
    num_hashed = min(3, layers) if hashed is None else hashed
    expected = [HASH_MOE] * num_hashed + [TOPK_MOE] * (layers - num_hashed)
    if kinds is not None and list(kinds) != expected:
        allowed = f"that of num_hash_layers={hashed}, which is given too"
        raise invalid_argument(CALL, "mlp_layer_types", kinds, allowed)
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
            raise invalid_argument(CALL, "compress_rates", rates, allowed)
    return rates
