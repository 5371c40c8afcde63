"""A Hugging Face `config.json` is read and written, or what is wrong is said."""

import copy
import dataclasses
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_eqx import Config, YarnScaling
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.config.raw import NANO, RAW, raw_flash, refused, schedule
from tests.models import small_config
from tests.tiny import tiny_config

# The type checker of the test run would answer before ours does.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

CONFIGS = {
    "flash": Config.flash(),
    "pro": Config.pro(),
    "tiny": Config.tiny(),
    "T": tiny_config(),
    "without scaling": tiny_config(rope_scaling=None),
    "without prediction": tiny_config(num_nextn_predict_layers=0),
    "one kind": small_config(
        layer_types=(SLIDING,) * 3,
        compress_ratios=(0,) * 3,
        mlp_layer_types=(TOPK_MOE, HASH_MOE, TOPK_MOE),
    ),
    # transformers has one ratio for each kind.
    "two ratios": small_config(layer_types=(HCA, HCA, CSA), compress_ratios=(16, 8, 4)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name, tmp_path):
    config = CONFIGS[name]
    written = config.to_hf()
    assert Config.from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = Config.from_hf(tmp_path)
    assert found == config and hash(found) == hash(config)
    assert found.to_hf() == written
    for field in dataclasses.fields(Config):
        assert type(getattr(found, field.name)) is type(getattr(config, field.name))


def test_it_is_written_as_the_architecture_that_it_is():
    written = Config.flash().to_hf()
    assert written["architectures"] == ["DeepseekV4ForCausalLM"]
    assert written["model_type"] == "deepseek_v4"
    # One for each layer, then one for each prediction block, as in the release.
    assert len(written["compress_ratios"]) == 44
    assert written["compress_rates"] == {CSA: 4, HCA: 128}
    assert "compress_rates" not in CONFIGS["two ratios"].to_hf()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "two ratios"])
def test_transformers_reads_what_is_written(name, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoConfig

    from tests.reference import reference_config

    config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    found = AutoConfig.from_pretrained(tmp_path)
    wanted = reference_config(config)
    found.rope_parameters["compress"].pop("type", None)  # beside rope_type
    for key in (
        "layer_types mlp_layer_types rope_parameters hidden_size head_dim hc_eps "
        "partial_rotary_factor swiglu_limit routed_scaling_factor n_routed_experts "
        "sliding_window index_topk o_lora_rank"
    ).split():
        assert getattr(found, key) == getattr(wanted, key), key
    # Of kinds that there are; the others have defaults.
    assert found.compress_rates.items() >= wanted.compress_rates.items()
    assert Config.from_hf(found.to_dict()) == config
    found.save_pretrained(tmp_path / "again")
    assert Config.from_hf(tmp_path / "again") == config


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


BAD = {
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
    "rates twice": ({"compress_rates": {HCA: 64}}, ("compress_ratios", "64", HCA)),
    "rate": ({"compress_rates": {CSA: 0}}, ("compress_rates", "0", "at least 1")),
    "kinds twice": (
        {"mlp_layer_types": [TOPK_MOE] * 5},
        ("mlp_layer_types", TOPK_MOE, "num_hash_layers=2"),
    ),
    "short kinds": ({"mlp_layer_types": [TOPK_MOE]}, ("mlp_layer_types", "1", "5")),
    "layers": ({"num_hidden_layers": 2.5}, ("num_hidden_layers", "2.5")),
    "negative layers": ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
    "nan": ({"hidden_size": math.nan}, ("hidden_size", "nan")),
}


@pytest.mark.parametrize("case", BAD)
def test_from_hf_refuses_values_that_do_not_fit(case):
    changes, parts = BAD[case]
    refused(parts, changes)


@pytest.mark.parametrize("name", ["hidden_size", "index_topk", "num_hidden_layers"])
def test_from_hf_names_missing_keys(name):
    refused(("missing", name), without=(name,))


def test_from_hf_names_all_missing_keys_at_once():
    names = ("vocab_size", "head_dim", "o_lora_rank", "qk_rope_head_dim")
    refused(names, without=names)


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
