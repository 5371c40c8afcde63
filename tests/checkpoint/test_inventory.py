"""Checkpoints that others wrote: what is left out, what is refused in one sentence."""

import os
import re

import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.describe import describe
from dsv4_eqx.checkpoint.faults import FaultyCheckpoint, summary
from dsv4_eqx.checkpoint.inventory import open_checkpoint
from dsv4_eqx.checkpoint.load import Loader
from tests.checkpoint.saving import one_layer, small_model
from tests.models import random_tensors
from tests.official import write_release
from tests.sharded import assert_same_bits

FILE = "model.safetensors"


def with_block():
    """One layer and a prediction block."""
    return one_layer(num_nextn_predict_layers=1)


def of_block(tensors, number):
    """What a prediction block has, under another number."""
    names = [name for name in tensors if name.startswith("mtp.0.")]
    return {f"mtp.{number}.{name[6:]}": tensors[name] for name in names}


def test_a_checkpoint_without_its_prediction_block_is_loaded_and_that_is_said(tmp_path):
    directory = write_release(tmp_path, with_block(), random_tensors(one_layer()))
    with pytest.warns(UserWarning, match="num_nextn_predict_layers=1") as caught:
        model = dsv4.from_pretrained(directory)
    assert len(caught) == 1
    assert_same_bits(model, small_model())
    text, is_good = describe(directory)
    assert is_good and "without prediction block" in text


def test_a_part_of_a_prediction_block_is_a_fault(tmp_path):
    tensors = random_tensors(with_block())
    del tensors["mtp.0.e_proj.weight"]
    directory = write_release(tmp_path, with_block(), tensors)
    with pytest.raises(FaultyCheckpoint, match="mtp.0.e_proj.weight is missing"):
        dsv4.from_pretrained(directory)


@pytest.mark.parametrize("blocks, number", [(0, 0), (1, 1)])
def test_prediction_tensors_that_are_not_expected_are_faults(blocks, number, tmp_path):
    """Where there should be none, and a second block alone."""
    config = one_layer(num_nextn_predict_layers=blocks)
    tensors = random_tensors(one_layer())
    stray = of_block(random_tensors(with_block()), number)
    directory = write_release(tmp_path, config, tensors | stray)
    with pytest.raises(FaultyCheckpoint) as error:
        dsv4.from_pretrained(directory)
    extra = [f for f in error.value.faults if f.endswith("is not part of the model")]
    assert {fault.split()[0] for fault in extra} == stray.keys()


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_model_is_loaded_without_the_drafter_dspark(blocks, tmp_path):
    tensors = random_tensors(one_layer())
    block = of_block(random_tensors(with_block()), 0)
    for stage in range(3):
        tensors |= {
            name.replace("mtp.0", f"mtp.{stage}"): value
            for name, value in block.items()
            if not re.search("[eh]_proj|[eh]norm", name)
        }
    for name in ("mtp.0.main_proj", "mtp.2.markov_head.markov_w1"):
        tensors[f"{name}.weight"] = np.zeros((4, 6), np.float32)
    config = one_layer(num_nextn_predict_layers=blocks)
    directory = write_release(tmp_path, config, tensors)
    count = sum(name.startswith("mtp.") for name in tensors)
    with pytest.warns(UserWarning, match=rf"DSpark, {count} tensors mtp.\*") as caught:
        model = dsv4.from_pretrained(directory)
    assert len(caught) == 1
    assert_same_bits(model, small_model())


def test_another_programs_format_is_one_error(tmp_path):
    tensors = random_tensors(one_layer())
    for expert in range(7):
        name = f"layers.0.ffn.experts.{expert}.w1.weight"
        tensors[name] = np.zeros((28, 30), np.int8)
        for ending in ("scale", "scale_2"):
            tensors[f"{name}_{ending}"] = np.ones((), np.float32)
    directory = write_release(tmp_path, one_layer(), tensors)
    with pytest.raises(ValueError, match="7 weights are in the format NVFP4") as error:
        dsv4.from_pretrained(directory)
    assert "\n" not in str(error.value)


def test_an_unused_bias_is_read_if_it_is_zero(tmp_path):
    tensors, name = random_tensors(one_layer()), "layers.0.ffn.gate.bias"
    tensors[name] = np.zeros(7, np.float32)
    directory = write_release(tmp_path / "zero", one_layer(), tensors)
    assert_same_bits(dsv4.from_pretrained(directory), small_model())
    tensors[name][6] = 1
    directory = write_release(tmp_path / "one", one_layer(), tensors)
    with pytest.raises(FaultyCheckpoint, match=f"{name} is not zero"):
        dsv4.from_pretrained(directory)


def test_auto_is_the_checkpoints_own_dtype(tmp_path):
    tensors = random_tensors(one_layer())
    tensors["embed.weight"] = tensors["embed.weight"].astype(np.float16)
    directory = write_release(tmp_path, one_layer(), tensors)
    assert dsv4.from_pretrained(directory, dtype="auto").unembedding.dtype == "float16"


@pytest.mark.parametrize("lost", [1, 100_000])
def test_a_file_that_becomes_shorter_is_an_error(lost, tmp_path):
    write_release(tmp_path, one_layer(), random_tensors(one_layer()))
    checkpoint = open_checkpoint("test", tmp_path, None)
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - lost)
    with Loader(checkpoint, keep_quantized=False) as loader:
        with pytest.raises(ValueError, match=f"{FILE}: ends within "):
            for source, leaf in checkpoint.wanted:
                loader.load(source, leaf, None)


def test_many_faults_are_told_by_kind():
    experts = [
        f"layers.{i}.experts.{j}.w1 is missing" for i in (2, 3) for j in (0, 4, 5)
    ]
    others = [f"layers.{i}.norm has the shape (3,), not (4,)" for i in range(9)]
    assert summary([*experts, *others, "embed is missing"]) == [
        "embed is missing",
        "layers.{2..3}.experts.{0,4,5}.w1 is missing: 6",
        "layers.{0..8}.norm has the shape (3,), not (4,): 9",
    ]
    assert summary(experts) == sorted(experts)
    for count in (300, 3000):
        unlike = summary([f"{i}a is missing" for i in range(count)])
        assert len(unlike) == 51 and f"and {count - 50} more" in unlike[-1]
