"""Every official release's `config.json`, and what transformers writes for it."""

import dataclasses
import json

import pytest

from dsv4_eqx import Config, DSparkConfig
from tests.config.raw import RELEASES, written_by_transformers

# The type checker of the test run would answer before ours does.
pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    pytest.mark.filterwarnings("ignore:Config.from_hf. keys .* which DSparkConfig"),
]
RANKS = {"Flash": 256, "Pro": 512}
LAYERS = {"Flash": (40, 41, 42), "Pro": (58, 59, 60)}
every = pytest.mark.parametrize("name", RELEASES)


def has_drafter(name):
    return not name.endswith("Base") and "-" in name


def expected(name):
    """The configuration and the drafter of a release."""
    size = name.split("-")[0]
    config = {"Flash": Config.flash(), "Pro": Config.pro()}[size]
    if not has_drafter(name):
        return config, None
    drafter = DSparkConfig(
        block_size=5,
        noise_token_id=128799,
        target_layer_ids=LAYERS[size],
        markov_rank=RANKS[size],
        num_stages=3,
    )
    return dataclasses.replace(config, num_nextn_predict_layers=0), drafter


@every
@pytest.mark.parametrize("form", [dict, written_by_transformers])
def test_a_release_is_read_without_editing(name, form, tmp_path):
    raw = form(RELEASES[name])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for source in (raw, tmp_path, str(tmp_path / "config.json")):
        found = Config.from_hf(source), DSparkConfig.from_hf(source)
        assert found == expected(name)


@every
def test_transformers_writes_what_is_read(name, tmp_path):
    """The mapping above, key by key, by the transformers that is installed."""
    pytest.importorskip("torch")
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(RELEASES[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    mine = written_by_transformers(RELEASES[name])
    for version in (written, mine):
        del version["transformers_version"]
    assert written == mine


@every
def test_what_is_written_for_a_drafter_is_read_back(name):
    config, drafter = expected(name)
    if drafter is None:
        assert DSparkConfig.from_hf(config.to_hf()) is None
        return
    written = config.to_hf() | drafter.to_hf()
    assert DSparkConfig.from_hf(json.loads(json.dumps(written))) == drafter


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_the_number_of_prediction_blocks_says_nothing_of_a_drafter(blocks):
    raw = RELEASES["Flash-0731"] | {"num_nextn_predict_layers": blocks}
    assert (Config.from_hf(raw), DSparkConfig.from_hf(raw)) == expected("Flash-0731")


def test_a_drafter_of_no_tokens_is_none():
    raw = RELEASES["Flash"] | {"dspark_block_size": 0}
    assert DSparkConfig.from_hf(raw) is None
    assert Config.from_hf(raw) == Config.flash()


BAD = {
    "three keys": ({"dspark_markov_rank": None}, "lacks ['dspark_markov_rank']"),
    "no size": ({"dspark_block_size": None}, "lacks ['dspark_block_size']"),
    "negative size": ({"dspark_block_size": -1}, "dspark_block_size=-1"),
    "text": ({"dspark_markov_rank": "256"}, "markov_rank='256'"),
    "no layers": ({"dspark_target_layer_ids": []}, "target_layer_ids=()"),
    "one layer": ({"dspark_target_layer_ids": 40}, "target_layer_ids=40"),
    "order": ({"dspark_target_layer_ids": [41, 40]}, "target_layer_ids=(41, 40)"),
    "twice": ({"dspark_target_layer_ids": [41, 41]}, "target_layer_ids=(41, 41)"),
    "beyond": ({"dspark_target_layer_ids": [42, 43]}, "below num_hidden_layers=43"),
    "noise": ({"dspark_noise_token_id": 129280}, "below vocab_size=129280"),
    "ratios": (
        {"compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0, 4, 0]},
        "[0, 4, 0] does",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_drafter_that_does_not_fit_is_refused(case):
    changes, message = BAD[case]
    raw = RELEASES["Flash-0731"] | changes
    with pytest.raises(ValueError) as error:
        Config.from_hf(raw)
    assert message in str(error.value)
    if case != "ratios":
        with pytest.raises(ValueError) as error:
            DSparkConfig.from_hf(raw)
        assert message in str(error.value)


def test_the_first_layers_of_a_release_with_a_drafter_are_read():
    found = Config.from_hf(RELEASES["Pro-0813"], num_hidden_layers=5)
    assert found.compress_ratios == (128, 128, 4, 128, 4)
    assert found.num_nextn_predict_layers == 0
