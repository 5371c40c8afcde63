"""FP8 and FP4: every code with every scale, edges of blocks, and what is no number."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.quantized import dequantize_on_cpu
from dsv4_eqx.config.kinds import SLIDING, TOPK_MOE
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, dequantize, is_quantized
from tests.checkpoint.saving import load_inner
from tests.models import QUICKLY, small_config
from tests.official import (
    E8M0,
    FP4_VALUES,
    FP8,
    meaning,
    meanings,
    random_codes,
    random_release,
    scale_name,
    wide_config,
    write_release,
)
from tests.sharded import assert_same_bits, make_mesh

FP4 = np.dtype(ml_dtypes.float4_e2m1fn)
NAN_SCALE = 255
ALL_BYTES = np.arange(256, dtype=np.uint8)
unpack = jax.jit(dequantize, compiler_options=QUICKLY)
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def every_product(code_dtype):
    """Bytes of codes, a row for each scale, the scales, and the float64 products."""
    codes = np.tile(ALL_BYTES, (256, 1))
    of_scales = torch.from_numpy(ALL_BYTES).view(torch.float8_e8m0fnu).double()
    if code_dtype == FP8:
        values = torch.from_numpy(ALL_BYTES).view(torch.float8_e4m3fn).double()
    else:
        pairs = np.stack([ALL_BYTES & 15, ALL_BYTES >> 4], axis=-1)
        values = torch.from_numpy(FP4_VALUES[pairs].reshape(-1))
    return codes, ALL_BYTES[:, None], of_scales[:, None] * values


def assert_exact(found, products, dtype):
    """Equal to the bit where the dtype has a normal number for it, or zero."""
    expected = products.to(getattr(torch, dtype)).float().numpy()
    with np.errstate(over="ignore"):
        by_numpy = products.numpy().astype(np.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(expected, by_numpy)
    found = np.asarray(found).astype(np.float32)
    is_normal = (np.abs(expected) >= 2.0**-126) | (expected == 0)
    assert found[is_normal].tobytes() == expected[is_normal].tobytes()
    # The others are what they should be, or zero.
    rest, wanted = found[~is_normal], expected[~is_normal]
    assert ((rest == wanted) | (rest == 0)).all()
    assert (np.signbit(rest) == np.signbit(wanted)).all()


@DTYPES
@pytest.mark.parametrize("code_dtype", [FP8, FP4], ids=str)
def test_every_code_with_every_scale(code_dtype, dtype):
    codes, scales, products = every_product(code_dtype)
    codes, scales = codes[:NAN_SCALE], scales[:NAN_SCALE]
    packed = QuantizedWeight(
        jnp.asarray(codes), jnp.asarray(scales), code_dtype, np.dtype(dtype)
    )
    found = np.array(packed.dequantize())
    again = dequantize_on_cpu(codes, scales, code_dtype, np.dtype(dtype))
    assert again.tobytes() == found.tobytes()
    expected = products[:NAN_SCALE]
    if code_dtype == FP8:  # NaN has many bits
        for code in (0x7F, 0xFF):
            assert np.isnan(found[:, code]).all()
            found[:, code], expected[:, code] = 0, 0
    assert_exact(found, expected, dtype)


def tall_config():
    """`wq_a` has 16 x 16 blocks of FP8, each expert's `w1` 4,096 blocks of FP4."""
    return small_config(
        hidden_size=2048,
        q_lora_rank=2048,
        moe_intermediate_size=64,
        n_routed_experts=3,
        num_hidden_layers=1,
        layer_types=(SLIDING,),
        compress_ratios=(0,),
        mlp_layer_types=(TOPK_MOE,),
        num_nextn_predict_layers=0,
    )


def with_every_product():
    """A release whose `wq_a` and first `w1` have every code in blocks of every scale.

    Without those that are no number in bfloat16.
    """
    tensors = random_release(tall_config())
    scales = np.minimum(ALL_BYTES, NAN_SCALE - 1)
    half = ALL_BYTES.repeat(64).reshape(128, 128)
    codes = np.where(half & 127 == 127, 0, half).astype(np.uint8)
    fp8 = np.tile(codes, (16, 16)).view(FP8), scales.reshape(16, 16).view(E8M0)
    of_blocks = scales.repeat(16).reshape(64, 64)
    fp4 = np.tile(ALL_BYTES.view(np.int8), 256).reshape(64, 1024), of_blocks.view(E8M0)
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    for name, (codes, scales) in (
        ("attn.wq_a", fp8),
        ("ffn.experts.0.w1", fp4),
    ):
        too_large = np.abs(meaning(codes, scales)) > largest
        if codes.dtype == np.int8:
            too_large = too_large.reshape(*codes.shape, 2).any(axis=-1)
        codes = codes.copy()
        codes.view(np.uint8)[too_large] = 0
        tensors[f"layers.0.{name}.weight"] = codes
        tensors[f"layers.0.{name}.scale"] = scales
    return tensors


@pytest.fixture(scope="module")
def every_product_release(tmp_path_factory):
    directory = tmp_path_factory.mktemp("release")
    tensors = with_every_product()
    return write_release(directory, tall_config(), tensors), tensors


@pytest.mark.parametrize("dtype", ["float32", SLOW("bfloat16")])
def test_every_code_with_every_scale_through_the_loader(every_product_release, dtype):
    directory, tensors = every_product_release
    models = [
        dsv4.from_pretrained(directory, dtype=dtype, keep_quantized=keep)
        for keep in (False, True)
    ]
    assert is_quantized(models[1].layers[0].attention.query_down)
    for model in map(unpack, models):
        block = model.layers[0]
        for leaf, name in (
            (block.attention.query_down, "attn.wq_a"),
            (block.moe.experts.gate_up[0, 0], "ffn.experts.0.w1"),
        ):
            parts = (tensors[f"layers.0.{name}.{part}"] for part in ("weight", "scale"))
            assert_exact(leaf, torch.from_numpy(meaning(*parts)), dtype)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A release with blocks at every edge, and its weights in float32."""
    config = wide_config()
    tensors = random_release(config)
    directory = write_release(tmp_path_factory.mktemp("wide"), config, tensors)
    return directory, dsv4.from_state_dict(config, meanings(tensors))


@pytest.mark.parametrize(
    "sizes", [SLOW({}), dict(tensor=2, expert=3), SLOW(dict(tensor=6))], ids=str
)
def test_blocks_at_edges_and_across_merged_dimensions(wide, sizes):
    directory, expected = wide
    mesh = make_mesh(**sizes) if sizes else None
    for keep in (False, True):
        model = load_inner(directory, dtype="float32", mesh=mesh, keep_quantized=keep)
        attention = model.layers[0].attention
        assert is_quantized(attention.output_up) == keep
        assert is_quantized(attention.output_down.weight) == keep
        assert_same_bits(unpack(model), expected)


def test_the_columns_of_packed_experts_are_split(wide):
    directory, _ = wide
    model = load_inner(directory, mesh=make_mesh(tensor=6), keep_quantized=True)
    down = model.layers[0].moe.experts.down
    assert (
        down.shape[-1] == 72
        and down.codes.sharding.shard_shape(down.codes.shape)[-1] == 6
    )
    # 12 columns each, and a block of the file ends within them after 8.
    assert down.scales.shape[-1] == 72 // 4


def test_fp4_columns_that_split_within_a_byte(tmp_path):
    config = wide_config(moe_intermediate_size=74)
    tensors = random_release(config, seed=1)
    directory = write_release(tmp_path, config, tensors)
    mesh = make_mesh(tensor=2)
    model = load_inner(directory, dtype="float32", mesh=mesh)
    assert_same_bits(model, dsv4.from_state_dict(config, meanings(tensors)))
    with pytest.raises(ValueError, match="experts.down would be split into 37 columns"):
        dsv4.from_pretrained(directory, mesh=mesh, keep_quantized=True)


FP8_NAME, FP4_NAME = "layers.0.attn.wo_b", "layers.0.ffn.experts.4.w2"
NO_NUMBERS = {
    "FP8 code": (f"{FP8_NAME}.weight", 0x7F, "a code that is NaN"),
    "FP8 negative code": (f"{FP8_NAME}.weight", 0xFF, "a code that is NaN"),
    "FP8 scale": (f"{FP8_NAME}.scale", NAN_SCALE, "a scale that is NaN"),
    "FP4 scale": (f"{FP4_NAME}.scale", NAN_SCALE, "a scale that is NaN"),
    "FP8 too large": (f"{FP8_NAME}.scale", 254, "beyond bfloat16"),
    "FP4 too large": (f"{FP4_NAME}.scale", 254, "beyond bfloat16"),
}


@pytest.mark.parametrize(
    "case", [c if c in ("FP8 code", "FP4 scale") else SLOW(c) for c in NO_NUMBERS]
)
def test_what_is_no_number_is_refused_by_name(case, tmp_path):
    name, value, message = NO_NUMBERS[case]
    config = wide_config()
    tensors = random_release(config)
    last = np.array(tensors[name])
    last.view(np.uint8)[-1, -1] = value
    directory = write_release(tmp_path, config, tensors | {name: last})
    named = name if "beyond" not in message else name.replace("scale", "weight")
    for keep in (False, True):
        if keep and "beyond" in message:
            continue  # the numbers are made later
        with pytest.raises(ValueError, match=f"{named} has .*{message}") as error:
            dsv4.from_pretrained(directory, keep_quantized=keep)
        assert str(tmp_path / "model.safetensors") in str(error.value)


def test_float32_scales_that_are_powers_of_two(wide, tmp_path):
    _, expected = wide
    config = wide_config()
    tensors = random_release(config)
    for name, value in tensors.items():
        if value.dtype == E8M0:
            tensors[name] = value.astype(np.float32)
    directory = write_release(tmp_path / "good", config, tensors)
    for keep in (False, True):
        model = dsv4.from_pretrained(directory, dtype="float32", keep_quantized=keep)
        assert_same_bits(unpack(model), expected)


def test_float32_scales_of_any_size_give_the_product_in_float32(tmp_path):
    """As amax / 448 gives them."""
    config = wide_config()
    tensors, generator = random_release(config), np.random.default_rng(0)
    expected = dict(meanings(tensors))
    for name, value in tensors.items():
        if value.dtype == E8M0:
            factor = generator.uniform(1, 2, value.shape).astype(np.float32)
            tensors[name] = value.astype(np.float32) * factor
    for name in expected:
        scales = tensors.get(scale_name(name))
        if scales is not None:
            expected[name] = product(tensors[name], scales)
    expected = dsv4.from_state_dict(config, expected)
    directory = write_release(tmp_path / "old", config, tensors)
    for sizes in ({}, dict(tensor=2, expert=3)):
        mesh = make_mesh(**sizes) if sizes else None
        for keep in (False, True):
            model = load_inner(
                directory, dtype="float32", mesh=mesh, keep_quantized=keep
            )
            assert is_quantized(model.layers[0].attention.query_down) == keep
            assert_same_bits(unpack(model), expected)
    assert model.layers[0].attention.query_down.scales.dtype == np.uint32
    packed = dsv4.from_pretrained(directory, dtype="float32", keep_quantized=True)
    dsv4.save_pretrained(packed, tmp_path / "new", official=True)
    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "scale_fmt" not in raw["quantization_config"]
    again = dsv4.from_pretrained(tmp_path / "new", dtype="float32", keep_quantized=True)
    assert_same_bits(again, packed)


def product(codes, scales):
    """In float32, of each code with the scale of its block."""
    ones = np.full(scales.shape, 127, np.uint8).view(E8M0)
    rows, columns = (128, 128) if codes.dtype == FP8 else (1, 32)
    scales = scales.repeat(rows, axis=-2).repeat(columns, axis=-1)
    values = meaning(codes, ones).astype(np.float32)
    return values * scales[..., : values.shape[-2], : values.shape[-1]]


def test_a_quantised_weight_whose_name_holds_weight_twice(tmp_path):
    """`attn.indexer.weights_proj.weight`, through load, save and load."""
    name = "layers.0.attn.indexer.weights_proj"
    config, generator = wide_config(), np.random.default_rng(3)
    tensors = random_release(config)
    shape = tensors[f"{name}.weight"].shape
    codes, scales = random_codes(generator, shape, False)
    tensors |= {f"{name}.weight": codes, f"{name}.scale": scales}
    directory = write_release(tmp_path / "old", config, tensors)
    expected = dsv4.from_state_dict(config, meanings(tensors))
    arrays = dsv4.from_pretrained(directory, dtype="float32")
    assert_same_bits(arrays, expected)
    packed = dsv4.from_pretrained(directory, dtype="float32", keep_quantized=True)
    assert is_quantized(packed.layers[0].attention.indexer.head_weights)
    dsv4.save_pretrained(packed, tmp_path / "new", official=True)
    again = dsv4.from_pretrained(tmp_path / "new", dtype="float32", keep_quantized=True)
    assert_same_bits(again, packed)
    assert_same_bits(unpack(again), expected)


@pytest.mark.parametrize("value", [-0.5, *map(SLOW, (0.0, np.inf, np.nan, 2.0**-130))])
def test_float32_scales_that_are_no_scales_are_refused(value, tmp_path):
    config = wide_config()
    tensors = random_release(config)
    scales = tensors[f"{FP8_NAME}.scale"].astype(np.float32)
    scales[-1, -1] = value
    tensors[f"{FP8_NAME}.scale"] = scales
    directory = write_release(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=f"{FP8_NAME}.scale has .*positive and fin"):
        dsv4.from_pretrained(directory)


@pytest.mark.parametrize("fp4", [False, SLOW(True)], ids=["FP8", "FP4"])
def test_hugging_faces_naming_of_quantised_weights(fp4, tmp_path):
    config = wide_config()
    tensors = random_release(config, seed=2, fp4=fp4, official=False)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    # In FP8 the first 128 rows are all of the gate's and 56 of the others.
    expected = (6, 144, 5) if fp4 else (6, 2, 2)
    assert tensors[f"{experts}_scale_inv"].shape == expected
    assert "model.layers.0.self_attn.q_a_proj.weight_scale_inv" in tensors
    directory = write_release(tmp_path, config, tensors)
    expected = dsv4.from_state_dict(config, meanings(tensors))
    for sizes in ({}, dict(tensor=2, expert=3)):
        mesh = make_mesh(**sizes) if sizes else None
        for keep in (False, True):
            model = load_inner(
                directory, dtype="float32", mesh=mesh, keep_quantized=keep
            )
            assert is_quantized(model.layers[0].moe.experts.gate_up) == keep
            assert_same_bits(unpack(model), expected)
