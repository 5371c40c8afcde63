"""The rotary embedding in a Hugging Face `config.json` of a DeepSeek-V4.

The release writes `qk_rope_head_dim`, `rope_theta`, `compress_rope_theta` and
`rope_scaling`; transformers nests the same in `rope_parameters` under `main` and
`compress`, and gives the rotary size as a fraction of the head. Whatever the form,
every value becomes one of `Config`'s fields first; then all values of a field are
compared.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dsv4_eqx.config.hf_keys import CALL, is_same
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_number,
    shown,
    validate_size,
)
from dsv4_eqx.primitives.rotary import YarnScaling

_REQUIRED: Final = ("factor", "original_max_position_embeddings")
_YARN: Final = (*_REQUIRED, "beta_fast", "beta_slow")
_NUMBERS: Final = (*_YARN, "rope_theta", "partial_rotary_factor")
# YaRN's temperature, which DeepSeek-V4 leaves out, and the rounding of its ramp.
_IDENTITY: Final = {
    "attention_factor": 1,
    "mscale": 1,
    "mscale_all_dim": 1,
    "truncate": True,
}
_KNOWN: Final = frozenset(_NUMBERS) | _IDENTITY.keys() | {"type", "rope_type"}


def mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside another, without its nulls; empty where it is absent or null."""
    value = parent.get(key)
    if not isinstance(value, Mapping | None):
        raise invalid_argument(CALL, key, value, "a mapping")
    return {k: v for k, v in (value or {}).items() if v is not None}


def rotary_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of `Config` that a configuration gives; no two may differ."""
    found: dict[str, tuple[Any, str]] = {}
    for field, value, place in _statements(raw):
        first, first_place = found.setdefault(field, (value, place))
        if value != first:
            raise ValueError(
                f"{CALL}: {field} is {shown(first)} by {first_place}, and "
                f"{shown(value)} by {place}: they must agree; leave one out."
            )
    return {field: value for field, (value, _) in found.items()}


def _statements(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Each value given: the field, the value and where it stands."""
    for field in ("qk_rope_head_dim", "rope_theta", "compress_rope_theta"):
        if raw.get(field) is not None:
            yield field, raw[field], "its own key"
    yield from _rotary_dim(raw, raw, "")
    for name, part, base in _parts(raw):
        _validate_part(name, part)
        if "rope_theta" in part:
            yield base, part["rope_theta"], name
        yield from _rotary_dim(raw, part, f" in {name}")
        yarn = _yarn(name, part)
        if base == "compress_rope_theta":
            yield "rope_scaling", yarn, name
        elif yarn is not None:
            raise invalid_argument(CALL, name, part, "without a scaling")


def _parts(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Name and mapping of each part that is not empty, and the base it gives."""
    nested = mapping(raw, "rope_parameters")
    flat = {"rope_scaling": mapping(raw, "rope_scaling")}
    if nested.keys() & {"main", "compress"}:
        if nested.keys() != {"main", "compress"}:
            allowed = "{'main': ..., 'compress': ...}, or like rope_scaling"
            raise invalid_argument(CALL, "rope_parameters", nested, allowed)
        yield "rope_parameters['main']", mapping(nested, "main"), "rope_theta"
        compress = mapping(nested, "compress")
        if compress:
            yield "rope_parameters['compress']", compress, "compress_rope_theta"
    else:
        flat["rope_parameters"] = nested
    for name, part in flat.items():
        # transformers overrides a base here by compress_rope_theta or its default.
        if "rope_theta" in part and raw.get("compress_rope_theta") is None:
            base = shown(part["rope_theta"])
            allowed = f"given, as {name} has the rope_theta {base}"
            raise invalid_argument(CALL, "compress_rope_theta", None, allowed)
        if part:
            yield name, part, "compress_rope_theta"


def _rotary_dim(
    raw: Mapping[str, Any], part: Mapping[str, Any], place: str
) -> Iterator[tuple[str, Any, str]]:
    """The rotary size that a fraction of the head gives, if there is one."""
    key, head_dim = "partial_rotary_factor", raw.get("head_dim")
    fraction = part.get(key)
    if fraction is None or head_dim is None:
        return  # without a head, that is what is said
    if not is_number(fraction) or not 0 < fraction <= 1:
        raise invalid_argument(CALL, key, fraction, "in (0, 1]")
    size = validate_size(CALL, "head_dim", head_dim) * fraction
    # Rounded: the product may be a hair off the integer that the quotient came from.
    if abs(size - round(size)) > 1e-6 * head_dim:
        allowed = f"a whole number of channels over head_dim={head_dim}"
        raise invalid_argument(CALL, key, fraction, allowed)
    yield "qk_rope_head_dim", round(size), f"{key}={fraction}{place}"


def _validate_part(name: str, part: Mapping[str, Any]) -> None:
    unknown = sorted(map(str, part.keys() - _KNOWN))
    if unknown:
        allowed = f"without {unknown}, on which the rotation may depend"
        raise invalid_argument(CALL, name, part, allowed)
    for key in _NUMBERS:
        if key in part and not is_number(part[key]):
            raise invalid_argument(CALL, key, part[key], "a number that float32 holds")
    for key, wanted in _IDENTITY.items():
        if key in part and not is_same(part[key], wanted):
            allowed = f"{wanted!r} or left out: DeepSeek-V4's rotation knows no other"
            raise invalid_argument(CALL, key, part[key], allowed)


def _yarn(name: str, part: Mapping[str, Any]) -> YarnScaling | None:
    kind = part.get("rope_type", part.get("type", "default"))
    given = {key: part[key] for key in _YARN if key in part}
    fits = kind == "yarn" or (kind == "default" and not given)
    if not fits or part.get("type", kind) != kind:
        allowed = "of the type 'yarn', or 'default' without more"
        raise invalid_argument(CALL, name, part, allowed)
    if kind == "default":
        return None
    if not given.keys() >= set(_REQUIRED):
        allowed = f"a mapping with {' and '.join(_REQUIRED)}"
        raise invalid_argument(CALL, name, part, allowed)
    factor, length = (given.pop(key) for key in _REQUIRED)
    return YarnScaling(factor, validate_size(CALL, _REQUIRED[1], length), **given)


def yarn_to_hf(yarn: YarnScaling | None) -> dict[str, Any] | None:
    """What stands under `rope_scaling`."""
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
