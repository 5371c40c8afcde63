"""The rotary embedding in a Hugging Face `config.json` of a DeepSeek-V4.

The release writes `qk_rope_head_dim`, `rope_theta`, `compress_rope_theta` and
`rope_scaling`; transformers nests the same in `rope_parameters` under `main` and
`compress`, and gives the rotary size as a fraction of the head.
"""

from collections.abc import Mapping
from typing import Any, Final

from dsv4_eqx.numerics.validation import invalid_argument, is_int, is_number, shown
from dsv4_eqx.primitives.rotary import YarnScaling

_CALL: Final = "Config.from_hf"
_YARN_REQUIRED: Final = ("factor", "original_max_position_embeddings")
_YARN: Final = (*_YARN_REQUIRED, "beta_fast", "beta_slow")
_NUMBERS: Final = (*_YARN, "rope_theta", "partial_rotary_factor", "attention_factor")
_KNOWN: Final = frozenset(_NUMBERS) | {"type", "rope_type"}


def mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside another; empty where it is absent or null.

    **Arguments:**

    - `parent`: the mapping that it is in.
    - `key`: its key.

    **Raises:** ValueError if it is something else.
    """
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise invalid_argument(_CALL, key, value, "a mapping")
    return value


def unnested(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without `rope_parameters`, its `rope_scaling` a `YarnScaling`.

    **Arguments:**

    - `raw`: the whole configuration.

    **Raises:** ValueError if the parts contradict each other or are no mappings.
    """
    flat = {key: value for key, value in raw.items() if key != "rope_parameters"}
    nested, scaling = mapping(raw, "rope_parameters"), mapping(raw, "rope_scaling")
    yarn = _yarn("rope_scaling", scaling)
    main, compress = mapping(nested, "main"), mapping(nested, "compress")
    if "main" in nested or "compress" in nested:
        if nested.keys() != {"main", "compress"} or _yarn("main", main) is not None:
            allowed = (
                "{'main': ..., 'compress': ...} with no scaling in 'main', or like "
                "rope_scaling"
            )
            raise invalid_argument(_CALL, "rope_parameters", nested, allowed)
        _merge(flat, "rope_theta", main, "main")
        _merge(flat, "compress_rope_theta", compress, "compress")
        nested = compress
    if nested:
        parameters = _yarn("rope_parameters", nested)
        if scaling and parameters != yarn:
            allowed = f"what rope_scaling is too, {shown(scaling)}"
            raise invalid_argument(_CALL, "rope_parameters", nested, allowed)
        yarn = parameters
    # Not nested, transformers overrides both numbers by what stands beside them; where
    # no base does, by its default.
    for name, part in (("rope_parameters", nested), ("rope_scaling", scaling)):
        base = flat.get("compress_rope_theta")
        if base is None and part.get("rope_theta") is not None:
            allowed = f"given, as {name} has the rope_theta {shown(part['rope_theta'])}"
            raise invalid_argument(_CALL, "compress_rope_theta", base, allowed)
        _merge(flat, "compress_rope_theta", part, name)
    return flat | {"rope_scaling": yarn}


def _merge(flat: dict[str, Any], base: str, part: Mapping[str, Any], name: str) -> None:
    """Moves a part's base and fraction beside it; refuses what contradicts another."""
    for inner in ("rope_theta", "partial_rotary_factor"):
        key = base if inner == "rope_theta" else inner
        value = part.get(inner)
        if value is None:
            continue
        if flat.get(key) is None:
            flat[key] = value
        elif flat[key] != value:
            allowed = f"{shown(value)}, the {inner} in {name}"
            raise invalid_argument(_CALL, key, flat[key], allowed)


def rotary_from_hf(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of `Config`.

    **Arguments:**

    - `flat`: from `unnested`, with `head_dim` and the rotary size in one of its forms.

    **Raises:** ValueError if the rotary size is no whole number of channels.
    """
    names = ("rope_theta", "compress_rope_theta", "rope_scaling")
    found = {name: flat[name] for name in names if name in flat}
    return found | {"qk_rope_head_dim": _rotary_dim(flat)}


def _rotary_dim(flat: Mapping[str, Any]) -> Any:
    rotary_dim, head_dim = flat.get("qk_rope_head_dim"), flat["head_dim"]
    fraction = flat.get("partial_rotary_factor")
    if fraction is None or not (is_int(head_dim) and is_number(head_dim)):
        return rotary_dim  # Config judges both
    if not (is_number(fraction) and 0 < fraction <= 1):
        raise invalid_argument(_CALL, "partial_rotary_factor", fraction, "in (0, 1]")
    # Rounded: the product may be a hair off the integer that the quotient came from.
    channels = round(head_dim * fraction)
    if abs(head_dim * fraction - channels) > 1e-6 * head_dim:
        allowed = f"a whole number of channels over head_dim={head_dim}"
        raise invalid_argument(_CALL, "partial_rotary_factor", fraction, allowed)
    if rotary_dim is not None and rotary_dim != channels:
        allowed = f"partial_rotary_factor x head_dim = {fraction} x {head_dim}"
        raise invalid_argument(_CALL, "qk_rope_head_dim", rotary_dim, allowed)
    return channels


def _yarn(name: str, scaling: Mapping[str, Any]) -> YarnScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    unknown = sorted(map(str, scaling.keys() - _KNOWN))
    found = {key: scaling[key] for key in _YARN if scaling.get(key) is not None}
    if (
        kind not in ("default", "yarn")
        or scaling.get("type", kind) != kind
        or (kind == "default" and found)
    ):
        allowed = "of the type 'yarn', or 'default' without more"
        raise invalid_argument(_CALL, name, scaling, allowed)
    if unknown:
        allowed = f"without {unknown}, which are unknown"
        raise invalid_argument(_CALL, name, scaling, allowed)
    for key in _NUMBERS:
        if scaling.get(key) is not None and not is_number(scaling[key]):
            raise invalid_argument(
                _CALL, key, scaling[key], "a number that float32 holds"
            )
    # Another is YaRN's temperature, which DeepSeek-V4 leaves out.
    if scaling.get("attention_factor") not in (None, 1):
        factor = scaling["attention_factor"]
        raise invalid_argument(_CALL, "attention_factor", factor, "1 or absent")
    if kind == "default":
        return None
    for key in _YARN_REQUIRED:
        if key not in found:
            allowed = f"a mapping with {' and '.join(_YARN_REQUIRED)}"
            raise invalid_argument(_CALL, name, scaling, allowed)
    factor, original_max_position = (found.pop(key) for key in _YARN_REQUIRED)
    if not is_int(original_max_position):
        raise invalid_argument(
            _CALL, _YARN_REQUIRED[1], original_max_position, "an integer"
        )
    return YarnScaling(factor, original_max_position, **found)


def yarn_to_hf(yarn: YarnScaling | None) -> dict[str, Any] | None:
    """What stands under `rope_scaling`.

    **Arguments:**

    - `yarn`: of the layers that compress, if they have it.
    """
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
