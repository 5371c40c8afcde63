"""save_pretrained: the same bits back, transformers, and what is refused."""

import functools
import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from transformers import GenerationConfig
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.save import convert
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from tests.checkpoint.saving import load_inner, one_layer, small_model
from tests.models import (
    T,
    forward_once,
    pair,
    random_model,
    random_tensors,
    random_tokens,
    small_config,
)
from tests.official import meanings, random_release, wide_config, write_release
from tests.reference import as_torch
from tests.sharded import assert_same_bits, make_mesh

LIMIT = 5e-5
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
FILE = "model.safetensors"


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(as_torch(tokens).long(), use_cache=False).logits.numpy()


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=LIMIT)


@pytest.mark.slow
def test_transformers_loads_what_is_saved(tmp_path):
    model = random_model(T)
    dsv4.save_pretrained(model, tmp_path / "model", most_file_bytes=300_000)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    reference, info = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "model",
        output_loading_info=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"] and not info.get("error_msgs"), info
    tokens = random_tokens(0)
    close(forward_once(model, tokens), logits_of(reference.eval(), tokens))


def names_in(directory):
    """Of the tensors, whatever the files."""
    raws = [path.read_bytes() for path in directory.glob("*.safetensors")]
    headers = [json.loads(r[8 : 8 + int.from_bytes(r[:8], "little")]) for r in raws]
    return set().union(*headers) - {"__metadata__"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:from_pretrained. the configuration has num_next")
@pytest.mark.parametrize("origin", ["made", "from HF's names", "from official names"])
def test_what_transformers_saves_is_loaded(origin, tmp_path):
    """It writes other names than it has, and than it loaded."""
    reference, expected = pair(0)
    if origin != "made":
        official = origin == "from official names"
        dsv4.save_pretrained(expected, tmp_path / "ours", official=official)
        reference = DeepseekV4ForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
        ).eval()
    reference.save_pretrained(tmp_path / "theirs")
    assert names_in(tmp_path / "theirs") != reference.state_dict().keys()
    model = dsv4.from_pretrained(tmp_path / "theirs")
    assert_same_bits(model, expected)
    tokens = random_tokens(1)
    close(forward_once(model, tokens), logits_of(reference, tokens))


MESHES = {
    "one": {},
    "data": dict(data=8),
    "tensor": dict(tensor=2, data=4),
    "expert": dict(expert=4, data=2),
    "both": dict(expert=2, tensor=2, data=2),
}


def eights_config():
    """Divides over every mesh."""
    return wide_config(
        vocab_size=100,
        n_routed_experts=8,
        layer_types=(CSA,),
        moe_intermediate_size=76,
    )


@functools.cache
def model_of(kind, directory):
    """On no mesh."""
    config = eights_config()
    if kind == "packed":
        path = directory / "release"
        write_release(path, config, random_release(config))
        return dsv4.from_pretrained(path, keep_quantized=True)
    return dsv4.from_state_dict(config, random_tensors(config), dtype=kind)


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(**sizes) if sizes else None


def over(name, model, kind, directory):
    """The model over one of the meshes."""
    mesh = mesh_of(name)
    if mesh is None:
        return model
    if kind == "packed":  # its blocks are as wide as the mesh lets them be
        path = directory / "release"
        return load_inner(path, mesh=mesh, keep_quantized=True)
    return place(model, dsv4.partition_specs(model, mesh=mesh), mesh)


@pytest.fixture(scope="module")
def shared_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


# Each mesh is saved from and loaded onto, packed and not.
CASES = [
    ("packed", "both", "expert"),
    SLOW("packed", "one", "both"),
    SLOW("packed", "data", "tensor"),
    SLOW("packed", "tensor", "data"),
    SLOW("packed", "expert", "one"),
    SLOW("float32", "one", "both"),
    SLOW("float32", "both", "one"),
    SLOW("float32", "tensor", "expert"),
    SLOW("bfloat16", "expert", "tensor"),
    SLOW("bfloat16", "data", "data"),
]


@pytest.mark.parametrize("kind, saved, loaded", CASES)
def test_any_mesh_to_any_mesh(kind, saved, loaded, shared_directory, tmp_path):
    plain = model_of(kind, shared_directory)
    model = over(saved, plain, kind, shared_directory)
    packed = kind == "packed"
    dsv4.save_pretrained(model, tmp_path / "model", official=packed)
    if packed:  # every file as it was, but for the order of the tensors
        again = dsv4.from_pretrained(tmp_path / "model", keep_quantized=True)
        assert_same_bits(again, plain)
    mesh = mesh_of(loaded)
    found = load_inner(tmp_path / "model", mesh=mesh, keep_quantized=packed)
    expected = over(loaded, plain, kind, shared_directory)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_same_bits(found, expected)
    if mesh is not None:
        specs = dsv4.partition_specs(found, mesh=mesh)
        specs = jax.tree.structure(found).flatten_up_to(specs)
        for leaf, spec in zip(jax.tree.leaves(found), specs, strict=True):
            promised = NamedSharding(mesh, spec)
            assert leaf.sharding.is_equivalent_to(promised, leaf.ndim)


@pytest.mark.slow
def test_a_packed_model_is_saved_as_arrays_under_hugging_faces_names(
    shared_directory, tmp_path
):
    packed = model_of("packed", shared_directory)
    dsv4.save_pretrained(packed, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    arrays = dsv4.from_pretrained(shared_directory / "release")
    assert_same_bits(dsv4.from_pretrained(tmp_path / "model"), arrays)


@pytest.mark.parametrize("fp4", [True, False], ids=["fp4", "fp8"])
def test_a_packed_model_is_saved_as_the_release_has_it(fp4, tmp_path):
    config = wide_config()
    tensors = random_release(config, fp4=fp4)
    write_release(tmp_path / "old", config, tensors)
    packed = dsv4.from_pretrained(tmp_path / "old", keep_quantized=True)
    dsv4.save_pretrained(packed, tmp_path / "new", official=True)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["expert_dtype"] == ("fp4" if fp4 else "fp8")
    assert written["quantization_config"]["weight_block_size"] == [128, 128]
    raw = (tmp_path / "new" / FILE).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header.keys() == tensors.keys()
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert tuple(entry["shape"]) == tensors[name].shape, name
        assert first % tensors[name].dtype.itemsize == 0
        assert raw[start + first : start + last] == tensors[name].tobytes(), name


@pytest.mark.parametrize("first", ["arrays", "fp8"])
def test_experts_of_every_layer_say_what_they_are(first, tmp_path):
    config = wide_config(
        num_hidden_layers=2,
        layer_types=(SLIDING, CSA),
        compress_ratios=(0, 4),
        mlp_layer_types=(HASH_MOE, TOPK_MOE),
    )
    tensors = random_release(config)
    other = random_release(config, fp4=False)
    other = other if first == "fp8" else meanings(other)
    experts = "layers.0.ffn.experts."
    tensors = {k: v for k, v in tensors.items() if not k.startswith(experts)}
    tensors |= {k: v for k, v in other.items() if k.startswith(experts)}
    write_release(tmp_path / "old", config, tensors)
    packed = dsv4.from_pretrained(tmp_path / "old", keep_quantized=True)
    save = functools.partial(dsv4.save_pretrained, packed, tmp_path / "new")
    if first == "fp8":
        with pytest.raises(ValueError, match="FP4 and others as FP8"):
            save(official=True)
    else:
        save(official=True)
        written = json.loads((tmp_path / "new" / "config.json").read_text())
        assert written["expert_dtype"] == "fp4"


@pytest.mark.parametrize("official", [False, SLOW(True)])
def test_several_files_and_one_have_the_same_tensors(official, tmp_path):
    model = random_model(one_layer(), seed=3)
    options = dict(official=official)
    dsv4.save_pretrained(model, tmp_path / "one", **options)
    dsv4.save_pretrained(model, tmp_path / "many", most_file_bytes=20_000, **options)
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", FILE]
    index = json.loads((tmp_path / "many" / f"{FILE}.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 9 and set(files) == set(index["weight_map"].values())
    for file in files:
        raw = (tmp_path / "many" / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        # A tensor that is larger has a file of its own.
        assert len(raw) - start <= 20_000 or raw[8:start].count(b"dtype") == 1
        assert start % 8 == 0
    for directory in ("one", "many"):
        assert_same_bits(dsv4.from_pretrained(tmp_path / directory), model)


def test_islands_stay_float32_in_a_bfloat16_checkpoint(tmp_path):
    tensors = random_tensors(one_layer())
    model = dsv4.from_state_dict(one_layer(), tensors, dtype=jnp.bfloat16)
    dsv4.save_pretrained(model, tmp_path / "model", official=True)
    raw = (tmp_path / "model" / FILE).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    dtypes = {
        name: entry["dtype"] for name, entry in header.items() if "dtype" in entry
    }
    for name in ("attn.attn_sink", "attn_norm.weight", "hc_attn_fn", "hc_ffn_base"):
        assert dtypes[f"layers.0.{name}"] == "F32"
    assert dtypes["layers.0.attn.wq_a.weight"] == dtypes["embed.weight"] == "BF16"
    assert dtypes["layers.0.ffn.gate.tid2eid"] == "I64"
    assert_same_bits(dsv4.from_pretrained(tmp_path / "model"), model)
    wide = dsv4.from_pretrained(tmp_path / "model", dtype=jnp.float32)
    np.testing.assert_array_equal(
        wide.layers[0].attention.sinks, tensors["layers.0.attn.attn_sink"]
    )


def refused(model, tmp_path, match, **options):
    """Nothing is written, not even a directory."""
    with pytest.raises(ValueError, match=match):
        dsv4.save_pretrained(model, tmp_path / "model", **options)
    assert os.listdir(tmp_path) == []


def test_wrapped_models_are_refused(tmp_path):
    config = one_layer(n_routed_experts=6)
    for sizes in (dict(expert=2), dict(tensor=3)):
        wrapped = parallelize(random_model(config), make_mesh(**sizes))
        refused(wrapped, tmp_path, "parts are not those .* without wrappers")


def test_what_must_be_float32_is_widened_where_all_was_cast(tmp_path):
    model = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x,
        small_model(),
    )
    dsv4.save_pretrained(model, tmp_path / "model")
    found = dsv4.from_pretrained(tmp_path / "model")
    assert found.embedding.dtype == jnp.bfloat16
    assert found.layers[0].attention.sinks.dtype == jnp.float32
    widen = functools.partial(jnp.asarray, dtype=jnp.float32)
    assert_same_bits(jax.tree.map(widen, found), jax.tree.map(widen, model))


def test_a_sharded_model_is_saved(tmp_path):
    model = small_model()
    sharded = dsv4.shard(model, make_mesh(data=2), fsdp=True)
    dsv4.save_pretrained(sharded, tmp_path / "model")
    assert_same_bits(dsv4.from_pretrained(tmp_path / "model"), model)


@pytest.mark.parametrize("ids", [(0, 1), (None, (1, 7)), (5, None)])
def test_transformers_reads_how_a_text_ends(ids, tmp_path):
    config = one_layer(bos_token_id=ids[0], eos_token_id=ids[1])
    dsv4.save_pretrained(random_model(config), tmp_path / "model")
    found = GenerationConfig.from_pretrained(tmp_path / "model")
    eos = list(ids[1]) if isinstance(ids[1], tuple) else ids[1]
    assert (found.bos_token_id, found.eos_token_id) == (ids[0], eos)


def test_a_file_on_generation_that_is_there_is_not_changed(tmp_path):
    config, name = one_layer(bos_token_id=0, eos_token_id=1), "generation_config.json"
    old, new, text = tmp_path / "old", tmp_path / "new", '{"temperature": 0.5}'
    dsv4.save_pretrained(random_model(config), old)
    (old / name).write_text(text)
    dsv4.save_pretrained(random_model(config), old, overwrite=True)
    assert (old / name).read_text() == text
    convert(old, new)
    assert (new / name).read_text() == text
    # From here, the tokenizer is what knows where the model came from.
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(old / "tokenizer.json"))
    tokenizer = dsv4.load_tokenizer(old)
    dsv4.save_pretrained(random_model(config), tmp_path / "third", tokenizer=tokenizer)
    assert (tmp_path / "third" / name).read_text() == text
    dsv4.save_pretrained(small_model(), tmp_path / "none")
    assert not (tmp_path / "none" / name).exists()


@pytest.mark.usefixtures("without_shape_checks")
def test_models_that_are_not_as_their_configuration_says_are_refused(tmp_path):
    model = small_model()
    changed = {
        "unembedding is float16": model.unembedding.astype(jnp.float16),
        r"unembedding is float32 of the shape \(96, 60\)": model.unembedding[:-1],
    }
    for match, value in changed.items():
        other = eqx.tree_at(lambda model: model.unembedding, model, value)
        refused(other, tmp_path, match)
    narrow = eqx.tree_at(
        lambda model: model.norm.weight, model, model.norm.weight.astype(jnp.bfloat16)
    )
    match = r"norm.weight is bfloat16 .* float32 .*cast\(model, .float32.\)"
    refused(narrow, tmp_path, match)
    other = eqx.tree_at(lambda model: model.layers.first, model, ())
    refused(other, tmp_path, "with all of its layers and blocks")
    refused({"embed.weight": 1}, tmp_path, "model=.*must be a DeepSeekV4")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_sizes_of_files_that_are_none_are_refused(size, tmp_path):
    refused(small_model(), tmp_path, "most_file_bytes=", most_file_bytes=size)


@pytest.mark.slow
def test_schedules_that_transformers_cannot_express_are_saved_officially(tmp_path):
    model = random_model(
        small_config(
            layer_types=(HCA, HCA, SLIDING),
            compress_ratios=(16, 8, 0),
            mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
        )
    )
    refused(model, tmp_path, "have the ratios 16 and 8, .* official names")
    dsv4.save_pretrained(model, tmp_path / "model", official=True)
    assert_same_bits(dsv4.from_pretrained(tmp_path / "model"), model)


@pytest.mark.slow
def test_unlike_scales_within_a_block_are_refused(tmp_path):
    write_release(tmp_path / "old", wide_config(), random_release(wide_config()))
    packed = dsv4.from_pretrained(tmp_path / "old", keep_quantized=True)

    def scales(model):
        return model.layers.first[0].attention.query_down.scales

    packed = eqx.tree_at(scales, packed, scales(packed).at[3, 0].add(1))
    with pytest.raises(ValueError, match="attn.wq_a.weight has different scales with"):
        dsv4.save_pretrained(packed, tmp_path / "new", official=True)
    assert os.listdir(tmp_path) == ["old"]
    dsv4.save_pretrained(packed, tmp_path / "new")
