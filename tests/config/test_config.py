"""Configurations: the released values, Hugging Face's forms, and every bad input."""

import copy
import dataclasses
import itertools
import json
import math
import pathlib
import re
import tracemalloc
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_eqx import Config, YarnScaling
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.tiny import tiny_config

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"
RAW = json.loads((NANO / "config.json").read_text())


# They would answer before ours do.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


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


def test_flash_has_the_released_values():
    flash = Config.flash()
    assert (flash.num_hidden_layers, flash.hidden_size) == (43, 4096)
    kinds = [flash.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)]
    assert kinds == [2, 21, 20] and flash.layer_types[2:4] == (CSA, HCA)
    assert flash.mlp_layer_types == (HASH_MOE,) * 3 + (TOPK_MOE,) * 40
    assert flash.rope_scaling == YarnScaling(16.0, 65536, 32.0, 1.0)
    assert flash.layer_kind(43) == (SLIDING, 0, TOPK_MOE)


def test_pro_has_the_released_values():
    pro = Config.pro()
    assert (pro.num_hidden_layers, pro.hidden_size, pro.index_topk) == (61, 7168, 1024)
    assert [pro.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)] == [0, 30, 31]
    assert (pro.num_attention_heads, pro.q_lora_rank, pro.o_groups) == (128, 1536, 16)
    assert (pro.n_routed_experts, pro.moe_intermediate_size) == (384, 3072)
    assert pro.routed_scaling_factor == 2.5 and pro.swiglu_limit == 10.0
    assert pro.layer_types[:4] == (HCA, HCA, CSA, HCA)


def test_tiny_has_every_kind_and_divides_by_eight():
    tiny = Config.tiny()
    assert set(tiny.layer_types) == {SLIDING, CSA, HCA}
    assert set(tiny.mlp_layer_types) == {HASH_MOE, TOPK_MOE}
    sizes = (tiny.num_attention_heads, tiny.o_groups, tiny.n_routed_experts)
    assert all(size % 8 == 0 for size in (*sizes, tiny.vocab_size))


@pytest.mark.parametrize("tail", [(), (0,), (0, 0, 0)], ids=["none", "mtp", "dspark"])
def test_from_hf_reads_the_release_whatever_its_tail(tail):
    raw = raw_flash(tail)
    assert len(raw["compress_ratios"]) == 43 + len(tail)
    assert Config.from_hf(raw) == Config.flash()


def test_from_hf_reads_a_file_a_directory_and_a_mapping():
    config = Config.from_hf(NANO)
    assert config == Config.from_hf(str(NANO / "config.json")) == Config.from_hf(RAW)
    assert config.layer_types == (SLIDING, HCA, CSA, HCA, CSA)
    assert config.compress_ratios == (0, 128, 4, 128, 4)
    assert config.mlp_layer_types == (HASH_MOE,) * 2 + (TOPK_MOE,) * 3
    assert config.rope_scaling == YarnScaling(16.0, 64)
    assert config.num_nextn_predict_layers == 1 and config.swiglu_limit == 1.0


@pytest.mark.parametrize("scaling", [YarnScaling(16.0, 64), None])
def test_from_hf_reads_what_transformers_writes(scaling, tmp_path):
    pytest.importorskip("torch")
    from tests.reference import reference_config

    config = tiny_config(rope_scaling=scaling)  # one prediction block is the default
    written = reference_config(config)
    assert Config.from_hf(written.to_dict()) == config
    written.save_pretrained(tmp_path)
    assert Config.from_hf(tmp_path) == config


def test_three_layers_hash_by_default_as_in_transformers():
    raw = {key: value for key, value in RAW.items() if key != "num_hash_layers"}
    assert Config.from_hf(raw).mlp_layer_types == (HASH_MOE,) * 3 + (TOPK_MOE,) * 2


def test_from_hf_leaves_its_argument_alone():
    raw = copy.deepcopy(RAW)
    Config.from_hf(raw)
    assert raw == RAW


def test_configs_are_hashable_frozen_and_compare_by_value():
    assert hash(Config.flash()) == hash(Config.flash())
    assert len({Config.flash(), Config.flash(), Config.pro()}) == 2
    listed = tiny_config(layer_types=list(tiny_config().layer_types))
    assert hash(listed) == hash(tiny_config()) and listed == tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.tiny().hidden_size = 3


MAY_BE_ZERO = ("num_nextn_predict_layers",)
INTS = [f.name for f in dataclasses.fields(Config) if f.type is int]
FLOATS = [f.name for f in dataclasses.fields(Config) if f.type is float]
# Of 0, an expert is silent; a base of 1 does not rotate.
ABOVE_ZERO = ("swiglu_limit", "routed_scaling_factor")
ABOVE_ONE = ("rope_theta", "compress_rope_theta")


def test_fields_of_integers_refuse_what_is_none():
    values = [-1, 2**31, 10**30, True, 2.0, math.nan, "8", None, np.float64(2)]
    assert len(INTS) > 15
    for name, value in itertools.product(INTS, values):
        match = re.escape(f"Config({name}={value!r}): must be an integer in [")
        with pytest.raises(ValueError, match=match):
            tiny_config(**{name: value})


def test_fields_of_integers_refuse_zero_where_it_means_nothing():
    for name in set(INTS) - set(MAY_BE_ZERO):
        with pytest.raises(ValueError, match=rf"\({name}=0\).*\[1, 2147483647\]"):
            tiny_config(**{name: 0})
    assert tiny_config(num_nextn_predict_layers=0).num_nextn_predict_layers == 0


def test_fields_of_floats_refuse_what_float32_does_not_hold():
    values = [-1.0, math.nan, math.inf, True, "1", None, 10**400, np.float64(1e39)]
    assert len(FLOATS) > 5
    for name, value in itertools.product(FLOATS, values):
        with pytest.raises(ValueError, match=rf"Config\({name}=.*: must be a number"):
            tiny_config(**{name: value})


def test_fields_of_floats_have_their_own_bounds():
    for name, bound in [*((n, 0) for n in ABOVE_ZERO), *((n, 1) for n in ABOVE_ONE)]:
        for value in (bound, bound / 2):
            with pytest.raises(ValueError, match=f"{name}=.*, above {bound}"):
                tiny_config(**{name: value})
    for name in set(FLOATS) - {*ABOVE_ZERO, *ABOVE_ONE}:
        assert getattr(tiny_config(**{name: 0}), name) == 0


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.array, jnp.array])
def test_numbers_of_numpy_and_jax_are_kept_as_pythons(kind):
    plain = tiny_config(eos_token_id=(1, 7), bos_token_id=2)
    given = {name: kind(getattr(plain, name)) for name in INTS}
    given |= {name: np.float64(getattr(plain, name)) for name in FLOATS}
    given |= {"compress_ratios": [kind(ratio) for ratio in plain.compress_ratios]}
    given |= {"eos_token_id": [kind(1), kind(7)], "bos_token_id": kind(2)}
    config = tiny_config(**given)
    assert config == plain and hash(config) == hash(plain)
    assert config.to_hf() == json.loads(json.dumps(config.to_hf()))
    for field in dataclasses.fields(Config):
        found, wanted = (getattr(c, field.name) for c in (config, plain))
        assert type(found) is type(wanted), field.name
    assert tiny_config(compress_ratios=np.array(plain.compress_ratios)) == tiny_config()


@pytest.mark.parametrize("value", [-1, 97, True, 1.0, "1", [1, 97], [[1]], {1: 2}])
def test_token_ids_that_are_none_are_refused(value):
    for name in ("bos_token_id", "eos_token_id"):
        match = re.escape(f"Config({name}={value!r}): must be a token id in [0, 97)")
        with pytest.raises(ValueError, match=match):
            tiny_config(**{name: value})


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"o_groups": 4}, ("num_attention_heads=6", "multiple of", "o_groups=4")),
        ({"qk_rope_head_dim": 7}, ("qk_rope_head_dim=7", "multiple of 2")),
        ({"qk_rope_head_dim": 22}, ("qk_rope_head_dim=22", "at most", "head_dim=20")),
        ({"index_head_dim": 6}, ("qk_rope_head_dim=8", "at most", "index_head_dim=6")),
        ({"num_experts_per_tok": 8}, ("=8", "at most", "n_routed_experts=7")),
        ({"num_hidden_layers": 5}, ("has 6 layers", "num_hidden_layers is 5")),
        ({"compress_ratios": (0, 16, 4)}, ("compress_ratios has 3 layers", "is 6")),
        ({"mlp_layer_types": ()}, ("mlp_layer_types has 0 layers", "is 6")),
        ({"layer_types": ("full",) * 6}, ("layer_types[0]", SLIDING, CSA, HCA)),
        ({"mlp_layer_types": ("dense",) * 6}, ("[0]", "'dense'", HASH_MOE, TOPK_MOE)),
        ({"compress_ratios": (0, 16, 4, 0, 4, 4)}, ("compress_ratios[3] is 0", HCA)),
        ({"compress_ratios": (4, 16, 4, 16, 4, 4)}, ("ratios[0] is 4", SLIDING)),
        ({"compress_ratios": (0, -4, 4, 16, 4, 4)}, ("compress_ratios[1] is -4",)),
        ({"compress_ratios": (0, True, 4, 16, 4, 4)}, ("compress_ratios[1] is True",)),
        ({"compress_ratios": (0, 16.0, 4, 16, 4, 4)}, ("compress_ratios[1] is 16.0",)),
        ({"compress_ratios": 4}, ("compress_ratios", "4")),
        ({"layer_types": None}, ("layer_types", "None")),
        ({"rope_scaling": {"factor": 16}}, ("rope_scaling",)),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_each_other_are_refused(changes, parts):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("layer", [-1, 7])
def test_layer_kind_refuses_layers_that_are_not_there(layer):
    with pytest.raises(ValueError, match=rf"layer={layer}\): .* 0 to 6"):
        tiny_config().layer_kind(layer)


def schedule(*ratios):
    return {"compress_ratios": list(ratios)}


def yarn(**changes):
    return {"rope_scaling": RAW["rope_scaling"] | changes}


def nested(main, **changes):
    compress = RAW["rope_scaling"] | {"rope_theta": 160000.0} | changes
    return {"rope_parameters": {"main": main, "compress": compress}}


BAD_HF = {
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
    "ends": ({"eos_token_id": [1, 128]}, ("eos_token_id", "128", "[0, 128)")),
    "cut by hand": (
        {"num_hidden_layers": 3},
        ("compress_ratios", "[128, 4, 0]", "num_hidden_layers=3"),
    ),
    "long kinds": (
        {"layer_types": [CSA] * 6},
        ("layer_types has 6", "from_hf(..., num_hidden_layers=5)"),
    ),
    "null": ({"hidden_size": None}, ("hidden_size=None", "an integer")),
    "short schedule": (schedule(0, 128, 4), ("compress_ratios", "3", "5")),
    "tail": (schedule(0, 128, 4, 128, 4, 4), ("compress_ratios", "[4]")),
    "short tail": ({"num_nextn_predict_layers": 2}, ("_predict_layers=2", "most 1")),
    "unknown ratio": (schedule(0, 128, 8, 128, 4), ("compress_ratios", "8")),
    "string ratio": (schedule(0, 128, "4", 128, 4), ("compress_ratios", "'4'")),
    "list ratio": (schedule(0, 128, [4], 128, 4), ("compress_ratios", "[4]")),
    "no list": ({"compress_ratios": 4}, ("compress_ratios", "4")),
    "kinds no list": ({"layer_types": 3}, ("layer_types", "3")),
    "rates no mapping": (
        {"compress_ratios": None, "layer_types": [CSA] * 5, "compress_rates": [4]},
        ("compress_rates", "[4]"),
    ),
    "no schedule": ({"compress_ratios": None}, ("compress_ratios", "layer_types")),
    "hash layers": ({"num_hash_layers": "two"}, ("num_hash_layers", "'two'")),
    "negative hash layers": ({"num_hash_layers": -1}, ("num_hash_layers", "-1")),
    "many hash layers": ({"num_hash_layers": 6}, ("num_hash_layers", "6", "5")),
    "rope type": ({"rope_scaling": {"type": "linear"}}, ("'linear'", "yarn")),
    "rope no mapping": ({"rope_scaling": [16]}, ("rope_scaling", "[16]")),
    "rope lacks": ({"rope_scaling": {"type": "yarn", "factor": 2}}, ("original_max",)),
    "rope factor": (yarn(factor="16"), ("factor", "'16'")),
    "rope beta": (yarn(beta_fast=0), ("beta_fast", "0")),
    "rope length": (yarn(original_max_position_embeddings=True), ("True",)),
    "rope temperature": (yarn(attention_factor=1.277), ("attention_factor", "1.277")),
    "rope unknown": (yarn(short_factor=1.0), ("rope_scaling", "['short_factor']")),
    "rope mscale": (yarn(mscale=0.707), ("mscale=0.707", "1 or left out")),
    "rope softmax": (yarn(mscale_all_dim=0.5), ("mscale_all_dim=0.5", "1 or left out")),
    "rope ramp": (yarn(truncate=False), ("truncate=False", "True or left out")),
    "rope untyped": (yarn(type="default"), ("rope_scaling", "'default'", "yarn")),
    "rope twice": (nested({}, factor=8), ("rope_scaling", "factor=8.0", "factor=16.0")),
    "rope main": (
        nested(RAW["rope_scaling"]),
        ("['main']", "without a"),
    ),
    "rope half": ({"rope_parameters": {"main": {}}}, ("rope_parameters", "'compress'")),
    "rotary twice": (
        {"partial_rotary_factor": 0.25},
        ("qk_rope_head_dim is 64", "and 32 by partial_rotary_factor=0.25"),
    ),
    "rotary part": ({"partial_rotary_factor": 0.3}, ("factor=0.3", "head_dim=128")),
    "rates twice": ({"compress_rates": {HCA: 64}}, ("compress_ratios", "64", HCA)),
    "rate": ({"compress_rates": {CSA: 0}}, ("compress_rates", "0", "at least 1")),
    "kinds twice": (
        {"mlp_layer_types": [TOPK_MOE] * 5},
        ("mlp_layer_types", TOPK_MOE, "num_hash_layers=2"),
    ),
    "short kinds": ({"mlp_layer_types": [TOPK_MOE]}, ("mlp_layer_types", "1", "5")),
    "one is no true": ({"norm_topk_prob": 1}, ("norm_topk_prob=1", "True")),
    "rope theta": ({"rope_theta": "a"}, ("rope_theta", "'a'")),
    "layers": ({"num_hidden_layers": 2.5}, ("num_hidden_layers", "2.5")),
    "negative layers": ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
    "nan": ({"hidden_size": math.nan}, ("hidden_size", "nan")),
}


@pytest.mark.parametrize("case", BAD_HF)
def test_from_hf_refuses_what_is_not_a_deepseek_v4(case):
    changes, parts = BAD_HF[case]
    refused(parts, changes)


@pytest.mark.parametrize("name", ["hidden_size", "index_topk", "num_hidden_layers"])
def test_from_hf_names_missing_keys(name):
    refused(("missing", name), without=(name,))


def test_from_hf_names_all_missing_keys_at_once():
    names = ("vocab_size", "head_dim", "o_lora_rank", "qk_rope_head_dim")
    refused(names, without=names)


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
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}


def test_from_hf_reads_a_release_with_a_drafter_and_says_once_that_it_is_left_out():
    with pytest.warns(UserWarning, match="dspark_block_size, .*the drafter") as said:
        config = Config.from_hf(raw_flash((0, 0, 0)) | DSPARK)
    assert len(said) == 1
    # The drafter's tensors stand where the prediction block's would.
    assert config == dataclasses.replace(Config.flash(), num_nextn_predict_layers=0)
    assert Config.from_hf(config.to_hf()) == config


def test_from_hf_names_the_keys_that_it_does_not_read_in_one_warning():
    unread = {"unsloth_version": "2026.9", "some_size": 3, "vision_dim": 1024}
    match = r"from_hf: .* some_size, unsloth_version \(unknown.*vision_dim \(of the im"
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


@pytest.mark.parametrize("layers", [1, 3, np.int64(3), 5])
@pytest.mark.parametrize("form", [RAW, Config.from_hf(RAW).to_hf()])
def test_from_hf_reads_the_first_layers(layers, form):
    whole = Config.from_hf(RAW)
    found = Config.from_hf(form, num_hidden_layers=layers)
    assert found == dataclasses.replace(
        whole,
        num_hidden_layers=layers,
        layer_types=whole.layer_types[:layers],
        compress_ratios=whole.compress_ratios[:layers],
        mlp_layer_types=whole.mlp_layer_types[:layers],
    )
    # Also where the number alone was changed by hand.
    by_hand = form | {"num_hidden_layers": int(layers)}
    assert Config.from_hf(by_hand, num_hidden_layers=layers) == found


@pytest.mark.parametrize("layers", [0, 6, 2.5, True, "3"])
def test_from_hf_refuses_layers_that_there_are_not(layers):
    match = re.escape(f"num_hidden_layers={layers!r}): must be an integer in [1, 5]")
    with pytest.raises(ValueError, match=match):
        Config.from_hf(RAW, num_hidden_layers=layers)


def test_token_ids_are_kept():
    config = Config.from_hf(RAW | {"eos_token_id": [1, 7], "bos_token_id": 3})
    assert (config.bos_token_id, config.eos_token_id) == (3, (1, 7))
    written = config.to_hf()
    assert (written["bos_token_id"], written["eos_token_id"]) == (3, [1, 7])
    assert Config.from_hf(json.loads(json.dumps(written))) == config
    none = Config.from_hf(RAW | {"eos_token_id": None})
    assert none.eos_token_id is None and Config.from_hf(none.to_hf()) == none
    # Where the file does not say, as in transformers.
    raw = {key: RAW[key] for key in RAW if key not in ("eos_token_id", "bos_token_id")}
    assert Config.from_hf(raw) == Config.from_hf(
        RAW | dict(bos_token_id=0, eos_token_id=1)
    )


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "version https://git-lfs"])
def test_from_hf_names_the_file_that_is_not_a_configuration(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Config.from_hf(tmp_path)


def test_from_hf_says_where_it_found_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        Config.from_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        Config.from_hf(tmp_path / "absent.json")


def test_from_hf_refuses_binary_and_deeply_nested_files(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"\xff\xfe\x00\x80", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not JSON"):
            Config.from_hf(path)


def test_from_hf_refuses_absurd_depths_before_allocating():
    raw = RAW | {"layer_types": [CSA] * 5, "num_hidden_layers": 10**6}
    tracemalloc.start()
    try:
        refused("layer_types", {**raw, "compress_ratios": None})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("head_dim", [20, 49, 98, 100, 512])
def test_from_hf_reads_the_rotary_size_as_a_fraction(head_dim):
    for rotary in range(2, head_dim + 1, 2):
        raw = RAW | {"head_dim": head_dim, "partial_rotary_factor": rotary / head_dim}
        raw |= {"qk_rope_head_dim": None, "index_head_dim": 512}
        assert Config.from_hf(raw).qk_rope_head_dim == rotary


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([10**6, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from(["", "yarn", SLIDING, CSA, HCA, HASH_MOE, TOPK_MOE, "4"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.dictionaries(
            st.sampled_from(["type", "factor", "main", "compress", "rope_theta", CSA]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [*RAW, "layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "x"]
)


@pytest.mark.filterwarnings("ignore:Config.from_hf")
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEYS, VALUES, max_size=3), st.sets(KEYS, max_size=2))
def test_from_hf_of_a_mutated_config_is_a_config_or_a_value_error(changes, without):
    raw = {k: v for k, v in (RAW | changes).items() if k not in without}
    try:
        config = Config.from_hf(raw)
    except ValueError as error:
        assert len(str(error)) > 10
    else:
        assert isinstance(hash(config), int)
        assert len(config.layer_types) == config.num_hidden_layers
