"""The nano-release's `config.json`, those of all releases, and changes to them."""

import json
import pathlib

import pytest

from dsv4_eqx import Config

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"
RAW = json.loads((NANO / "config.json").read_text())


def raw_flash(tail):
    """The release's `config.json` of Flash (spec 1.1) with a tail after its layers."""
    yarn = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    return RAW | {
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4, *tail],
        "head_dim": 512,
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": 43,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "rope_scaling": yarn | {"beta_fast": 32, "beta_slow": 1},
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "transformers_version": "4.57.1",
        "vocab_size": 129280,
    }


def raw_pro(tail):
    """The same of Pro."""
    return raw_flash(()) | {
        "compress_ratios": [128, 128] + [4, 128] * 29 + [4, *tail],
        "hidden_size": 7168,
        "index_topk": 1024,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "num_attention_heads": 128,
        "num_hidden_layers": 61,
        "o_groups": 16,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 2.5,
    }


FLASH_DSPARK = {
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
}
PRO_DSPARK = FLASH_DSPARK | {
    "dspark_markov_rank": 512,
    "dspark_target_layer_ids": [58, 59, 60],
}
# Every official release of V4, as far as their texts are public.
RELEASES = {
    "Flash": raw_flash([0]),
    "Flash-Base": raw_flash([0]) | {"expert_dtype": "fp8"},
    "Flash-DSpark": raw_flash([0, 0, 0]) | FLASH_DSPARK,
    "Flash-0731": raw_flash([0, 0, 0]) | FLASH_DSPARK,
    "Pro": raw_pro([0]),
    "Pro-Base": raw_pro([0]) | {"expert_dtype": "fp8"},
    "Pro-DSpark": raw_pro([0, 0, 0]) | PRO_DSPARK,
    "Pro-0813": raw_pro([0, 0, 0]) | PRO_DSPARK,
}


def written_by_transformers(raw):
    """What transformers 5.23 and 5.24 write for a release's mapping; both the same."""
    ratios = raw["compress_ratios"][: raw["num_hidden_layers"]]
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    heavy = "heavily_compressed_attention"
    num_hashed, fraction = raw["num_hash_layers"], 0.125
    bases = {"main": raw["rope_theta"], "compress": raw["compress_rope_theta"]}
    rope = {
        key: {"rope_theta": base, "partial_rotary_factor": fraction}
        for key, base in bases.items()
    }
    rope["main"]["rope_type"] = "default"
    rope["compress"] |= raw["rope_scaling"]
    rope["compress"] |= {"rope_type": "yarn", "attention_factor": 1.0}
    gone = "compress_ratios num_hash_layers rope_scaling torch_dtype".split()
    numbers = "expert_dtype", raw["expert_dtype"]
    return {key: value for key, value in raw.items() if key not in gone} | {
        "compress_rates": {kinds[4]: 4, heavy: 128},
        "dtype": raw["torch_dtype"],
        "layer_types": [kinds.get(ratio, heavy) for ratio in ratios],
        "mlp_bias": False,
        "mlp_layer_types": ["hash_moe"] * num_hashed
        + ["moe"] * (len(ratios) - num_hashed),
        "output_router_logits": False,
        "pad_token_id": None,
        "partial_rotary_factor": fraction,
        "quantization_config": raw["quantization_config"] | dict([numbers]),
        "rope_parameters": rope,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def refused(message, changes=None, *, without=()):
    """`from_hf` of the nano-release's mapping with changes says this."""
    raw = {k: v for k, v in (RAW | (changes or {})).items() if k not in without}
    with pytest.raises(ValueError) as error:
        Config.from_hf(raw)
    for part in [message] if isinstance(message, str) else message:
        assert part in str(error.value), str(error.value)


def schedule(*ratios):
    return {"compress_ratios": list(ratios)}


def yarn(**changes):
    return {"rope_scaling": RAW["rope_scaling"] | changes}


def nested(main, **changes):
    compress = RAW["rope_scaling"] | {"rope_theta": 160000.0} | changes
    return {"rope_parameters": {"main": main, "compress": compress}}
