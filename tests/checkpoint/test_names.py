"""The table of names against transformers' names and a release's index."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import Config
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.reference import reference_model
from tests.tiny import tiny_config

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"


def shapes(config, official):
    """Shape of every published tensor; none may be named twice."""
    found = {}
    for source, _ in sources(abstract_model(config, jnp.float32), official=official):
        for name in source.names.flat:
            assert name not in found, name
            found[name] = source.tensor_shape
    return found


SCHEDULES = {
    "rest": tiny_config(num_nextn_predict_layers=0),
    "nothing repeats": tiny_config(
        num_nextn_predict_layers=0,
        num_hidden_layers=3,
        layer_types=(HCA, CSA, SLIDING),
        compress_ratios=(16, 4, 0),
        mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
    ),
    "everything repeats": tiny_config(
        num_nextn_predict_layers=0,
        num_hidden_layers=4,
        layer_types=(CSA, HCA) * 2,
        compress_ratios=(4, 16) * 2,
        mlp_layer_types=(TOPK_MOE,) * 4,
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_names_and_shapes_are_those_of_transformers(schedule):
    config = SCHEDULES[schedule]
    expected = {
        k: tuple(v.shape) for k, v in reference_model(config).state_dict().items()
    }
    assert shapes(config, official=False) == expected


def test_official_names_are_those_of_a_release():
    index = json.loads((NANO / "model.safetensors.index.json").read_text())
    expected = {n for n in index["weight_map"] if not n.endswith(".scale")}
    assert shapes(Config.from_hf(NANO), official=True).keys() == expected


def test_prediction_block_has_official_names_under_both_namings():
    official = shapes(tiny_config(), official=True)
    hf = shapes(tiny_config(), official=False)
    mtp = {name: shape for name, shape in official.items() if name.startswith("mtp.")}
    assert len(mtp) > 40 and mtp.items() <= hf.items()
    assert {"mtp.0.e_proj.weight", "mtp.0.ffn.gate.bias", "mtp.0.hc_head_fn"} <= set(
        mtp
    )


@pytest.mark.parametrize("official", [True, False])
def test_every_leaf_is_all_of_its_tensors(official):
    model = abstract_model(tiny_config(), jnp.float32)
    rows = list(sources(model, official=official))
    assert [id(leaf) for _, leaf in rows] == [id(x) for x in jax.tree.leaves(model)]
    for source, leaf in rows:
        size = source.names.size * np.prod(source.tensor_shape, dtype=int)
        assert size == leaf.size, source.path


PAIRS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "hc_ffn_fn": "ffn_hc.fn",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}


def test_both_namings_mean_the_same_leaf():
    model = abstract_model(tiny_config(), jnp.float32)
    hf = [source.names for source, _ in sources(model, official=False)]
    meaning = {}
    for (source, _), others in zip(sources(model, official=True), hf):
        if source.names.shape == others.shape:
            meaning |= zip(source.names.flat, others.flat)
    for layer in (2, 4, 5):  # before, in and after what repeats
        for official, other in PAIRS.items():
            assert (
                meaning[f"layers.{layer}.{official}"] == f"model.layers.{layer}.{other}"
            )
    assert meaning["head.weight"] == "lm_head.weight"
    assert meaning["hc_head_scale"] == "model.hc_head.hc_scale"
