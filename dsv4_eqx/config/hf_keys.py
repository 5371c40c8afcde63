"""Which keys of a `config.json` mean other mathematics, and which mean none.

A key that DeepSeek-V4 does not have is one of another model, which is refused, one of a
part that is left out here, or one that no computation depends on.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any, Final

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_int,
    shown,
    validate_int,
)

CALL: Final = "Config.from_hf"

# What every DeepSeek-V4 shares: another value is another model.
FIXED: Final[dict[str, Any]] = {
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
# Of other models: with these values, or null, they change nothing.
_NEUTRAL: Final[dict[str, Any]] = {
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "mlp_only_layers": [],
    "kv_lora_rank": None,
    "rope_interleave": True,
    "pruned_heads": {},
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Other libraries' names for sizes that are given.
_SAME_AS: Final = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "intermediate_size": "moe_intermediate_size",
    "qk_head_dim": "head_dim",
    "v_head_dim": "head_dim",
}
# Of bookkeeping, of training's losses, of how text is made from logits.
_HARMLESS: Final = frozenset(
    "architectures attn_implementation auto_map aux_loss_alpha chat_template "
    "chunk_size_feed_forward dtype ep_size expert_dtype finetuning_task id2label "
    "is_decoder label2id license max_length min_length model_max_length name "
    "num_beam_groups num_beams num_labels num_return_sequences "
    "output_attentions output_hidden_states output_router_logits pad_token_id prefix "
    "pretraining_tp problem_type quantization_config return_dict router_aux_loss_coef "
    "router_jitter_noise router_z_loss_coef sep_token_id seq_aux task_specific_params "
    "temperature tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version use_cache".split()
)
# How the weights are stored, which whoever writes them says anew.
_OF_FILES: Final = frozenset(
    "architectures dtype expert_dtype quantization_config torch_dtype".split()
)
# The schedule and the rotary embedding, in both forms.
SCHEDULE: Final = frozenset(
    "layer_types compress_ratios compress_rates compress_rate_csa compress_rate_hca "
    "mlp_layer_types num_hash_layers rope_scaling rope_parameters "
    "partial_rotary_factor qk_rope_head_dim rope_theta compress_rope_theta".split()
)
_OF_V41: Final = (
    "kv_source_layer",
    "index_source_layer",
    "candidate_",
    "engram",
    "gate_temp",
    "dspark_n_routed_experts",
    "dspark_num_experts_per_tok",
)
# What the model's sizes and switches begin with. Of these, one that is not known may be
# another model's, and is refused unless it is off.
_OF_PARTS: Final = tuple(
    "attention_ attn_ compress_ expert_ ffn_ hc_ head_ hidden_ index_ k_ kv_ layer_ "
    "layers_ logit_ logits_ mlp_ moe_ n_ norm_ num_ o_ q_ qk_ residual_ rms_ rope_ "
    "rotary_ routed_ router_ scoring_ shared_ sliding_ swiglu_ topk_ v_ window_".split()
)
# Parts beside the model that this library does not have: what their keys begin with.
_LEFT_OUT: Final = {
    "dspark_": "of the drafter DSpark, which DSparkConfig reads",
    "vision_": "of the image encoder, without which the model is read",
}


def is_same(found: Any, wanted: Any) -> bool:
    """Whether a value is the one wanted; 1 is not true, and 0 not false."""
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted


def has_drafter(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration has DSpark's drafter instead of the prediction block."""
    name = "dspark_block_size"
    tokens = raw.get(name)
    return tokens is not None and validate_int(CALL, name, tokens, least=0) > 0


def validate_keys(raw: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses the configuration of another model; `Config`'s fields are `known`."""
    _refuse_v41(raw)
    for key, wanted in FIXED.items():
        if key in raw and not is_same(raw[key], wanted):
            raise invalid_argument(CALL, key, raw[key], f"{wanted!r} for a DeepSeek-V4")
    same = {key: raw[size] for key, size in _SAME_AS.items() if size in raw}
    for key, wanted in (_NEUTRAL | same).items():
        if raw.get(key) is not None and not is_same(raw[key], wanted):
            allowed = (
                f"{wanted!r} or left out: another value means other mathematics than "
                "DeepSeek-V4's"
            )
            raise invalid_argument(CALL, key, raw[key], allowed)
    idle = _idle(known)
    for key, value in raw.items():
        is_off = value is None or value is False
        if str(key).startswith(_OF_PARTS) and key not in idle and not is_off:
            raise ValueError(
                f"{CALL}: {key}={shown(value)} is not known, and by its name may mean "
                "other mathematics than DeepSeek-V4's; if it means none, remove it."
            )


def _idle(known: Collection[str]) -> frozenset[Any]:
    """Keys that are read, or have been validated, or mean nothing here."""
    return frozenset({*known, *SCHEDULE, *FIXED, *_NEUTRAL, *_SAME_AS, *_HARMLESS})


def _refuse_v41(raw: Mapping[str, Any]) -> None:
    signs = sorted(str(key) for key in raw if str(key).startswith(_OF_V41))
    model_type = raw.get("model_type")
    if str(model_type).replace(".", "").replace("_", "").startswith("deepseekv41"):
        signs = [f"model_type={model_type!r}"]
    ratios = raw.get("compress_ratios")
    if isinstance(ratios, list | tuple) and raw.get("layer_types") is None:
        if any(is_int(ratio) and ratio in (1, 2) for ratio in ratios):
            signs.append("ratios of 1 and 2 in compress_ratios")
    if signs:
        raise ValueError(
            f"{CALL}: this is a DeepSeek-V4.1, by its {', '.join(signs)}: another "
            "model, which this library does not have; give the configuration of a "
            "DeepSeek-V4."
        )


def warn_of_unread(raw: Mapping[str, Any], known: Collection[str]) -> None:
    """Names in one warning all keys that are neither `known` nor without effect."""
    idle = _idle(known)
    given = {str(key) for key, value in raw.items() if value is not None}
    groups: dict[str, list[str]] = {}
    for key in sorted(given - idle):
        if key.startswith("_"):  # what libraries write for themselves alone
            continue
        what = "unknown"
        for start, part in _LEFT_OUT.items():
            what = part if key.startswith(start) else what
        groups.setdefault(what, []).append(key)
    if groups:
        parts = [f"{', '.join(keys)} ({what})" for what, keys in groups.items()]
        message = f"{CALL}: keys that are not read: {'; '.join(parts)}."
        warnings.warn(message, stacklevel=4)  # who called from_hf


def other_keys(raw: Mapping[str, Any], written: Collection[str]) -> dict[str, Any]:
    """What else a configuration says, to be kept where it is `written` again."""
    gone = {*SCHEDULE, *_OF_FILES, *written}
    left_out = tuple(_LEFT_OUT)
    return {
        key: value
        for key, value in raw.items()
        if key not in gone and not str(key).startswith(left_out)
    }
