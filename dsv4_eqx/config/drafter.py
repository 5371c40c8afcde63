"""The sizes of DSpark, the drafter that newer releases have for a prediction block.

Its blocks come after the main layers: they slide and route by score. Only the four keys
that begin with `dspark_`, and the zeros of `compress_ratios` after the layers, say that
it is there; `num_nextn_predict_layers` does not.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Final

from dsv4_eqx.config.files import read_json, whole_numbers
from dsv4_eqx.numerics.validation import (
    as_python,
    invalid_argument,
    is_int,
    validate_int,
)

_CALL: Final = "DSparkConfig.from_hf"
_PREFIX: Final = "dspark_"
_KEYS: Final = ("block_size", "noise_token_id", "target_layer_ids", "markov_rank")
_STAGES: Final = 3  # of every release


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkConfig:
    """The sizes of a drafter, beside those of its model's `Config`.

    **Arguments:**

    - `block_size`: tokens that it drafts at a time.
    - `noise_token_id`: token that stands for those which are not known yet.
    - `target_layer_ids`: layers whose streams it reads, in increasing order.
    - `markov_rank`: channels of the correction by the token before.
    - `num_stages`: blocks.

    **Raises:** ValueError naming the field, its value and what is allowed.
    """

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int
    num_stages: int = _STAGES

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "target_layer_ids":
                value = _increasing(value)
            else:
                least = 0 if name == "noise_token_id" else 1
                value = validate_int("DSparkConfig", name, value, least=least)
            object.__setattr__(self, name, value)

    @classmethod
    def from_hf(
        cls, source: str | os.PathLike | Mapping[str, Any]
    ) -> "DSparkConfig | None":
        """Reads a Hugging Face configuration; None where it has no drafter.

        Where the file does not say, as transformers writes it, there are 3 blocks.

        **Arguments:**

        - `source`: a `config.json`, a directory that holds one, or its mapping.

        **Raises:** ValueError if some of its keys are missing, or do not fit the model;
        FileNotFoundError without a file.
        """
        raw = source if isinstance(source, Mapping) else read_json(_CALL, source)
        return drafter_from_hf(whole_numbers(raw))

    def to_hf(self) -> dict[str, Any]:
        """Its keys of a Hugging Face configuration, without the stages' ratios."""
        values = {_PREFIX + name: getattr(self, name) for name in _KEYS}
        return values | {f"{_PREFIX}target_layer_ids": list(self.target_layer_ids)}


def drafter_from_hf(raw: Mapping[str, Any]) -> DSparkConfig | None:
    """The drafter's sizes, validated against the model's."""
    size = f"{_PREFIX}block_size"
    values: dict[str, Any] = {name: raw.get(_PREFIX + name) for name in _KEYS}
    given = [name for name, value in values.items() if value is not None]
    if raw.get(size) is not None and validate_int(_CALL, size, raw[size], least=0) == 0:
        return None
    if not given:
        return None
    if len(given) < len(_KEYS):
        missing = [_PREFIX + name for name in _KEYS if name not in given]
        raise ValueError(
            f"{_CALL}: the configuration has {_PREFIX}{given[0]} and lacks {missing}; "
            "a drafter needs all four keys, and a model without one has none."
        )
    ratios: Any = raw.get("compress_ratios")
    layers: Any = raw.get("num_hidden_layers")
    if isinstance(ratios, list) and is_int(layers) and len(ratios) > layers:
        values["num_stages"] = len(ratios) - layers
    if isinstance(values["target_layer_ids"], list):
        values["target_layer_ids"] = tuple(values["target_layer_ids"])
    found = DSparkConfig(**values)
    _validate_fit(found, raw)
    return found


def _validate_fit(found: DSparkConfig, raw: Mapping[str, Any]) -> None:
    limits = {
        "noise_token_id": (found.noise_token_id, "vocab_size"),
        "target_layer_ids": (found.target_layer_ids[-1], "num_hidden_layers"),
    }
    for name, (value, size) in limits.items():
        most: Any = raw.get(size)
        if is_int(most) and value >= most:
            given = raw[_PREFIX + name]
            allowed = f"below {size}={most}"
            raise invalid_argument(_CALL, _PREFIX + name, given, allowed)


def _increasing(value: Any) -> tuple[int, ...]:
    """Layer ids; ValueError if they are not increasing integers from 0."""
    ids = tuple(map(as_python, value)) if isinstance(value, list | tuple) else ()
    is_right = bool(ids) and all(is_int(layer) and layer >= 0 for layer in ids)
    if not is_right or any(a >= b for a, b in zip(ids, ids[1:])):
        allowed = "increasing layer numbers, at least one, from 0"
        raise invalid_argument("DSparkConfig", "target_layer_ids", value, allowed)
    return ids
