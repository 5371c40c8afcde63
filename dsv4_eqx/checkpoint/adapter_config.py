"""PEFT's `adapter_config.json`: which parameters have adapters, rank and alpha."""

import pathlib
from collections.abc import Iterable
from typing import Any, Final

from dsv4_eqx.checkpoint.faults import naming
from dsv4_eqx.checkpoint.tensors import open_regular, parse_json
from dsv4_eqx.config.config import Config
from dsv4_eqx.numerics.validation import is_int, is_number, shown

# Endings of transformers' parameters that PEFT adapts as parameters, not as modules.
GROUPED: Final = "o_a_proj.weight"
GATE_UP: Final = "experts.gate_up_proj"
STACKED: Final = (GATE_UP, "experts.down_proj")
_MOST_JSON_BYTES: Final = 1 << 20
_MOST_RANK: Final = 1 << 14  # beyond the width of any released model
# What changes an adapter's meaning, and what it must be.
_PLAIN: Final = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
}


def adapter_config(
    config: Config,
    parameters: Iterable[str],
    rank: int,
    alpha: float,
    base_model: str | None,
) -> dict[str, Any]:
    """PEFT's configuration of adapters for some of transformers' parameters."""
    endings: dict[str, list[str]] = {}
    for name in parameters:
        endings.setdefault(".".join(name.split(".")[3:]), []).append(name)
    targets = []  # without the layers where all of them have adapters
    for ending, full in endings.items():
        targets += [ending] if len(full) == config.num_hidden_layers else full
    as_parameters = [x for x in targets if x.endswith((*STACKED, GROUPED))]
    as_modules = [x.removesuffix(".weight") for x in targets if x not in as_parameters]
    groups = config.o_groups
    grouped = [x for x in as_parameters if x.endswith(GROUPED)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "target_modules": as_modules,
        "target_parameters": as_parameters or None,
        "rank_pattern": {name: groups * rank for name in grouped},
        "alpha_pattern": {name: _number(groups * alpha) for name in grouped},
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def read_adapter_config(path: pathlib.Path) -> dict[str, Any]:
    """PEFT's configuration; ValueError if it is of anything but plain LoRA."""
    with open_regular(path) as file:
        raw = file.read(_MOST_JSON_BYTES + 1)
    if len(raw) > _MOST_JSON_BYTES:
        raise ValueError(f"{path}: has more than {_MOST_JSON_BYTES} bytes")
    with naming(path):
        config = parse_json(raw)
        if not isinstance(config, dict):
            raise ValueError(f"is {shown(config)}, not a JSON object")
        for key, value in _PLAIN.items():
            if config.get(key, value) != value:
                raise ValueError(
                    f"has {key} {shown(config[key])}; only {value!r} is read here"
                )
        rank: Any = config.get("r")
        alpha: Any = config.get("lora_alpha")
        is_rank = is_int(rank) and 0 < rank <= _MOST_RANK
        if not (is_rank and is_number(alpha) and alpha > 0):
            raise ValueError(f"has r {shown(rank)} and lora_alpha {shown(alpha)}")
        _check_patterns(config, rank, alpha)
    return config


def _check_patterns(config: dict[str, Any], rank: int, alpha: float) -> None:
    """Refuses ranks and alphas of their own but for those of the grouped output."""
    ranks, alphas = (config.get(f"{x}_pattern") or {} for x in ("rank", "alpha"))
    for name in {**ranks, **alphas}:
        own = ranks.get(name, rank), alphas.get(name, alpha)
        is_same = all(map(is_number, own)) and own[0] * alpha == own[1] * rank
        if not name.endswith(GROUPED) or not is_same:
            raise ValueError(
                f"has a rank or an alpha of its own for {shown(name)}; all must have "
                "the same, as in what save_lora writes"
            )
