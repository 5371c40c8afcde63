"""The sizes of a DeepSeek-V4, under Hugging Face's field names.

`Config.flash()` and `Config.pro()` are the released models (paper section 4.2.1),
`Config.from_hf` reads a `config.json` in the release's form or in the one that
transformers writes.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from dsv4_eqx.config.hf import fields_from_hf, fields_to_hf
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, KIND_OF_RATIO, SLIDING, TOPK_MOE
from dsv4_eqx.numerics.validation import (
    as_python,
    invalid_argument,
    is_int,
    shown,
    validate_int,
    validate_number,
)
from dsv4_eqx.primitives.rotary import YarnScaling

_LARGEST: Final = 2**31 - 1
_PER_LAYER: Final = ("layer_types", "compress_ratios", "mlp_layer_types")
_TOKEN_IDS: Final = ("bos_token_id", "eos_token_id")
# Integers are at least 1, floats at least 0, but for these. A SwiGLU limit of 0 would
# silence every expert.
_LEAST: Final = {"num_nextn_predict_layers": 0}
# Of several prediction blocks, nothing says how the second reads the first.
_MOST: Final = {"num_nextn_predict_layers": 1}
_ABOVE: Final = {
    "rope_theta": 1,
    "compress_rope_theta": 1,
    "routed_scaling_factor": 0,
    "swiglu_limit": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes and schedule of one model; hashable, checked when it is made.

    **Arguments:** as in Hugging Face's `DeepseekV4Config`, and for each layer

    - `layer_types`: `"sliding_attention"`, `"compressed_sparse_attention"` (CSA) or
      `"heavily_compressed_attention"` (HCA).
    - `compress_ratios`: tokens in one compressed entry; 0 where the layer only slides.
    - `mlp_layer_types`: `"hash_moe"` (experts by token id) or `"moe"` (by score).

    `rope_scaling` is the YaRN of the layers that compress. `bos_token_id` opens a text,
    `eos_token_id`, or each of several, ends it; None where there is none.

    Numbers of numpy are taken, and kept as Python's.

    **Raises:** ValueError naming the field, its value and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    sliding_window: int
    layer_types: tuple[str, ...]
    compress_ratios: tuple[int, ...]
    mlp_layer_types: tuple[str, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    bos_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int:
                least, most = _LEAST.get(name, 1), _MOST.get(name, _LARGEST)
                value = validate_int("Config", name, value, least=least, most=most)
            elif field.type is float:
                value = validate_number("Config", name, value, above=_ABOVE.get(name))
            elif name in _PER_LAYER:
                value = _entries(name, value, self.num_hidden_layers)
            elif name in _TOKEN_IDS:
                value = _token_ids(name, value, self.vocab_size)
            object.__setattr__(self, name, value)
        self._validate_sizes()
        for layer in range(self.num_hidden_layers):
            self._validate_layer(layer)

    def _validate_sizes(self) -> None:
        heads, rotary_dim = self.num_attention_heads, self.qk_rope_head_dim
        if heads % self.o_groups != 0:
            allowed = f"a multiple of o_groups={self.o_groups}"
            raise invalid_argument("Config", "num_attention_heads", heads, allowed)
        if rotary_dim % 2 != 0:
            raise invalid_argument(
                "Config", "qk_rope_head_dim", rotary_dim, "a multiple of 2"
            )
        limits = (
            ("qk_rope_head_dim", "head_dim"),
            ("qk_rope_head_dim", "index_head_dim"),
            ("num_experts_per_tok", "n_routed_experts"),
        )
        for small, large in limits:
            if getattr(self, small) > getattr(self, large):
                allowed = f"at most {large}={getattr(self, large)}"
                raise invalid_argument("Config", small, getattr(self, small), allowed)
        scaling = self.rope_scaling
        if scaling is not None and not isinstance(scaling, YarnScaling):
            raise invalid_argument(
                "Config", "rope_scaling", scaling, "a YarnScaling or None"
            )

    def _validate_layer(self, layer: int) -> None:
        kind, ratio = self.layer_types[layer], self.compress_ratios[layer]
        mlp_kind = self.mlp_layer_types[layer]
        if kind not in (SLIDING, CSA, HCA):
            raise ValueError(
                f"Config: layer_types[{layer}] is {shown(kind)}; it must be "
                f"{SLIDING!r}, {CSA!r} or {HCA!r}."
            )
        least, most = (0, 0) if kind == SLIDING else (1, _LARGEST)
        if not is_int(ratio) or not least <= ratio <= most:
            raise ValueError(
                f"Config: compress_ratios[{layer}] is {shown(ratio)} and layer_types"
                f"[{layer}] is {kind!r}; the ratio must be 0 for {SLIDING!r} and an "
                f"integer in [1, {_LARGEST}] for the others."
            )
        if mlp_kind not in (HASH_MOE, TOPK_MOE):
            raise ValueError(
                f"Config: mlp_layer_types[{layer}] is {shown(mlp_kind)}; it must be "
                f"{HASH_MOE!r} or {TOPK_MOE!r}."
            )

    def layer_kind(self, layer: int) -> tuple[str, int, str]:
        """Attention kind, compress ratio and MLP kind of a layer.

        **Arguments:**

        - `layer`: from 0; after the last layer come the prediction (MTP) blocks, which
            slide and route by score.

        **Raises:** ValueError if there is no such layer.
        """
        blocks = self.num_hidden_layers + self.num_nextn_predict_layers
        if not is_int(layer) or not 0 <= layer < blocks:
            raise ValueError(
                f"Config.layer_kind(layer={layer}): there are layers 0 to {blocks - 1}."
            )
        if layer >= self.num_hidden_layers:
            return SLIDING, 0, TOPK_MOE
        return (
            self.layer_types[layer],
            self.compress_ratios[layer],
            self.mlp_layer_types[layer],
        )

    @classmethod
    def flash(cls) -> "Config":
        """DeepSeek-V4-Flash: 284 billion parameters, 13 billion active."""
        return cls(
            vocab_size=129280,
            hidden_size=4096,
            moe_intermediate_size=2048,
            num_attention_heads=64,
            q_lora_rank=1024,
            o_groups=8,
            n_routed_experts=256,
            routed_scaling_factor=1.5,
            index_topk=512,
            **_released_schedule((0, 0) + (4, 128) * 20 + (4,)),
        )

    @classmethod
    def pro(cls) -> "Config":
        """DeepSeek-V4-Pro: 1.6 trillion parameters, 49 billion active."""
        return cls(
            vocab_size=129280,
            hidden_size=7168,
            moe_intermediate_size=3072,
            num_attention_heads=128,
            q_lora_rank=1536,
            o_groups=16,
            n_routed_experts=384,
            routed_scaling_factor=2.5,
            index_topk=1024,
            **_released_schedule((128, 128) + (4, 128) * 29 + (4,)),
        )

    @classmethod
    def tiny(cls) -> "Config":
        """Six layers of every kind over bytes: small enough to run anywhere.

        Heads, groups, experts and vocabulary divide by 8, for meshes of up to 8
        devices.
        """
        return cls(
            vocab_size=256,
            hidden_size=64,
            moe_intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=16,
            head_dim=32,
            qk_rope_head_dim=16,
            q_lora_rank=40,
            o_groups=8,
            o_lora_rank=24,
            n_routed_experts=16,
            num_experts_per_tok=3,
            routed_scaling_factor=1.5,
            sliding_window=16,
            layer_types=(SLIDING, HCA, CSA, HCA, CSA, HCA),
            compress_ratios=(0, 8, 4, 8, 4, 8),
            mlp_layer_types=(HASH_MOE, HASH_MOE) + (TOPK_MOE,) * 4,
            index_n_heads=16,
            index_head_dim=24,
            index_topk=8,
            rope_scaling=YarnScaling(16.0, 256),
            max_position_embeddings=4096,
            num_nextn_predict_layers=1,
        )

    @classmethod
    def from_hf(
        cls,
        source: str | os.PathLike | Mapping[str, Any],
        *,
        num_hidden_layers: int | None = None,
    ) -> "Config":
        """Reads a Hugging Face configuration, the release's or transformers' own form.

        Where the file does not say, the first three layers hash and text begins with
        token 0 and ends with token 1, as in transformers. Keys that are not read and
        change no mathematics are named in one warning, which begins with
        "Config.from_hf". Among them are those of DSpark's drafter, which stands where
        other releases have prediction blocks: there are none. `DSparkConfig.from_hf`
        reads them.

        **Arguments:**

        - `source`: a `config.json`, a directory that holds one, or its mapping.
        - `num_hidden_layers`: how many of the layers to read, from the first one on;
            all by default. The prediction blocks stay.

        **Raises:** ValueError that names the first kind of fault found: a value that
        DeepSeek-V4 does not have, an unknown key that begins like one of the model's
        sizes, values that contradict each other, or all keys that are missing;
        FileNotFoundError without a file.
        """
        fields = dataclasses.fields(cls)
        return cls(**fields_from_hf(source, fields, num_hidden_layers))

    def to_hf(self) -> dict[str, Any]:
        """A Hugging Face configuration, which `from_hf` and transformers read.

        transformers knows one ratio for each kind of layer.
        """
        return fields_to_hf(vars(self))


def _entries(name: str, value: Any, num_layers: int) -> tuple[Any, ...]:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list | tuple):
        allowed = f"a list or tuple of {num_layers}, one for each layer"
        raise invalid_argument("Config", name, value, allowed)
    if len(value) != num_layers:
        raise ValueError(
            f"Config: {name} has {len(value)} layers, num_hidden_layers is "
            f"{num_layers}."
        )
    return tuple(map(as_python, value))


def _token_ids(name: str, value: Any, vocab: int) -> int | tuple[int, ...] | None:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    ids = value if isinstance(value, list | tuple) else [value]
    ids = tuple(map(as_python, ids))
    if value is None:
        return None
    if not all(is_int(token) and 0 <= token < vocab for token in ids):
        allowed = f"a token id in [0, {vocab}), some of them, or None"
        raise invalid_argument("Config", name, value, allowed)
    return ids if isinstance(value, list | tuple) else ids[0]


def _released_schedule(ratios: tuple[int, ...]) -> dict[str, Any]:
    """What Flash and Pro share."""
    layers = len(ratios)
    return dict(
        num_hidden_layers=layers,
        head_dim=512,
        qk_rope_head_dim=64,
        o_lora_rank=1024,
        num_experts_per_tok=6,
        sliding_window=128,
        layer_types=tuple(KIND_OF_RATIO[ratio] for ratio in ratios),
        compress_ratios=ratios,
        mlp_layer_types=(HASH_MOE,) * 3 + (TOPK_MOE,) * (layers - 3),
        index_n_heads=64,
        index_head_dim=128,
        rope_scaling=YarnScaling(16.0, 65536),
        num_nextn_predict_layers=1,
        bos_token_id=0,
        eos_token_id=1,
    )
