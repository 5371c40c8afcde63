"""What `Config.to_hf` writes is read back as the same configuration, by everyone."""

import dataclasses
import json

import pytest

from dsv4_eqx import Config
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.models import small_config
from tests.tiny import tiny_config

CONFIGS = {
    "flash": Config.flash(),
    "pro": Config.pro(),
    "tiny": Config.tiny(),
    "T": tiny_config(),
    "without scaling": tiny_config(rope_scaling=None),
    "without prediction": tiny_config(num_nextn_predict_layers=0),
    "two blocks": tiny_config(num_nextn_predict_layers=2),
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
