"""The nano-release's `config.json`, Flash's, and changes to them."""

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
