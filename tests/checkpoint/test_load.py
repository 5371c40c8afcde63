"""from_pretrained: numbers, dtypes, placement over meshes, gradients, bytes read."""

import functools
import math
import os
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint import load
from dsv4_eqx.checkpoint.inventory import open_checkpoint
from dsv4_eqx.checkpoint.load import Loader
from dsv4_eqx.numerics.quantized_weight import dequantize, is_quantized
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from dsv4_eqx.sharding.shard import shard
from tests.checkpoint.saving import load_inner, one_layer, small_model
from tests.models import (
    quick_jit,
    random_model,
    random_tensors,
    relative,
    small_config,
)
from tests.official import (
    FP8,
    meanings,
    random_release,
    wide_config,
    write_release,
)
from tests.sharded import assert_same_bits, make_mesh

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"
LIMIT = 5e-5
quick_unpacked = quick_jit(dequantize)
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@quick_jit
def both_logits(model, tokens):
    return model.multi_token_logits(tokens)


@functools.cache
def expected():
    return load_file(NANO / "expected.safetensors")


def assert_as_released(logits, ahead):
    wanted = expected()
    np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=LIMIT)
    np.testing.assert_allclose(ahead, wanted["mtp_logits"], rtol=0, atol=LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_release_unpacked_is_what_it_is_kept_quantised(dtype):
    packed = dsv4.from_pretrained(NANO, dtype=dtype, keep_quantized=True)
    model = dsv4.from_pretrained(NANO, dtype=dtype)
    assert_same_bits(quick_unpacked(packed), model)


@pytest.mark.slow
def test_a_release_gives_the_official_codes_logits_quantised_or_not():
    model = dsv4.from_pretrained(NANO, dtype="float32")
    packed = dsv4.from_pretrained(NANO, dtype="float32", keep_quantized=True)
    assert is_quantized(packed.layers[4].moe.experts.down)
    assert is_quantized(packed.mtp[0].streams_in)
    tokens = expected()["tokens"]
    # As users compile it: with the quick options some processors round the same norm
    # differently from program to program.
    run = jax.jit(lambda model: model.multi_token_logits(tokens))
    outputs = run(model)
    assert_as_released(*outputs)
    assert_same_bits(run(packed), outputs)


@pytest.mark.slow
def test_a_quantised_release_over_a_mesh_gives_the_official_codes_logits():
    mesh = make_mesh(expert=2, tensor=2)
    model = load_inner(NANO, dtype="float32", mesh=mesh, keep_quantized=True)
    tokens = jax.device_put(expected()["tokens"], NamedSharding(mesh, P()))
    assert_as_released(*both_logits(model, tokens))


@pytest.mark.exhaustive
def test_quantised_blocks_under_shard_map_compute_the_same():
    mesh, rows = make_mesh(expert=2, tensor=2), P("expert")
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(2, 69, 4, 128)), jnp.float32)
    ids = jnp.asarray(generator.integers(0, 128, (2, 69)), jnp.int32)
    outputs = []
    for keep in (False, True):
        model = load_inner(NANO, dtype="float32", mesh=mesh, keep_quantized=keep)
        for block in (model.layers[0], model.layers[2]):
            block = parallelize(block, mesh)
            specs = dsv4.partition_specs(block, mesh=mesh)

            def call(block, x, ids):
                positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
                return block(x, ids, positions)

            run = jax.shard_map(
                call, mesh=mesh, in_specs=(specs, rows, rows), out_specs=rows
            )
            outputs.append(quick_jit(run)(place(block, specs, mesh), x, ids))
    for found, wanted in zip(outputs[2:], outputs[:2]):
        assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [None, SLOW("float16")])
def test_the_dtype_is_the_embeddings_and_islands_stay_float32(dtype):
    model = dsv4.from_pretrained(NANO, dtype=dtype)
    block = model.layers[4]
    weights = (
        model.embedding,
        model.unembedding,
        model.mtp[0].streams_in,
        block.attention.query_up,
        block.attention.indexer.head_weights,
        block.moe.router.weight,
        block.moe.experts.down,
    )
    assert {str(x.dtype) for x in weights} == {dtype or "bfloat16"}
    islands = (
        block.attention.sinks,
        block.attention.compressor.position_bias,
        block.attention_norm.weight,
        block.moe.router.bias,
        block.moe_connection.weight,
        model.head.base,
        model.mtp[0].norm.weight,
    )
    assert {str(x.dtype) for x in islands} == {"float32"}
    assert model.layers[0].moe.router.table.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [SLOW("float32"), "float16"])
def test_the_default_dtype_is_read_from_the_file(dtype, tmp_path):
    config = one_layer()
    tensors = random_tensors(config)
    tensors["embed.weight"] = tensors["embed.weight"].astype(dtype)
    model = dsv4.from_pretrained(write_release(tmp_path, config, tensors))
    assert model.embedding.dtype == dtype
    assert_same_bits(model, dsv4.from_state_dict(config, tensors))


@pytest.mark.slow
def test_the_base_form_with_experts_in_fp8(tmp_path):
    config = small_config()
    tensors = random_release(config, fp4=False)
    assert tensors["layers.2.ffn.experts.6.w2.weight"].dtype == FP8
    directory = write_release(tmp_path, config, tensors)
    wanted = dsv4.from_state_dict(config, meanings(tensors), dtype="bfloat16")
    assert_same_bits(dsv4.from_pretrained(directory), wanted)
    packed = dsv4.from_pretrained(directory, keep_quantized=True)
    assert packed.layers[2].moe.experts.down.code_dtype == FP8
    assert packed.layers[2].moe.experts.down.shape == (7, 60, 28)
    assert_same_bits(quick_unpacked(packed), wanted)


@pytest.mark.slow
def test_gradients_pass_through_quantised_weights(wide_directory):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(1, 29, 4, 150)), jnp.float32)
    cotangent = jnp.asarray(generator.normal(size=x.shape), jnp.float32)
    positions = jnp.arange(29)[None]

    def loss(block_and_x):
        block, x = block_and_x
        return jnp.sum(block(x, positions, positions) * cotangent)

    gradients = []
    for keep in (True, False):
        model = dsv4.from_pretrained(
            wide_directory, dtype="float32", keep_quantized=keep
        )
        blocks, static = eqx.partition((model.layers[0], x), eqx.is_inexact_array)

        def of_floats(floats, rest=static):
            return eqx.filter_grad(loss)(eqx.combine(floats, rest))

        gradients.append(quick_jit(of_floats)(blocks))
    packed, arrays = gradients
    wanted = dict(jax.tree_util.tree_leaves_with_path(arrays))
    found = dict(jax.tree_util.tree_leaves_with_path(packed))
    quantised = wanted.keys() - found.keys()
    assert len(quantised) == 10 and found.keys() < wanted.keys()
    for path, gradient in found.items():
        name = jax.tree_util.keystr(path)
        assert np.any(gradient) or "indexer" in name or "bias" in name, name
        assert relative(gradient, wanted[path]) <= 1e-5, name


@pytest.fixture(scope="module")
def wide_directory(tmp_path_factory):
    config = wide_config()
    directory = tmp_path_factory.mktemp("wide")
    return write_release(directory, config, random_release(config))


@pytest.mark.parametrize(
    "sizes", [dict(tensor=2, expert=3), SLOW(dict(data=2, tensor=3))], ids=str
)
def test_every_leaf_is_where_the_specs_say(sizes, wide_directory):
    mesh = make_mesh(**sizes)
    plain = dsv4.from_pretrained(wide_directory)
    arrays, packed = (
        load_inner(wide_directory, mesh=mesh, keep_quantized=keep)
        for keep in (False, True)
    )
    assert_same_bits(arrays, plain)
    # The blocks are as wide as the mesh lets them be.
    assert_same_bits(quick_unpacked(packed), plain)
    specs = dsv4.partition_specs(arrays, mesh=mesh)
    specs = jax.tree.structure(arrays).flatten_up_to(specs)
    assert {e for spec in specs for e in spec} == {None} | sizes.keys() - {"data"}
    kept = jax.tree.leaves(packed, is_leaf=is_quantized)
    for leaf, array, spec in zip(kept, jax.tree.leaves(arrays), specs, strict=True):
        assert leaf.shape == array.shape and leaf.dtype == array.dtype
        for part in (array, *jax.tree.leaves(leaf)):
            promised = NamedSharding(mesh, spec)
            assert part.sharding.is_equivalent_to(promised, part.ndim)
            assert part.committed


@pytest.mark.parametrize("split_vocab", [True, SLOW(False)])
def test_over_a_mesh_it_is_what_shard_makes_of_it(split_vocab, wide_directory):
    mesh = make_mesh(data=2, tensor=2, expert=2)
    load = functools.partial(dsv4.from_pretrained, wide_directory, dtype="float32")
    plain = load()
    wanted = shard(plain, mesh, split_vocab=split_vocab, fsdp=True)
    found, packed = (
        load(mesh=mesh, split_vocab=split_vocab, fsdp=True, keep_quantized=keep)
        for keep in (False, True)
    )
    assert isinstance(found, dsv4.ShardedModel) and found.fsdp
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert_same_bits(found, wanted)
    for model in (found, packed):
        specs = jax.tree.structure(model.model).flatten_up_to(model.specs)
        for leaf, spec in zip(jax.tree.leaves(model), specs, strict=True):
            promised = NamedSharding(mesh, spec)
            assert leaf.sharding.is_equivalent_to(promised, leaf.ndim)
    assert_same_bits(quick_unpacked(packed.model), plain)
    if split_vocab:
        tokens = np.arange(44, dtype=np.int32).reshape(4, 11)
        run = quick_jit(lambda model, tokens: model(tokens))
        logits = run(packed, tokens), run(plain, tokens)
        np.testing.assert_allclose(*logits, rtol=0, atol=LIMIT)


def test_fsdp_is_for_a_mesh(wide_directory):
    with pytest.raises(ValueError, match=r"fsdp=True\): must be False without a mesh"):
        dsv4.from_pretrained(wide_directory, fsdp=True)


def test_without_a_mesh_everything_is_on_the_default_device(wide_directory):
    model = dsv4.from_pretrained(wide_directory, keep_quantized=True)
    devices = [leaf.devices() for leaf in jax.tree.leaves(model)]
    assert set().union(*devices) == {jax.devices()[0]}


class CountedBytes:
    """Bytes that were read."""

    def __init__(self, monkeypatch):
        self.num_bytes = 0
        monkeypatch.setattr(os, "preadv", functools.partial(self.read, os.preadv))

    def read(self, preadv, *arguments):
        count = preadv(*arguments)
        self.num_bytes += count
        return count


def held_bytes(model):
    """Of each shard once, however many devices hold it."""
    total = 0
    for leaf in jax.tree.leaves(model):
        shards = {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
        total += sum(shards.values())
    return total


@pytest.fixture
def plain_directory(tmp_path):
    config = one_layer(vocab_size=99, n_routed_experts=12, moe_intermediate_size=27)
    return write_release(tmp_path / "plain", config, random_tensors(config))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, dict(tensor=3, expert=2), dict(data=8)], ids=str)
def test_no_more_is_read_than_the_devices_hold(sizes, plain_directory, monkeypatch):
    counted = CountedBytes(monkeypatch)
    for directory, keep in ((plain_directory, False), (NANO, True)):
        if directory == NANO and "tensor" in sizes:
            sizes = dict(tensor=2, expert=3)
        counted.num_bytes = 0
        model = dsv4.from_pretrained(
            directory, mesh=make_mesh(**sizes), keep_quantized=keep
        )
        # A table's entries are twice as wide in the file.
        leaves = jax.tree.leaves(model)
        tables = [leaf for leaf in leaves if leaf.dtype == jnp.int32]
        held = held_bytes(leaves) + held_bytes(tables)
        assert counted.num_bytes <= 1.05 * held


def test_half_of_the_devices_take_half_of_the_reading(plain_directory, monkeypatch):
    """What one of two processes does, which has half of the mesh's devices."""
    counted = CountedBytes(monkeypatch)
    checkpoint = open_checkpoint("test", plain_directory, None)
    mesh = make_mesh(expert=2, tensor=3)
    specs = dsv4.partition_specs(checkpoint.model, mesh=mesh)
    specs = jax.tree.structure(checkpoint.model).flatten_up_to(specs)
    own = set(mesh.devices.reshape(2, 3)[0])
    held = whole = 0
    with Loader(checkpoint, keep_quantized=False) as loader:
        for (source, leaf), spec in zip(checkpoint.wanted, specs, strict=True):
            shape, width = leaf.shape, leaf.dtype.itemsize
            width = 8 if leaf.dtype == jnp.int32 else width  # in the file
            indices = NamedSharding(mesh, spec).devices_indices_map(shape)
            bounds = {
                tuple(s.indices(n)[:2] for s, n in zip(index, shape))
                for device, index in indices.items()
                if device in own
            }
            for parts in bounds:
                region = tuple(slice(*part) for part in parts)
                loader.read_region(source, np.dtype(leaf.dtype), region)
                held += math.prod(s.stop - s.start for s in region) * width
            whole += leaf.size * width
    assert counted.num_bytes <= 1.05 * held
    assert held < 0.75 * whole  # the experts are split, the rest is not


@pytest.mark.parametrize("expert", [-1, 7, 2**33 + 5])
@pytest.mark.parametrize("tensor", [1, 3])
def test_tables_naming_no_expert_are_refused_by_row(expert, tensor, tmp_path):
    config = one_layer(vocab_size=99, moe_intermediate_size=27)
    tensors = random_tensors(config)
    tensors["layers.0.ffn.gate.tid2eid"][70, 1] = expert
    directory = write_release(tmp_path, config, tensors)
    message = rf"layers.0.ffn.gate.tid2eid names the expert {expert} at \[70, 1\]"
    with pytest.raises(ValueError, match=message):
        dsv4.from_pretrained(directory, mesh=make_mesh(tensor=tensor))


def test_numbers_that_would_become_infinite_are_refused_by_name(tmp_path):
    config = one_layer()
    tensors = random_tensors(config)
    tensors["layers.0.attn.wkv.weight"][3, 5] = 7e4
    directory = write_release(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="layers.0.attn.wkv.weight has 70000.0 at"):
        dsv4.from_pretrained(directory, dtype="float16")
    wide = dsv4.from_pretrained(directory, dtype=ml_dtypes.bfloat16)
    assert wide.layers[0].attention.key_value[3, 5] == 70144


@pytest.mark.parametrize("sizes", [{}, dict(vocab_size=50)], ids=["alike", "smaller"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    sizes, tmp_path, monkeypatch
):
    """Where both are alike, half of one and half of the other would be a model."""
    target, read = tmp_path / "model", load.Loader.load
    dsv4.save_pretrained(small_model(), target)
    new = random_model(one_layer(**sizes), seed=5)

    def replaced_meanwhile(self, source, *args):
        if source.path.endswith("norm.weight"):
            monkeypatch.undo()
            dsv4.save_pretrained(new, target, overwrite=True)
        return read(self, source, *args)

    monkeypatch.setattr(load.Loader, "load", replaced_meanwhile)
    with pytest.raises(ValueError, match="model was replaced while it was read"):
        dsv4.from_pretrained(target)
    assert_same_bits(dsv4.from_pretrained(target), new)
