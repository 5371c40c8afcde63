"""Blocks over a mesh against themselves on one device, and where wrappers go."""

import functools

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import HASH_MOE
from dsv4_eqx.model.parts import make_experts, make_moe, make_shared_expert
from dsv4_eqx.sharding.expert import ExpertParallel
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from dsv4_eqx.sharding.tensor import SummedOver
from tests.sharded import (
    BATCH,
    CONFIG,
    SEQ,
    Case,
    Parallel,
    assert_equal_gradients,
    assert_same_bits,
    make_mesh,
    normal,
    random_module,
    random_token_ids,
    run_plain,
)
from tests.tiers import tiers


@functools.cache
def block_case(layer):
    shape = (BATCH, SEQ, CONFIG.hc_mult, CONFIG.hidden_size)
    block = random_module(dsv4.Block, layer)
    return Case(block, normal(shape, 1), random_token_ids(), normal(shape, 2))


expected_of_block = functools.cache(lambda layer: run_plain(block_case(layer)))


# The example runs layer 2 on it; whole models have every axis alone.
QUICK = [(0, dict(data=2, expert=2, tensor=2))]
MORE = [
    *((2, sizes) for sizes in (dict(tensor=8), dict(expert=8))),
    *((layer, QUICK[0][1]) for layer in (1, 2)),
    *((2, sizes) for sizes in (dict(data=8), dict(tensor=2), dict(expert=4))),
]
BLOCKS = tiers([*QUICK, *MORE], quick=QUICK)


def name_of(value):
    if isinstance(value, dict):
        return "-".join(f"{axis}{size}" for axis, size in value.items())
    return f"layer{value}"


@pytest.mark.parametrize("layer, sizes", BLOCKS, ids=name_of)
def test_a_block_over_a_mesh_equals_the_block(layer, sizes):
    case, mesh = block_case(layer), make_mesh(**sizes)
    program = Parallel(case, mesh)
    out, *grads = program(case)
    expected_out, *expected_grads = expected_of_block(layer)
    np.testing.assert_allclose(out, expected_out, 2e-5, 2e-5)
    assert_equal_gradients(grads, expected_grads, 1e-4)
    assert_same_bits(program(case), (out, *grads))
    # The batch's axes add up gradients, `tensor` parts of sums; experts add exchanges.
    # Axes of one device put nothing into the program.
    batch_axes = tuple(axis for axis in ("data", "expert") if axis in sizes)
    wanted = {("all-reduce", batch_axes)} if batch_axes else set()
    if "tensor" in sizes:
        wanted.add(("all-reduce", ("tensor",)))
    if "expert" in sizes:
        wanted |= {("all-to-all", ("expert",)), ("all-gather", ("expert",))}
    if "data" in sizes and "expert" in sizes:
        wanted.add(("all-reduce", ("data",)))  # gradients of experts
    assert program.sent() == wanted


@pytest.mark.slow
def test_a_block_on_one_device_sends_nothing_and_keeps_every_bit():
    case = block_case(0)
    program = Parallel(case, make_mesh(data=1))
    assert program.sent() == set()
    assert_same_bits(program(case), expected_of_block(0))


def abstract(make, *args):
    return eqx.filter_eval_shape(make, CONFIG, *args, key=jax.random.key(0))


def test_wrappers_are_put_where_a_mesh_needs_them():
    block = abstract(dsv4.Block, 2)
    assert parallelize(block, make_mesh(data=8)) == block
    split = parallelize(block, make_mesh(tensor=8))
    assert isinstance(split.attention, SummedOver) and isinstance(split.moe, SummedOver)
    assert isinstance(split.moe.module.experts, dsv4.Experts)
    split = parallelize(block, make_mesh(expert=8))
    assert isinstance(split.attention, dsv4.Attention)
    assert isinstance(split.moe, dsv4.MoE)
    assert isinstance(split.moe.experts, ExpertParallel)
    both = parallelize(block, make_mesh(expert=2, tensor=4))
    assert isinstance(both.moe, SummedOver)
    assert isinstance(both.moe.module.experts, ExpertParallel)
    assert both.moe.module.experts.experts == block.moe.experts


def test_wrappers_add_no_array_to_the_whole_model():
    model, mesh = abstract(dsv4.DeepSeekV4), make_mesh(expert=2, tensor=4)
    parallel = parallelize(model, mesh)
    assert jax.tree.leaves(parallel) == jax.tree.leaves(model)
    blocks = [*parallel.layers.first, *parallel.layers.repeated, *parallel.layers.last]
    for block in [*blocks, parallel.mtp[0].block]:
        assert isinstance(block.attention, SummedOver)
        assert isinstance(block.moe.module.experts, ExpertParallel)
    specs = dsv4.partition_specs(parallel, mesh=mesh)
    plain = dsv4.partition_specs(model, mesh=mesh)
    assert jax.tree.leaves(specs) == jax.tree.leaves(plain)


@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(expert=2)])
def test_wrapping_twice_is_refused(sizes):
    mesh = make_mesh(**sizes)
    parallel = parallelize(abstract(dsv4.Block, 0), mesh)
    with pytest.raises(ValueError, match="went through it before"):
        parallelize(parallel, mesh)


@pytest.mark.parametrize("make", [make_experts, make_shared_expert])
def test_experts_on_their_own_are_summed_and_exchange(make):
    expert = abstract(make)
    assert isinstance(parallelize([expert], make_mesh(tensor=8))[0], SummedOver)
    both = parallelize(expert, make_mesh(expert=2, tensor=4))
    inner = ExpertParallel if make is make_experts else dsv4.SharedExpert
    assert isinstance(both, SummedOver) and isinstance(both.module, inner)
    assert jax.tree.leaves(both) == jax.tree.leaves(expert)


def test_a_shared_expert_on_its_own_equals_itself_over_a_mesh():
    shared, mesh = random_module(make_shared_expert), make_mesh(tensor=4)
    parallel = parallelize(shared, mesh)
    specs = dsv4.partition_specs(parallel, mesh=mesh)
    x = normal((5, CONFIG.hidden_size), 1)
    run = jax.shard_map(
        lambda shared, x: shared(x), mesh=mesh, in_specs=(specs, P()), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(run)(parallel, x), shared(x), 1e-5, 1e-5)


@pytest.mark.parametrize(
    "axes, text",
    [
        (("data", "model"), r"\('data', 'model'\) and needs .*make_mesh"),
        (("context",), r"\('context',\) and needs"),
        (("data", "expert", "tensor", "context"), "and needs .*'context', 'tensor'"),
    ],
)
def test_a_mesh_without_the_axes_or_in_another_order_is_refused(axes, text):
    sizes = (1,) * (len(axes) - 1) + (2,)
    mesh = jax.make_mesh(sizes, axes, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=text):
        parallelize(abstract(dsv4.Block, 0), mesh)


@pytest.mark.parametrize(
    "sequence", [("tensor", "context"), ("data",), "context", ("context", "context")]
)
def test_axes_that_split_no_sequence_are_refused(sequence, without_shape_checks):
    mesh = make_mesh(data=2, context=2, tensor=2)
    with pytest.raises(ValueError, match=r"parallelize\(sequence=.*in this order"):
        parallelize(abstract(dsv4.Block, 0), mesh, sequence)


def test_split_experts_without_their_wrapper_are_refused():
    moe, mesh = abstract(make_moe, HASH_MOE), make_mesh(expert=2)
    specs = dsv4.partition_specs(moe, mesh=mesh)
    x = jax.ShapeDtypeStruct((2, 3, CONFIG.hidden_size), np.float32)
    ids = jax.ShapeDtypeStruct((2, 3), np.int32)
    run = jax.shard_map(
        lambda moe, x, ids: moe(x, ids),
        mesh=mesh,
        in_specs=(specs, P("expert"), P("expert")),
        out_specs=P("expert"),
    )
    with pytest.raises(ValueError, match=r"8 experts and its router 16.*parallelize"):
        jax.eval_shape(run, moe, x, ids)


def test_placed_arrays_lie_where_their_specs_say():
    moe, mesh = random_module(make_moe, HASH_MOE), make_mesh(expert=2, tensor=4)
    specs = dsv4.partition_specs(moe, mesh=mesh)
    placed = place(moe, specs, mesh)
    for leaf, spec in zip(jax.tree.leaves(placed), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    shards = placed.experts.gate_up.addressable_shards
    assert {shard.data.shape for shard in shards} == {(8, 2, 12, 64)}
    assert_same_bits(placed, moe)
