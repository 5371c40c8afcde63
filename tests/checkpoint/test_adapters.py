"""Adapters in PEFT's files: read by PEFT itself, read back, and what is refused."""

import functools
import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.models import forward_once, random_model, random_tokens, small_config
from tests.reference import as_torch, ours, reference_model
from tests.sharded import assert_same_bits, make_mesh

ALL = (*dsv4.DEFAULT_TARGETS, "attention.output_down", "shared", "experts")
# Every kind, and a stack of two. Compressors and indexers have projections of the same
# names as attention, which no target may catch.
CONFIG = small_config(
    num_hidden_layers=4,
    layer_types=(SLIDING, HCA, CSA, CSA),
    compress_ratios=(0, 16, 4, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE, TOPK_MOE),
    hc_sinkhorn_iters=2,
    num_nextn_predict_layers=0,
)
# What is quick to make.
SMALL = small_config(
    num_hidden_layers=2,
    layer_types=(SLIDING,) * 2,
    compress_ratios=(0,) * 2,
    mlp_layer_types=(TOPK_MOE,) * 2,
    num_nextn_predict_layers=0,
)


def adapted(model, targets=ALL, **options):
    """The model with adapters that are not 0."""
    options = dict(rank=3, alpha=7.5, key=jax.random.key(3)) | options
    model = dsv4.lora(model, targets=targets, **options)
    adapters, rest = eqx.partition(model, dsv4.lora_mask(model))
    generator = np.random.default_rng(0)

    def moved(x):
        return x + 0.1 * jnp.asarray(generator.standard_normal(x.shape), x.dtype)

    return eqx.combine(jax.tree.map(moved, adapters), rest)


@functools.cache
def small():
    return random_model(SMALL)


# Of transformers, in a call of PEFT's; and of PEFT, which looks for modules alone.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "targets, config",
    [
        (ALL, CONFIG),
        (("experts.down",), SMALL),
        (("attention.query_up", "layers.repeated.0.attention.output_down"), CONFIG),
    ],
)
def test_peft_gives_transformers_the_same_logits(targets, config, tmp_path):
    reference = reference_model(config)
    model = ours(config, reference)
    tokens = random_tokens(0, length=37, config=config)
    base = forward_once(model, tokens)
    model = adapted(model, targets)
    dsv4.save_lora(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(as_torch(tokens).long()).logits.numpy()
    found = forward_once(model, tokens)
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=5e-5)
    assert np.abs(found - base).max() > 0.05
    again = dsv4.load_lora(ours(config, reference_model(config)), tmp_path / "adapter")
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert_same_bits(again, model)
    theirs.save_pretrained(tmp_path / "peft")
    again = dsv4.load_lora(ours(config, reference_model(config)), tmp_path / "peft")
    assert_same_bits(again, model)


def test_adapters_over_a_mesh_are_saved_whole_and_loaded_in_place(tmp_path):
    mesh = make_mesh(expert=7)
    model = adapted(small(), ("attention", "experts"))
    over = dsv4.shard(model, mesh)
    dsv4.save_lora(over, tmp_path / "adapter", base_model="someone/something")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/something"
    assert_same_bits(dsv4.load_lora(small(), tmp_path / "adapter"), model)
    over = dsv4.load_lora(dsv4.shard(small(), mesh), tmp_path / "adapter")
    assert over.leaf_specs == dsv4.shard(model, mesh).leaf_specs
    assert_same_bits(over.model, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    dsv4.save_lora(adapted(small()), directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    return tensors, json.loads((directory / "adapter_config.json").read_text())


def write(directory, tensors, config):
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))


QUERY = "base_model.model.model.layers.1.self_attn.q_a_proj.lora_A.weight"
OUTPUT = "base_model.model.model.layers.0.self_attn.o_a_proj.lora_B.weight"


def changed(tensors, name, value):
    return tensors | {name: value(tensors[name])}


TENSORS = {
    "missing": (
        lambda t: {k: v for k, v in t.items() if k != QUERY},
        f"{QUERY} is missing .*3, 60",
    ),
    "extra": (
        lambda t: t | {QUERY.replace("q_a", "q_x"): t[QUERY]},
        "q_x_proj.* is no adapter of the model",
    ),
    "misshapen": (
        lambda t: changed(t, QUERY, lambda x: x[:2].copy()),
        r"q_a_proj.* of the shape \(2, 60\)",
    ),
    "integers": (
        lambda t: changed(t, QUERY, lambda x: x.astype(np.int32)),
        "is int32 of the shape",
    ),
    "not finite": (
        lambda t: changed(t, QUERY, lambda x: x * np.float32(np.inf)),
        f"{QUERY} has numbers that are not finite",
    ),
    "groups that share": (
        lambda t: changed(t, OUTPUT, lambda x: x + np.float32(1)),
        "o_a_proj.*not block-diagonal",
    ),
    "none": (lambda t: {"x": np.zeros(1, np.float32)}, "no adapter of the model"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_the_models_are_refused(case, saved, tmp_path):
    change, message = TENSORS[case]
    tensors, config = saved
    if case == "none":
        config = config | {"target_parameters": None}
    write(tmp_path, change(tensors), config)
    with pytest.raises(ValueError, match=message) as error:
        dsv4.load_lora(small(), tmp_path)
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_dora=True), "use_dora True; only False"),
        (dict(use_rslora=True), "use_rslora True"),
        (dict(peft_type="IA3"), "peft_type 'IA3'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(r=0), "has r 0"),
        (dict(lora_alpha=float("nan")), "lora_alpha nan"),
        (dict(rank_pattern={"q_a_proj": 4}), "of its own for 'q_a_proj'"),
        (dict(r=4, rank_pattern={}, alpha_pattern={}), "q_a_proj"),
    ],
)
def test_other_configurations_are_refused(change, message, saved, tmp_path):
    tensors, config = saved
    write(tmp_path, tensors, config | change)
    with pytest.raises(ValueError, match=message):
        dsv4.load_lora(small(), tmp_path)


def test_what_is_in_a_directory_is_not_lost(tmp_path):
    model = adapted(small(), ("attention.key_value",))
    directory = tmp_path / "adapter"
    dsv4.save_lora(model, directory)
    with pytest.raises(ValueError, match="has adapters; give another name, or overwr"):
        dsv4.save_lora(model, directory)
    dsv4.save_lora(adapted(small(), ("attention",)), directory, overwrite=True)
    names = load_file(directory / "adapter_model.safetensors")
    assert len(names) == 2 * 5 * 2
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt, which would be lost"):
        dsv4.save_lora(model, directory, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no directory of adapters"):
        dsv4.save_lora(model, tmp_path / "other", overwrite=True)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["adapter", "other"]


def test_models_without_adapters_or_with_others_are_refused(tmp_path):
    model = adapted(small(), ("attention.key_value",))
    with pytest.raises(ValueError, match="save_lora: the model has no adapters"):
        dsv4.save_lora(small(), tmp_path / "a")
    dsv4.save_lora(model, tmp_path / "a")
    with pytest.raises(ValueError, match="load_lora: the model has adapters already"):
        dsv4.load_lora(model, tmp_path / "a")
    shapes = eqx.filter_eval_shape(lambda: model)
    with pytest.raises(ValueError, match=re.escape("key_value has no numbers")):
        dsv4.save_lora(shapes, tmp_path / "b")
    with pytest.raises(ValueError, match="cannot be opened"):
        dsv4.load_lora(small(), tmp_path / "b")
