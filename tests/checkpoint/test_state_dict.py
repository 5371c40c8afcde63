"""Models from state dicts: both namings, every fault, and a release end to end."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from dsv4_eqx import Config, from_pretrained, from_state_dict
from dsv4_eqx.checkpoint.faults import FaultyCheckpoint
from dsv4_eqx.checkpoint.names import sources
from tests.models import (
    T,
    pair,
    quick_jit,
    random_model,
    random_tensors,
    small_config,
)

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_VALUES = torch.cat([E2M1, -E2M1])


def tensors_of(model, official):
    """The state dict that a model came from."""
    tensors = {}
    for source, leaf in sources(model, official=official):
        for index in np.ndindex(source.names.shape):
            value = np.asarray(leaf[index])
            tensors[source.names[index]] = value.reshape(source.tensor_shape)
    return tensors


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_hf_names_round_trip_to_the_bit():
    reference, model = pair(0)
    expected = {k: v.numpy() for k, v in reference.state_dict().items()}
    found = tensors_of(model, official=False)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_official_names_round_trip_to_the_bit():
    _, model = pair(0)
    config = small_config()
    assert_same(from_state_dict(_without_mtp(T), tensors_of(model, True)), model)
    with_mtp = random_model(config)
    assert len(with_mtp.mtp) == 1
    assert_same(from_state_dict(config, tensors_of(with_mtp, True)), with_mtp)


def _without_mtp(config):
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def test_hf_names_with_a_prediction_block_keep_it():
    config = small_config()
    model = random_model(config)
    assert_same(from_state_dict(config, tensors_of(model, False)), model)


def test_experts_and_halves_land_where_they_belong():
    config = small_config()
    tensors = random_tensors(config)
    moe = from_state_dict(config, tensors).layers[1].moe
    for half, name in enumerate(("w1", "w3")):
        expert = tensors[f"layers.1.ffn.experts.5.{name}.weight"]
        np.testing.assert_array_equal(moe.experts.gate_up[5, half], expert)
        shared = tensors[f"layers.1.ffn.shared_experts.{name}.weight"]
        np.testing.assert_array_equal(moe.shared.gate_up[half], shared)


def test_dtype_is_the_embeddings_and_islands_stay_float32():
    config = small_config()
    tensors = random_tensors(config)
    tensors["embed.weight"] = tensors["embed.weight"].astype(ml_dtypes.bfloat16)
    for model in (
        from_state_dict(config, tensors),
        from_state_dict(config, random_tensors(config), dtype=jnp.bfloat16),
    ):
        block = model.layers[2]
        assert model.embedding.dtype == model.unembedding.dtype == jnp.bfloat16
        assert block.moe.experts.down.dtype == jnp.bfloat16
        islands = (
            block.attention.sinks,
            block.attention.compressor.position_bias,
            block.attention_norm.weight,
            block.moe.router.bias,
            block.moe_connection.weight,
            model.head.base,
        )
        assert {x.dtype for x in islands} == {jnp.dtype("float32")}
        assert model.layers[0].moe.router.table.dtype == jnp.int32


def test_all_faults_are_in_one_error():
    config = small_config()
    tensors = random_tensors(config)
    del tensors["norm.weight"], tensors["layers.1.ffn.experts.3.w2.weight"]
    tensors["layers.1.ffn.experts.7.w2.weight"] = np.zeros((60, 28), np.float32)
    tensors["layers.2.attn.wq_a.scale"] = np.ones((1, 1), np.float32)
    tensors["layers.0.attn.wkv.weight"] = tensors["layers.0.attn.wkv.weight"].T
    tensors["layers.2.hc_attn_fn"] = np.zeros((24, 240), np.int32)
    table = tensors["layers.0.ffn.gate.tid2eid"]
    tensors["layers.0.ffn.gate.tid2eid"] = table.astype(np.float32)
    with pytest.raises(ValueError) as error:
        from_state_dict(config, tensors)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("from_state_dict: 7 faults")
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        [
            "norm.weight is missing (shape (60,))",
            "layers.1.ffn.experts.3.w2.weight is missing (shape (60, 28))",
            "layers.1.ffn.experts.7.w2.weight is not part of the model",
            "layers.2.attn.wq_a.scale is not part of the model",
            "layers.0.attn.wkv.weight has the shape (60, 20), not (20, 60)",
            "layers.2.hc_attn_fn has the dtype int32, for float32",
            "layers.0.ffn.gate.tid2eid has the dtype float32, for int32",
        ]
    )


@pytest.mark.parametrize("tensors", [{}, {"something": np.zeros(3)}], ids=len)
def test_a_state_dict_of_something_else_is_refused(tensors):
    with pytest.raises(FaultyCheckpoint, match="[0-9]+ faults:") as error:
        from_state_dict(_without_mtp(small_config()), tensors)
    text, faults = str(error.value), error.value.faults
    assert any(fault.startswith("embed.weight is missing") for fault in faults)
    # As many as there are alike, in a line.
    expert = (
        "layers.{0..2}.ffn.experts.{0..6}.w1.weight is missing (shape (28, 60)): 21"
    )
    assert expert in text and text.count("\n") <= 51 < len(faults)


def test_a_name_that_is_no_text_is_refused(without_shape_checks):
    with pytest.raises(
        ValueError, match=r"from_state_dict\(tensors=3\): must be named"
    ):
        from_state_dict(small_config(), {3: np.zeros(3)})


def faults_of(tensors, **options):
    """The lines of the error."""
    with pytest.raises(ValueError, match="from_state_dict: ") as error:
        from_state_dict(small_config(), tensors, **options)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_the_naming_is_that_of_most_names():
    model = random_model(small_config())
    official, hf = tensors_of(model, True), tensors_of(model, False)
    embedding = official.pop("embed.weight")
    assert faults_of(official) == ["embed.weight is missing (shape (97, 60))"]
    del hf["model.embed_tokens.weight"]
    assert faults_of(hf | {"embed.weight": embedding}) == [
        "embed.weight is not part of the model",
        "model.embed_tokens.weight is missing (shape (97, 60))",
    ]


@pytest.mark.parametrize(
    "official, name, twin",
    [
        (True, "lm_head.weight", "head.weight"),
        (False, "embed.weight", "model.embed_tokens.weight"),
        (False, "norm.weight", "model.norm.weight"),
        (
            True,
            "model.layers.1.mlp.experts.gate_up_proj",
            "layers.1.ffn.experts.0.w1.weight",
        ),
        (
            False,
            "layers.2.ffn.experts.6.w3.weight",
            "model.layers.2.mlp.experts.gate_up_proj",
        ),
        (
            False,
            "layers.2.ffn.shared_experts.w3.weight",
            "model.layers.2.mlp.shared_experts.up_proj.weight",
        ),
    ],
)
def test_a_tensor_under_both_namings_is_a_fault(official, name, twin):
    model = random_model(small_config())
    stray = {name: tensors_of(model, not official)[name]}
    faults = faults_of(tensors_of(model, official) | stray)
    assert faults == [f"{name} is {twin}, given twice"]


def test_norms_under_the_names_that_transformers_writes():
    config = _without_mtp(small_config())
    model = random_model(config)
    tensors = tensors_of(model, False)
    renamed = {name.replace("kv_norm", "norm"): x for name, x in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) == 6
    assert_same(from_state_dict(config, renamed), model)
    with pytest.raises(ValueError, match="are the same tensor, model.layers.*kv_norm"):
        from_state_dict(config, tensors | renamed)


def test_a_scalar_is_a_fault_like_others():
    tensors = random_tensors(small_config())
    tensors["norm.weight"] = np.float32(1).reshape(())
    with pytest.raises(ValueError, match=r"norm.weight has the shape \(\)"):
        from_state_dict(small_config(), tensors)


@pytest.mark.parametrize("value", [2**33 + 5, -(2**40)])
def test_routing_tables_beyond_int32_are_refused(value):
    tensors = random_tensors(small_config())
    tensors["layers.0.ffn.gate.tid2eid"][7, 1] = value
    with pytest.raises(ValueError, match="layers.0.ffn.gate.tid2eid .* beyond int32"):
        from_state_dict(small_config(), tensors)


@pytest.mark.parametrize("value", [-1, 7])
def test_routing_tables_naming_no_expert_are_refused(value):
    tensors = random_tensors(small_config())
    tensors["layers.0.ffn.gate.tid2eid"][7, 1] = value
    with pytest.raises(ValueError, match="layers.0.ffn.gate.tid2eid"):
        from_state_dict(small_config(), tensors)


def test_quantised_dtypes_are_refused():
    tensors = random_tensors(small_config())
    for name, dtype in (
        ("layers.0.attn.wq_a.weight", ml_dtypes.float8_e4m3fn),
        ("layers.0.attn.wq_b.weight", ml_dtypes.float8_e8m0fnu),
    ):
        tensors[name] = tensors[name].astype(dtype)
    with pytest.raises(ValueError, match="layers.0.attn.wq_a.weight") as error:
        from_state_dict(small_config(), tensors)
    assert "layers.0.attn.wq_b.weight" in str(error.value)


def test_a_quantised_embedding_is_a_fault_like_others():
    tensors = random_tensors(small_config())
    del tensors["norm.weight"]
    tensors["embed.weight"] = tensors["embed.weight"].astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match="2 faults") as error:
        from_state_dict(small_config(), tensors)
    assert "embed.weight has the dtype float8_e4m3fn" in str(error.value)


class Unreadable:
    """Has a shape, and nothing that numpy understands."""

    shape = (60,)

    def __getitem__(self, index):
        raise TypeError


def test_what_numpy_cannot_read_is_a_fault_like_others():
    tensors = random_tensors(small_config())
    tensors["norm.weight"] = Unreadable()
    tensors["head.weight"] = None
    assert faults_of(tensors) == [
        "head.weight is a NoneType, not an array",
        "norm.weight is a Unreadable that numpy cannot read",
    ]


def test_torch_tensors_are_read_in_any_dtype_and_with_gradients():
    config, tensors = small_config(), random_tensors(small_config())
    in_torch = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    for name, value in in_torch.items():
        if value.is_floating_point():
            in_torch[name] = value.to(torch.bfloat16).requires_grad_()
            narrow = tensors[name].astype(ml_dtypes.bfloat16)
            tensors[name] = narrow
    expected = from_state_dict(config, tensors)
    assert expected.embedding.dtype == jnp.bfloat16
    assert_same(from_state_dict(config, in_torch, dtype="auto"), expected)
    # Pairs of a name and a parameter, as a torch module gives them.
    assert_same(from_state_dict(config, iter(in_torch.items())), expected)
    packed = torch.zeros(20, 60).to(torch.float8_e4m3fn)
    assert faults_of(in_torch | {"layers.0.attn.wkv.weight": packed}) == [
        "layers.0.attn.wkv.weight has the dtype float8_e4m3fn, for bfloat16: multiply "
        "it by its scales"
    ]


def test_without_prediction_tensors_there_is_no_block_and_it_is_said():
    config, model = small_config(), random_model(_without_mtp(small_config()))
    with pytest.warns(UserWarning, match="num_nextn_predict_layers=1.*no tensors"):
        found = from_state_dict(config, tensors_of(model, True))
    assert_same(found, model)
    assert_same(from_state_dict(config, tensors_of(model, False)), model)


def test_a_bias_of_zeros_is_read_where_no_layer_uses_it():
    config, model = small_config(), random_model(small_config())
    names = {
        True: "layers.0.ffn.gate.bias",
        False: "model.layers.0.mlp.gate.e_score_correction_bias",
    }
    for official, name in names.items():
        bias = np.zeros(7, np.float32)
        tensors = tensors_of(model, official) | {name: bias}
        assert_same(from_state_dict(config, tensors), model)
        bias[3] = 1e-9
        (fault,) = faults_of(tensors)
        assert fault == f"{name} is not zero, and its layer routes by token id"
        tensors[name] = np.zeros(6, np.float32)
        assert faults_of(tensors) == [f"{name} is not part of the model"]


@pytest.mark.parametrize(
    "source, dtype, value",
    [
        ("float64", "float32", -1e39),
        ("float64", "bfloat16", 1e39),
        ("float32", "bfloat16", 3.4e38),
        ("float32", "float16", 7e4),
        ("bfloat16", "float16", 65536.0),
    ],
)
def test_finite_values_that_would_become_infinite_are_refused(source, dtype, value):
    tensors = random_tensors(small_config())
    wide = tensors["head.weight"].astype(source)
    wide[3, 5] = value
    for others in ((), (math.nan, -math.inf)):
        wide[0, : len(others)] = others
        (fault,) = faults_of(tensors | {"head.weight": wide}, dtype=dtype)
        assert fault.startswith(f"head.weight has {float(wide[3, 5])} at [3, 5]")
        assert fault.endswith(f"beyond {dtype}")


def test_values_that_are_not_finite_stay_as_they_are():
    tensors = random_tensors(small_config())
    wide = tensors["head.weight"].astype(np.float64)
    wide[0, :4] = math.inf, -math.inf, math.nan, 3.4028235e38  # the largest float32
    model = from_state_dict(small_config(), tensors | {"head.weight": wide})
    np.testing.assert_array_equal(model.unembedding, wide.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.complex64, "foo"])
def test_dtypes_that_are_none_for_weights_are_refused(dtype):
    config = small_config()
    with pytest.raises(ValueError, match=r"from_state_dict\(dtype=.*bfloat16"):
        from_state_dict(config, random_tensors(config), dtype=dtype)


def test_float64_becomes_float32_only_when_told_to():
    config = small_config()
    tensors = random_tensors(config)
    tensors["embed.weight"] = tensors["embed.weight"].astype(np.float64)
    with pytest.raises(ValueError, match="float64.*jax_enable_x64.*another dtype"):
        from_state_dict(config, tensors)
    model = from_state_dict(config, tensors, dtype=jnp.float32)
    assert model.embedding.dtype == jnp.float32


def dequantise(weight, scale):
    """float32 of an FP8 or FP4 tensor with its block scales."""
    scale = torch.exp2(scale.view(torch.uint8).float() - 127)
    if weight.dtype == torch.int8:
        byte = weight.view(torch.uint8).long()
        values = FP4_VALUES[torch.stack([byte & 15, byte >> 4], dim=-1)].flatten(1)
        return values * scale.repeat_interleave(32, dim=1)
    rows, columns = weight.shape
    scale = scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return weight.float() * scale[:rows, :columns]


@functools.cache
def nano_release():
    """The model of the files, every tensor in float32, and what it should give."""
    index = json.loads((NANO / "model.safetensors.index.json").read_text())
    raw = {}
    for file in sorted(set(index["weight_map"].values())):
        raw |= load_file(NANO / file)
    assert raw.keys() == index["weight_map"].keys()
    tensors = {}
    for name, value in raw.items():
        if name.endswith(".scale"):
            continue
        scale = raw.get(name.removesuffix("weight") + "scale")
        if scale is not None:
            value = dequantise(value, scale)
        elif value.is_floating_point():
            value = value.float()
        tensors[name] = value.numpy()
    expected = load_numpy(NANO / "expected.safetensors")
    return from_state_dict(Config.from_hf(NANO), tensors), expected


def test_nano_release_is_loaded_as_its_formats_are_defined():
    """Whose logits are compared with the official code's where it is loaded."""
    model, _ = nano_release()
    assert_same(from_pretrained(NANO, dtype="float32"), model)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_nano_release_gives_the_official_codes_streams():
    model, expected = nano_release()

    @quick_jit
    def run(model, tokens):
        positions = jnp.arange(tokens.shape[1])[None]
        streams = jnp.repeat(model.embedding[tokens][:, :, None], 4, axis=2)
        outputs = []
        for layer in range(len(model.layers)):
            streams = model.layers[layer](streams, tokens, positions)
            outputs.append(streams[:, -8:])
        return outputs

    for layer, streams in enumerate(run(model, expected["tokens"])):
        wanted = expected[f"streams.{layer}"]
        np.testing.assert_allclose(streams, wanted, rtol=0, atol=5e-5)
