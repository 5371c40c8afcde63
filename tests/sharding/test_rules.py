"""Shardings read off annotations, and what is refused."""

import functools
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import dsv4_eqx as dsv4
from dsv4_eqx import DEFAULT_RULES, partition_specs
from dsv4_eqx.sharding.annotations import annotated_leaves
from dsv4_eqx.sharding.mesh import AXES
from tests.tiny import tiny_config


def make_linear(key):
    return dsv4.GroupedLinear(5, 8 * 7, 8, key=key)


class Own(eqx.Module):
    """A module of somebody else, with names that the glossary lacks."""

    weight: Float[Array, "pixels dim"]
    bias: Float[Array, " pixels"] | None


class Square(eqx.Module):
    """Its only rule can split it twice."""

    weight: Float[Array, "heads heads"]


class Bare(eqx.Module):
    """Its array says nothing about its shape."""

    weight: Array


class Several(eqx.Module):
    """Arrays of two shapes in one field."""

    weights: tuple[Float[Array, "heads dim"], Float[Array, " dim"]]


class Alike(eqx.Module):
    """Arrays of one shape in one field."""

    weights: list[Float[Array, "heads dim"]]
    named: dict[str, Float[Array, " heads"] | None]


class Pair(typing.NamedTuple):
    """A container with annotations of its own, and a module."""

    ids: Int[Array, " vocab"]
    linear: dsv4.GroupedLinear


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def abstract_model():
    return eqx.filter_eval_shape(dsv4.DeepSeekV4, tiny_config(), key=jax.random.key(0))


def test_default_rules_split_what_the_paper_calls_parallel():
    assert dict(DEFAULT_RULES) == {
        "heads": "tensor",
        "groups": "tensor",
        "expert_hidden": "tensor",
        "shared_hidden": "tensor",
        "vocab": "tensor",
        "experts": "expert",
    }
    assert DEFAULT_RULES.keys() <= dsv4.DIMENSIONS.keys()
    assert set(DEFAULT_RULES.values()) <= set(AXES)
    with pytest.raises(TypeError):
        DEFAULT_RULES["heads"] = "data"


def test_a_lone_primitive_is_split_by_its_annotation():
    linear = make_linear(jax.random.key(0))
    specs = partition_specs(linear)
    assert isinstance(specs, dsv4.GroupedLinear)
    assert specs.weight == P("tensor", None, None)
    assert partition_specs(dsv4.RMSNorm(7)).weight == P(None)


@pytest.mark.parametrize("module", [dsv4.UnweightedRMSNorm(), dsv4.RotaryEmbedding(6)])
def test_a_module_without_arrays_has_no_specs(module):
    specs = partition_specs(module)
    assert jax.tree.leaves(specs) == [] and specs == module


@pytest.mark.parametrize("stack", [(3,), (3, 5)])
def test_dimensions_of_stacking_are_not_split(stack):
    make, keys = make_linear, jax.random.split(jax.random.key(0), stack)
    for _ in stack:
        make = eqx.filter_vmap(make)
    stacked = eqx.filter_eval_shape(make, keys)
    assert stacked.weight.shape == (*stack, 8, 7, 5)
    unsplit = (None,) * len(stack)
    assert partition_specs(stacked).weight == P(*unsplit, "tensor", None, None)


def test_an_abstract_module_has_the_specs_of_a_real_one():
    abstract = eqx.filter_eval_shape(make_linear, jax.random.key(0))
    assert isinstance(abstract.weight, jax.ShapeDtypeStruct)
    assert partition_specs(abstract) == partition_specs(make_linear(jax.random.key(0)))


def test_every_array_of_the_model_has_a_spec():
    model = abstract_model()
    specs = partition_specs(model)
    assert jax.tree.structure(specs) == jax.tree.structure(model)
    for leaf, spec in zip(annotated_leaves(model), jax.tree.leaves(specs), strict=True):
        stacked = leaf.array.ndim - len(leaf.dims)
        assert stacked == (1 if ".repeated[" in leaf.name else 0), leaf.name
        axes = [DEFAULT_RULES.get(dim) for dim in leaf.dims]
        assert spec == P(*[None] * stacked, *axes), leaf.name


def test_the_whole_model_is_split_as_intended():
    specs = partition_specs(abstract_model())
    block, stacked = specs.layers.first[0], specs.layers.repeated[0]
    assert specs.embedding == specs.unembedding == P("tensor", None)
    assert block.attention.query_up == P("tensor", None, None)
    assert block.attention.sinks == P("tensor")
    assert block.attention.key_value == P(None, None)
    assert block.attention.output_up == P(None, "tensor", None)
    assert block.moe.experts.gate_up == P("expert", None, "tensor", None)
    assert block.moe.shared.down == P(None, "tensor")
    assert block.moe.router.table == block.moe.router.weight == P(None, None)
    assert stacked.attention.query_up == P(None, "tensor", None, None)
    assert stacked.moe.experts.down == P(None, "expert", None, "tensor")
    assert specs.mtp[0].block.attention.query_up == P("tensor", None, None)


def test_every_name_with_a_rule_splits_something_of_the_model():
    leaves = annotated_leaves(abstract_model())
    assert DEFAULT_RULES.keys() <= {dim for leaf in leaves for dim in leaf.dims}


def test_containers_of_modules_keep_their_form():
    linear = eqx.filter_eval_shape(make_linear, jax.random.key(0))
    split = P("tensor", None, None)
    found = partition_specs({"a": [linear, dsv4.RMSNorm(3)], "b": (None, linear)})
    assert found["a"][0].weight == found["b"][1].weight == split
    assert found["a"][1].weight == P(None) and found["b"][0] is None
    pair = partition_specs(Pair(ids=array(9), linear=linear))
    assert isinstance(pair, Pair)
    assert pair.ids == P("tensor") and pair.linear.weight == split


def test_arrays_in_containers_of_a_field_share_its_annotation():
    module = Alike([array(8, 3), array(2, 8, 3)], {"x": array(8), "y": None})
    specs = partition_specs(module)
    assert specs.weights == [P("tensor", None), P(None, "tensor", None)]
    assert specs.named == {"x": P("tensor"), "y": None}


def test_own_rules_may_use_own_names_and_several_axes():
    module = Own(array(8, 3), array(8))
    specs = partition_specs(module, {"pixels": ("data", "tensor"), "dim": None})
    assert specs.weight == P(("data", "tensor"), None)
    assert specs.bias == P(("data", "tensor"))
    assert partition_specs(Own(array(8, 3), None), {"pixels": None}).bias is None


def test_own_rules_replace_the_default_ones():
    linear = eqx.filter_eval_shape(make_linear, jax.random.key(0))
    assert partition_specs(linear, {"in_per_group": "data"}).weight == (
        P(None, None, "data")
    )
    assert partition_specs(linear, {}).weight == P(None, None, None)


def test_axes_of_one_device_are_left_out_where_a_mesh_is_given():
    experts = abstract_model().layers.first[0].moe.experts
    eight = eqx.tree_at(lambda e: e.gate_up, experts, array(8, 2, 28, 60))
    eight = eqx.tree_at(lambda e: e.down, eight, array(8, 60, 28))
    mesh = dsv4.make_mesh(expert=8)
    assert partition_specs(eight, mesh=mesh).gate_up == P("expert", None, None, None)
    both = {"experts": ("data", "expert", "tensor"), "expert_hidden": "context"}
    mesh = dsv4.make_mesh(data=4, tensor=2)
    specs = partition_specs(eight, both, mesh=mesh)
    assert specs.gate_up == P(("data", "tensor"), None, None, None)


def test_specs_place_the_model_over_the_mesh():
    linear, mesh = make_linear(jax.random.key(0)), dsv4.make_mesh(data=2, tensor=4)
    spec = partition_specs(linear, mesh=mesh).weight
    sharding = jax.sharding.NamedSharding(mesh, spec)
    placed = jax.device_put(linear.weight, sharding)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 7, 5)}


def test_a_name_that_the_glossary_lacks_is_refused():
    module = Own(array(8, 3), None)
    with pytest.raises(ValueError, match=r"\.weight has the dimension 'pixels'"):
        partition_specs({"here": module})
    # A rule for it, even none, says that it is meant.
    assert partition_specs(module, {"pixels": None}).weight == P(None, None)


def test_an_axis_used_twice_in_one_array_is_refused():
    with pytest.raises(ValueError, match=r"\.weight .*'heads'.* twice .*'tensor'"):
        partition_specs(Square(array(8, 8)))
    linear = eqx.filter_eval_shape(make_linear, jax.random.key(0))
    rules = {"groups": ("data", "tensor"), "in_per_group": "data"}
    with pytest.raises(ValueError, match=r"\.weight .*'in_per_group'.*'data'"):
        partition_specs([linear], rules)


def test_an_axis_that_does_not_divide_is_refused():
    model, mesh = abstract_model(), dsv4.make_mesh(data=2, tensor=4)
    text = (
        r": \[0\]\.attention\.query_up has the shape \(2, 6, 20, 22\)"
        r"; the mesh axis 'tensor' of size 4 does not divide its dimension 'heads' of "
        r"size 6"
    )
    with pytest.raises(ValueError, match=text):
        partition_specs(model.layers.repeated, {"heads": "tensor"}, mesh=mesh)


def test_axes_that_only_divide_one_by_one_are_refused():
    module, rules = Own(array(4, 3), None), {"pixels": ("data", "tensor")}
    mesh = dsv4.make_mesh(data=2, tensor=4)
    text = r"\('data', 'tensor'\) of size 8 .*'pixels' of size 4"
    with pytest.raises(ValueError, match=text):
        partition_specs(module, rules, mesh=mesh)


def test_an_axis_that_the_mesh_lacks_is_refused():
    module, mesh = Own(array(8, 3), None), dsv4.make_mesh(data=8)
    with pytest.raises(ValueError, match=r"'pixels' of \.weight .*'model'.*'data', "):
        partition_specs(module, {"pixels": "model"}, mesh=mesh)
    assert partition_specs(module, {"pixels": "model"}).weight == P("model", None)


def test_an_array_without_a_shape_annotation_is_refused():
    with pytest.raises(ValueError, match=r"\['a'\]\.weight has no shape annotation"):
        partition_specs({"a": Bare(array(3))})
    with pytest.raises(ValueError, match="the array has no shape annotation"):
        partition_specs(array(3))
    with pytest.raises(ValueError, match=r"\[1\] has no shape annotation"):
        partition_specs([dsv4.RMSNorm(3), array(3)])


def test_a_field_of_arrays_with_several_shapes_is_refused():
    module = Several((array(8, 3), array(3)))
    with pytest.raises(ValueError, match=r"\.weights\[0\] .*\['dim', 'heads dim'\]"):
        partition_specs(module)


def test_an_array_with_fewer_dimensions_than_its_annotation_is_refused():
    with pytest.raises(ValueError, match=r"\.weight has the shape \(8,\), fewer"):
        partition_specs(Square(array(8)))


@pytest.mark.parametrize("value", [0.5, jnp.tanh, 3, True])
def test_what_is_no_array_is_to_be_marked_static(value):
    match = r"\.(weight|bias) is .*, not an array; mark its field static"
    with pytest.raises(ValueError, match=match):
        partition_specs(Bare(value))
    with pytest.raises(ValueError, match=match):
        partition_specs(Own(array(8, 3), value), {"pixels": None})


def test_annotations_that_are_strings_are_named():
    # As `from __future__ import annotations` makes all of them.
    class Quoted(eqx.Module):
        weight: 'Float[Array, "heads dim"]'  # noqa: UP037

    match = r"annotation of \.weight is the string .*from __future__ import annotations"
    with pytest.raises(ValueError, match=match):
        partition_specs(Quoted(array(8, 3)))


def test_a_rule_for_no_known_dimension_is_refused():
    with pytest.raises(ValueError, match="rule for 'grops', which is neither in"):
        partition_specs(dsv4.RMSNorm(3), {"dim": None, "grops": "tensor"})
