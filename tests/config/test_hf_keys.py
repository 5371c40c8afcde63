"""Keys of a `config.json` that mean other mathematics, none, or a part left out."""

import dataclasses
import warnings

import numpy as np
import pytest

from dsv4_eqx import Config
from dsv4_eqx.config.hf_keys import other_keys
from tests.config.raw import FLASH_DSPARK, RAW, raw_flash, refused, yarn

# The type checker of the test run would answer before ours does.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


OTHER = {
    "model": ({"model_type": "deepseek_v3"}, ("model_type", "_v3", "deepseek_v4")),
    "tied": ({"tie_word_embeddings": True}, ("tie_word_embeddings", "True", "False")),
    "two key heads": ({"num_key_value_heads": 2}, ("num_key_value_heads", "2", "1")),
    "scores": ({"scoring_func": "softmax"}, ("scoring_func", "softmax", "sqrtsoft")),
    "groups": ({"n_group": 8, "topk_group": 4}, ("n_group=8", "1 or left out")),
    "dense layers": ({"first_k_dense_replace": 3}, ("first_k_dense_replace=3", "0 or")),
    "true is no one": ({"n_group": True}, ("n_group=True", "1 or left out")),
    "latent keys": ({"kv_lora_rank": 512}, ("kv_lora_rank=512", "None or left out")),
    "pruned": ({"pruned_heads": {"0": [1]}}, ("pruned_heads", "{} or left out")),
    "other experts": ({"num_local_experts": 8}, ("num_local_experts=8", "6 or left")),
    "drafter": ({"dspark_block_size": "5"}, ("dspark_block_size='5'", "an integer")),
    "other selection": ({"index_topk_freq": 4}, ("index_topk_freq=4", "remove it")),
    "other heads": ({"attn_output_gate": True}, ("attn_output_gate=True", "remove it")),
    "other experts too": ({"moe_scale": [1, 2]}, ("moe_scale=[1, 2] is not known",)),
    "one is no true": ({"norm_topk_prob": 1}, ("norm_topk_prob=1", "True")),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_mathematics_is_refused_by_its_key(case):
    changes, parts = OTHER[case]
    refused(parts, changes)


V41 = {"compress_ratios": [0, 0] + [2] * 18 + [1] * 20, "num_hidden_layers": 40}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "deepseek_v41"},
        {"model_type": "deepseek_v4.1"},
        V41,
        {"kv_source_layers": [2, 8, 14, 20], "index_source_layers": [2, 8, 14, 20]},
        {"engram_layer_ids": [1, 14]},
        {"gate_temp": 2},
        {"dspark_n_routed_experts": 128},
    ],
    ids=str,
)
def test_from_hf_refuses_a_v41_by_name(changes):
    sign = "compress_ratios" if changes is V41 else next(iter(changes))
    refused(("is a DeepSeek-V4.1", "another model", sign), changes)


DSPARK = {
    "dspark_block_size": 3,
    "dspark_noise_token_id": 127,
    "dspark_target_layer_ids": [2, 4],
    "dspark_markov_rank": 16,
}


def test_from_hf_reads_a_release_with_a_drafter_and_says_once_that_it_is_left_out():
    with pytest.warns(UserWarning, match="dspark_block_size, .*DSparkConfig") as said:
        config = Config.from_hf(raw_flash((0, 0, 0)) | FLASH_DSPARK)
    assert len(said) == 1
    # The drafter's tensors stand where the prediction block's would.
    assert config == dataclasses.replace(Config.flash(), num_nextn_predict_layers=0)
    assert Config.from_hf(config.to_hf()) == config


def test_from_hf_names_the_keys_that_it_does_not_read_in_one_warning():
    unread = {"unsloth_version": "2026.9", "some_size": 3, "vision_dim": 1024}
    unread |= {"attn_gate": False}
    match = r"attn_gate, some_size, unsloth_version \(unknown.*vision_dim \(of the im"
    with pytest.warns(UserWarning, match=match) as said:
        assert Config.from_hf(RAW | unread | DSPARK) != Config.from_hf(RAW)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Config.from_hf")
        assert Config.from_hf(RAW | unread) == Config.from_hf(RAW)


@pytest.mark.parametrize(
    "more",
    [
        dict.fromkeys(
            "tokenizer_class ep_size license _commit_hash name torchscript "
            "attn_implementation router_z_loss_coef model_max_length aux_loss_alpha "
            "seq_aux sep_token_id _anything".split(),
            1,
        ),
        {"pruned_heads": {}, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        {"num_local_experts": 6, "intermediate_size": 128, "kv_lora_rank": None},
        {"dspark_block_size": None, "unsloth_version": None},
        {"max_position_embeddings": 4096.0, "hidden_size": 128.0},
        {"compress_ratios": [0.0, 128.0, 4, 128, 4, 0], "num_hash_layers": 2.0},
        {"hidden_size": np.int64(128), "swiglu_limit": np.float32(1)},
        yarn(mscale=1.0, mscale_all_dim=1.0, truncate=True, attention_factor=1.0),
        yarn(original_max_position_embeddings=64.0, beta_fast=32.0, beta_slow=None),
    ],
    ids=lambda more: next(iter(more)),
)
def test_from_hf_reads_what_changes_no_mathematics(more):
    assert Config.from_hf(RAW | more) == Config.from_hf(RAW)  # warnings are errors


def test_what_says_nothing_of_the_model_is_kept_for_whoever_writes_it_again():
    kept = {"use_cache": True, "unsloth_version": "2026.9", "_name_or_path": "a"}
    written = Config.from_hf(RAW).to_hf()
    assert other_keys(RAW | kept | DSPARK | {"vision_dim": 3}, written) == kept
