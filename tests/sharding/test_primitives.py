"""Every primitive over a mesh against itself on one device, and what it sends."""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.plan.collectives import collectives
from tests.models import QUICKLY

ROWS, SEQ, GROUPS, IN, OUT = 8, 3, 8, 5, 7  # OUT is of each group
WAYS = ["jit", "shard_map"]


class Case(NamedTuple):
    """A module, what it is called with, and the gradient that comes back."""

    module: Any
    x: jax.Array
    cotangent: jax.Array
    rest: tuple[jax.Array, ...] = ()


def normal(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32))


@functools.cache
def make_case(name):
    if name == "GroupedLinear":
        key = jax.random.key(0)
        linear = dsv4.GroupedLinear(IN, GROUPS * OUT, GROUPS, key=key, std=1.0)
        shape = (ROWS, SEQ, GROUPS)
        return Case(linear, normal((*shape, IN), 1), normal((*shape, OUT), 2))
    x, cotangent = normal((ROWS, SEQ, OUT), 1), normal((ROWS, SEQ, OUT), 2)
    if name == "RotaryEmbedding":
        rope = dsv4.RotaryEmbedding(6, yarn=dsv4.YarnScaling(16, 64))
        positions = np.random.default_rng(3).integers(0, 4096, (ROWS, SEQ))
        return Case(rope, x, cotangent, (jnp.asarray(positions.astype(np.int32)),))
    if name == "RMSNorm":
        norm = dsv4.RMSNorm(OUT)
        norm = eqx.tree_at(lambda norm: norm.weight, norm, normal(OUT, 0))
        return Case(norm, x, cotangent)
    return Case(dsv4.UnweightedRMSNorm(), x, cotangent)


def make_mesh(**sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return dsv4.make_mesh(**sizes, devices=devices)


def specs_of(case, mesh):
    """Rows over `data`, groups over `tensor`; without axes of one device."""

    def spec(x):
        axes = ("data", None, "tensor") if x.ndim == 4 else ("data",)
        return P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in axes))

    module = dsv4.partition_specs(case.module, mesh=mesh)
    return Case(module, *jax.tree.map(spec, case[1:]))


def call(module, x, *rest):
    return module(x, *rest)


def call_over(mesh, case, way):
    """`call`, the two ways there are."""
    if way == "jit":
        return call
    specs = specs_of(case, mesh)
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(specs.module, specs.x, *specs.rest),
        out_specs=specs.cotangent,
    )


def with_gradients(call, case):
    """The output, and the gradients of its product with the cotangent.

    Not of a sum over the output: that alone would need a collective.
    """
    function = functools.partial(apply, call, case.rest)
    out, pull_back = jax.vjp(function, case.module, case.x)
    return out, *pull_back(case.cotangent)


def apply(call, rest, module, x):
    return call(module, x, *rest)


@functools.cache
def expected(name):
    step = jax.jit(functools.partial(with_gradients, call), compiler_options=QUICKLY)
    return step(make_case(name))


def check(name, mesh, way):
    """Output and gradients are those of one device; returns what is sent."""
    case = make_case(name)
    specs = specs_of(case, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    step = jax.jit(
        functools.partial(with_gradients, call_over(mesh, case, way)),
        in_shardings=(shardings,),
        out_shardings=(shardings.cotangent, shardings.module, shardings.x),
        compiler_options=QUICKLY,
    )
    compiled = step.lower(case).compile()
    found = compiled(jax.device_put(case, shardings))
    assert jax.tree.structure(found) == jax.tree.structure(expected(name))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected(name))):
        np.testing.assert_allclose(ours, theirs, 1e-6, 1e-6)
    sent = collectives(compiled, mesh)
    assert mentions_collectives(compiled) == bool(sent)
    return sent


def mentions_collectives(compiled):
    """From the program's text, without the help of what is tested elsewhere."""
    text = compiled.as_text()
    words = "all-reduce all-gather all-to-all reduce-scatter collective-permute".split()
    return any(f" {word}(" in text or f" {word}-start(" in text for word in words)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data", [2, 8])
@pytest.mark.parametrize("name", ["UnweightedRMSNorm", "RotaryEmbedding"])
def test_primitives_without_weights_split_by_rows_send_nothing(name, data, way):
    assert check(name, make_mesh(data=data), way) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data", [2, 8])
@pytest.mark.parametrize("name", ["RMSNorm", "GroupedLinear"])
def test_primitives_split_by_rows_add_up_the_weights_gradient_alone(name, data, way):
    sent = check(name, make_mesh(data=data), way)
    size = make_case(name).module.weight.nbytes
    assert sent == [("all-reduce", ("data",), size)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tensor", [2, 8])
def test_grouped_linear_split_by_groups_sends_nothing(tensor, way):
    assert check("GroupedLinear", make_mesh(tensor=tensor), way) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data, tensor", [(2, 4), (4, 2)])
def test_grouped_linear_split_both_ways_adds_up_its_part_of_the_gradient(
    data, tensor, way
):
    sent = check("GroupedLinear", make_mesh(data=data, tensor=tensor), way)
    size = make_case("GroupedLinear").module.weight.nbytes // tensor
    assert sent == [("all-reduce", ("data",), size)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["RMSNorm", "GroupedLinear"])
def test_forward_alone_sends_nothing(name, way):
    case, mesh = make_case(name), make_mesh(data=2, tensor=4)
    specs = specs_of(case, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    step = jax.jit(
        call_over(mesh, case, way),
        in_shardings=(shardings.module, shardings.x),
        out_shardings=shardings.cotangent,
    )
    compiled = step.lower(case.module, case.x).compile()
    assert collectives(compiled, mesh) == [] and not mentions_collectives(compiled)


def test_grouped_linear_split_inside_its_groups_does_need_a_collective():
    # The check itself: sums over split channels have to be completed.
    case, mesh = make_case("GroupedLinear"), make_mesh(tensor=4)
    linear = eqx.tree_at(lambda f: f.weight, case.module, case.module.weight[..., :4])
    specs = dsv4.partition_specs(linear, {"in_per_group": "tensor"}, mesh=mesh)
    specs = (specs, P(None, None, None, "tensor"))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    whole = NamedSharding(mesh, P())
    step = jax.jit(call, in_shardings=shardings, out_shardings=whole)
    compiled = step.lower(linear, case.x[..., :4]).compile()
    sent = collectives(compiled, mesh)
    assert {(item.kind, item.axes) for item in sent} == {("all-reduce", ("tensor",))}
    assert mentions_collectives(compiled)
