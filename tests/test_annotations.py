"""Every field of every module against its annotation.

A hand-written `__init__` is not checked when a module is made, so it is done here, on
real models of odd sizes.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx import (
    AttentionValues,
    BalanceParts,
    Drafts,
    DSparkConfig,
    DSparkContext,
    IndexerDivergence,
    IndexerParts,
    IndexerValues,
    LayerValues,
    NextTokenParts,
    Routing,
)
from dsv4_eqx.attention.cache import AttentionCache, CompressorState, Extended
from dsv4_eqx.generation.prompt import Caches
from dsv4_eqx.generation.result import Generated
from dsv4_eqx.generation.sampling import Sampling
from dsv4_eqx.generation.steps import Chosen, Draft, Rows, Rules, State
from dsv4_eqx.kernels.entries import LAYERS, Entries
from dsv4_eqx.model.abstract import Cache, Lookahead
from dsv4_eqx.model.mtp import MTPCache
from dsv4_eqx.numerics.lora_weight import LoRAWeight
from dsv4_eqx.numerics.quantize import FakeQuantizedWeight
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight
from dsv4_eqx.numerics.slice import Slice
from dsv4_eqx.sharding.context import SplitSequence, SplitSequenceAndHeads
from dsv4_eqx.sharding.expert import ExpertParallel
from dsv4_eqx.sharding.fsdp import Gathered
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.tensor import SplitEmbedding, SummedOver, WithAllTokens
from dsv4_eqx.training.qat import FP4Rotation, FP8Norm
from tests.models import QUICKLY, T, random_tensors

# Sizes that belong to activations; modules that hold weights do not have them.
OF_ACTIVATIONS = {
    Entries: {"batch", "entries"},
    CompressorState: {"batch", "*repeats", "pending", "entries"},
    AttentionCache: {"batch", "*repeats", "keys"},
    Cache: {"batch"},
    Generated: {"batch", "new"},
    Chosen: {"batch", "new"},
    Draft: {"batch"},
    Rows: {"batch", "room"},
    Rules: {"ids"},
    Lookahead: {"batch"},
    Routing: {"*tokens"},
    IndexerValues: {"batch", "seq", "selected"},
    IndexerDivergence: {"batch", "seq"},
    AttentionValues: {"batch", "seq"},
    LayerValues: {"batch", "seq"},
    BalanceParts: {"layers"},
    IndexerParts: {"layers"},
    MTPCache: {"batch"},
    DSparkContext: {"batch", "stages", "window"},
    Drafts: {"batch", "places"},
}
# What it stands for decides.
OF_THE_FIELD_THAT_HOLDS_IT = {
    cls: {"..."} for cls in (QuantizedWeight, FakeQuantizedWeight, LoRAWeight, Slice)
}
# What wrappers hold, by the name of the field.
WRAPPED = {
    ExpertParallel: "experts",
    SummedOver: "module",
    WithAllTokens: "module",
    SplitSequence: "attention",
    SplitSequenceAndHeads: "attention",
    Gathered: "module",
}
NAMES_OF_OTHERS = OF_ACTIVATIONS | OF_THE_FIELD_THAT_HOLDS_IT
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


tensors = functools.cache(lambda: random_tensors(T))


@functools.cache
def model(dtype=jnp.float32):
    return dsv4.from_state_dict(T, tensors(), dtype=dtype)


@functools.cache
def parallel_model():
    return parallelize(model(), dsv4.make_mesh(expert=2, tensor=4))


def of_a_mesh():
    """What stands in for model, block and embedding where sequences are split."""
    mesh = dsv4.make_mesh(context=4, tensor=2)
    block = model().layers.first[0]
    return (
        dsv4.shard(model(), dsv4.make_mesh(devices=jax.devices()[:1])),
        Gathered(parallelize(block, mesh, ("context", "tensor")), "data", ()),
        parallelize(block, mesh, ("context",)),
        SplitEmbedding(model().embedding, "tensor", ("context", "tensor")),
    )


def packed():
    """Twelve columns in FP8, four to a scale."""
    codes, scales = np.zeros((3, 5, 12), np.uint8), np.zeros((3, 5, 3), np.uint8)
    return QuantizedWeight(
        jnp.array(codes), jnp.array(scales), FP8, np.dtype("float32")
    )


def in_training():
    """What stands for weights and parts of attention while a model is trained."""
    attention = model().layers[2].attention
    lora = LoRAWeight(packed(), jnp.ones((3, 2, 12)), jnp.ones((3, 5, 2)), 1.0, 1, 1)
    fake = FakeQuantizedWeight(attention.query_down, FP8, (22, 60), 1, 1)
    norm = FP8Norm(attention.key_value_norm, 8)
    return lora, fake, norm, FP4Rotation(attention.rope)


@functools.cache
def entries():
    compressor = model().layers[2].attention.compressor
    run = jax.jit(lambda compressor, x: compressor(x), compiler_options=QUICKLY)
    return run(compressor, np.ones((2, 9, T.hidden_size), np.float32))


def shown():
    scores, ids = jnp.zeros((3, 5, 2)), jnp.zeros((3, 5, 2), jnp.int32)
    routing = Routing(ids, scores, jnp.zeros((3, 5, 7)))
    divergence = IndexerDivergence(scores[..., 0], scores[..., 0], ids[..., 0])
    indexer = IndexerValues(ids, scores)
    attention = AttentionValues(scores, indexer, divergence)
    return LayerValues(jnp.zeros((3, 5, 4, T.hidden_size)), attention, routing)


def parts():
    """What losses consist of."""
    one, count, layers = jnp.zeros(()), jnp.int32(3), jnp.zeros(4)
    nats = NextTokenParts(one, count, one, count)
    without = NextTokenParts(one, count, None, None)
    indexers = IndexerParts(layers, layers, layers)
    return nats, without, BalanceParts(layers, layers), indexers


def drafter():
    """A drafter, its state and its drafts."""
    sizes = DSparkConfig(
        block_size=3, noise_token_id=1, target_layer_ids=(0, 2, 4), markov_rank=5
    )
    found = dsv4.DSpark(T, sizes, key=jax.random.key(0))
    ids, logits = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, T.vocab_size))
    return found, found.init_context(2), Drafts(ids, logits, logits[..., 0])


def trees():
    """Everything that is walked."""
    cache = model().init_cache(3, 50)
    ids, numbers = jnp.zeros((3, 5), jnp.int32), jnp.zeros((3, 5))
    one = ids[:, 0]
    mtp = model().mtp[0].init_cache(3, 50, jnp.float32)
    generated = Generated(ids, one, numbers, cache, mtp, one, one, ("a", "b", "c"))
    draft = Draft(mtp, one, jnp.zeros((3, T.vocab_size)))
    lookahead = Lookahead(one, one, Extended(cache.layers, 2), cache.capacity)
    rows = Rows(ids, numbers, one, one, one == 1, one, one)
    state = State(cache, rows, draft, jax.random.key(0))
    streams = jnp.zeros((3, 5, 4, T.hidden_size))
    chosen = Chosen(ids, numbers, one, one == 1, streams, one, one)
    caches, rules = Caches(cache, mtp), Rules(Sampling(), one, jnp.int32(5), None)
    stacks = (
        Slice(model().layers.repeated[0].moe.experts.down, jnp.int32(1)),
        Slice(jnp.zeros((2, 3, 5, 4)), jnp.int32(1), LAYERS),
    )
    return [
        model(),
        model(jnp.bfloat16),
        parallel_model(),
        entries(),
        (packed(), *in_training()),
        (generated, state, chosen, rules, lookahead, caches, stacks, shown(), parts()),
        of_a_mesh(),
        drafter(),
    ]


def module_classes():
    """All module classes that the package defines."""
    found = set()
    for info in pkgutil.walk_packages(dsv4.__path__, "dsv4_eqx."):
        module = importlib.import_module(info.name)
        for _, value in inspect.getmembers(module, inspect.isclass):
            is_module = issubclass(value, eqx.Module) and not inspect.isabstract(value)
            if is_module and value.__module__ == info.name:
                found.add(value)
    return found


@functools.partial(jax.jit, compiler_options=QUICKLY)
def unstacked(layers):
    return [layers[layer] for layer in range(len(layers))]


def walk(node):
    """Every module in a tree; stacked layers one by one."""
    if isinstance(node, eqx.Module):
        yield node
    if isinstance(node, dsv4.Layers):
        children = unstacked(node)
    elif isinstance(node, eqx.Module):
        children = [getattr(node, field.name) for field in dataclasses.fields(node)]
    else:
        children = node if isinstance(node, tuple) else ()
    for child in children:
        yield from walk(child)


def matches(value, annotation):
    """`isinstance` for the annotations that modules have."""
    if annotation is typing.Any:
        return True
    # Wrappers stand in for what they wrap.
    while type(value) in WRAPPED:
        value = getattr(value, WRAPPED[type(value)])
    if isinstance(annotation, types.UnionType):
        return any(matches(value, option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        (inner, _) = typing.get_args(annotation)
        return isinstance(value, tuple) and all(matches(x, inner) for x in value)
    return isinstance(value, annotation)


def faults(module):
    """Fields whose value is not what the annotation says.

    One context for all of them: a name has one size in one module.
    """
    with jaxtyping.jaxtyped("context"):
        return [
            field.name
            for field in dataclasses.fields(module)
            if not matches(getattr(module, field.name), field.type)
        ]


def array_fields(cls):
    """Names and dimension strings of a class's fields that may hold an array."""
    for field in dataclasses.fields(cls):
        options = [field.type, *typing.get_args(field.type)]
        strings = [getattr(option, "dim_str", None) for option in options]
        strings = [string for string in strings if string is not None]
        if strings:
            yield field.name, strings


def test_the_models_have_an_instance_of_every_module_class():
    assert len(module_classes()) >= 20
    walked = {type(module) for tree in trees() for module in walk(tree)}
    assert {cls.__name__ for cls in module_classes() - walked} == set()


@pytest.mark.parametrize("index", range(8))
def test_every_field_is_what_its_annotation_says(index):
    tree = trees()[index]
    for module in walk(tree):
        assert faults(module) == [], type(module).__name__


def test_annotations_hold_for_the_parts_on_each_device():
    config, mesh = dsv4.Config.tiny(), dsv4.make_mesh(expert=2, tensor=4)
    make = functools.partial(dsv4.Block, config, 2)
    block = parallelize(eqx.filter_eval_shape(make, key=jax.random.key(0)), mesh)
    seen = []

    def local(block):
        for module in walk(block):
            assert faults(module) == [], type(module).__name__
            seen.append(module)
        return jnp.zeros(())

    specs = dsv4.partition_specs(block, mesh=mesh)
    over_mesh = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())
    jax.eval_shape(over_mesh, block)
    experts = [module for module in seen if isinstance(module, dsv4.Experts)]
    assert experts[0].gate_up.shape == (8, 2, 12, 64)  # 16 and 48, a half and a quarter


@pytest.mark.parametrize("cls", sorted(module_classes(), key=lambda cls: cls.__name__))
def test_names_of_dimensions_are_in_the_glossary(cls):
    known = dsv4.DIMENSIONS.keys() | NAMES_OF_OTHERS.get(cls, set())
    for name, strings in array_fields(cls):
        assert len(strings) == 1, name
        for dimension in strings[0].split():
            assert dimension in known or dimension.isdigit(), f"{name}: {dimension}"


def test_every_name_in_the_glossary_is_of_some_field():
    used = {
        dimension
        for cls in module_classes()
        for _, strings in array_fields(cls)
        for dimension in strings[0].split()
    }
    used |= set(in_training()[0].dims_of("a", ("experts", "dim", "dim")))
    assert dsv4.DIMENSIONS.keys() - used == set()


def test_every_array_is_in_a_field_with_a_shape():
    for tree in trees():
        for module in walk(tree):
            annotated = dict(array_fields(type(module)))
            for field in dataclasses.fields(module):
                value = getattr(module, field.name)
                if eqx.is_array(value):
                    assert field.name in annotated, field.name


def test_other_fields_are_static_and_hashable():
    static = 0
    for module in walk(parallel_model()):
        for field in dataclasses.fields(module):
            value = getattr(module, field.name)
            if field.metadata.get("static", False):
                hash(value)
                static += 1
            else:
                leaves = jax.tree.leaves(value)
                assert all(eqx.is_array(leaf) for leaf in leaves), field.name
    assert static > 50


def test_classes_are_final():
    for cls in module_classes():
        bases = [base for base in cls.__mro__[1:] if base.__module__[:8] == "dsv4_eqx"]
        assert all(base.__name__.startswith("Abstract") for base in bases), cls


# The check itself.


def replaced(module, name, value):
    return eqx.tree_at(lambda module: getattr(module, name), module, value)


def test_another_shape_is_found():
    attention = model().layers[2].attention
    turned = jnp.swapaxes(attention.query_up, 0, 1)
    # Every dimension is there; the sinks have another number of heads.
    assert "sinks" in faults(replaced(attention, "query_up", turned))
    assert faults(replaced(attention, "query_down", attention.query_down.T))
    stacked = jnp.stack([attention.sinks] * 2)
    assert faults(replaced(attention, "sinks", stacked)) == ["sinks"]
    scale = model().head.scale
    assert faults(replaced(model().head, "scale", jnp.repeat(scale, 2))) == ["scale"]


def test_another_dtype_is_found():
    attention = model(jnp.bfloat16).layers[2].attention
    assert attention.query_up.dtype == jnp.bfloat16 and faults(attention) == []
    low = attention.sinks.astype(jnp.bfloat16)
    assert faults(replaced(attention, "sinks", low)) == ["sinks"]
    whole = attention.query_up.astype(jnp.int32)
    assert faults(replaced(attention, "query_up", whole)) == ["query_up"]


def test_another_module_is_found():
    layer = model().layers[0]
    assert faults(replaced(layer, "moe", layer.attention)) == ["moe"]
    assert faults(replaced(layer, "moe_norm", None)) == ["moe_norm"]
    split = SummedOver(layer.attention, "tensor")
    assert faults(replaced(layer, "attention", split)) == []
    assert faults(replaced(layer, "moe", split)) == ["moe"]
    assert faults(replaced(model(), "mtp", (layer,))) == ["mtp"]
