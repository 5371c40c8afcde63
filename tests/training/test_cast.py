"""Weights in another dtype: those of loading in it, on any arrays and under `jit`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Float32

import dsv4_eqx as dsv4
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.numerics.quantized_weight import is_quantized
from tests.checkpoint.saving import one_layer, small_model
from tests.config.raw import NANO
from tests.models import T
from tests.sharded import make_mesh


def dtypes_of(tree):
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    return [np.dtype(x.dtype).name for x in leaves]


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_cast_gives_what_is_loaded_in_the_dtype(keep_quantized):
    options = dict(keep_quantized=keep_quantized)
    wide, narrow = (
        dsv4.from_pretrained(NANO, dtype=dtype, **options)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    found = dsv4.cast(wide, jnp.bfloat16)
    assert len(set(dtypes_of(narrow))) > 2  # integers, too
    assert eqx.tree_equal(found, narrow)
    assert dtypes_of(dsv4.cast(narrow, "float32")) == dtypes_of(wide)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cast_gives_the_dtypes_of_a_model_of_the_dtype(dtype):
    wanted = abstract_model(T, jnp.dtype(dtype))
    for given in (jnp.float32, jnp.bfloat16):
        assert dsv4.cast(abstract_model(T, jnp.dtype(given)), dtype) == wanted


def test_what_was_cast_as_a_whole_is_float32_again_where_it_must_be():
    model = small_model()
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model
    )
    found = dsv4.cast(narrow, jnp.bfloat16)
    assert found.norm.weight.dtype == jnp.float32
    assert found.embedding is narrow.embedding
    wanted = abstract_model(one_layer(), jnp.dtype(jnp.bfloat16))
    assert dtypes_of(found) == dtypes_of(wanted)


def test_cast_of_a_part_and_of_numpys_arrays():
    norm = jax.tree.map(np.asarray, dsv4.RMSNorm(5))
    assert dsv4.cast(norm, jnp.bfloat16).weight is norm.weight
    linear = dsv4.GroupedLinear(3, 14, 7, key=jax.random.key(0))
    found = dsv4.cast(jax.tree.map(np.asarray, linear), jnp.bfloat16)
    assert isinstance(found.weight, np.ndarray)
    np.testing.assert_array_equal(found.weight, linear.weight.astype(jnp.bfloat16))
    array, key, label = jnp.ones(3), jax.random.key(0), "label"
    found = dsv4.cast({"array": array, "key": key, "label": label}, jnp.bfloat16)
    assert found["array"].dtype == jnp.bfloat16
    assert found["key"] is key and found["label"] is label


class Adapter(eqx.Module):
    """A part of a user's own."""

    down: Float[Array, "rank dim"]
    scale: Float32[Array, " rank"] | None


def test_a_part_of_ones_own_says_by_its_annotation_what_stays_float32():
    adapter = Adapter(jnp.ones((2, 5)), jnp.ones(2))
    found = dsv4.cast(adapter, jnp.bfloat16)
    assert dtypes_of(found) == ["bfloat16", "float32"]
    assert dsv4.cast(Adapter(jnp.ones((2, 5)), None), jnp.bfloat16).scale is None


def test_annotations_in_quotes_are_refused():
    class Quoted(eqx.Module):
        weight: "Float32[Array, ' dim']"

    with pytest.raises(ValueError, match="cast: the annotation of .weight is the str"):
        dsv4.cast(Quoted(jnp.ones(3)), jnp.bfloat16)


@pytest.mark.parametrize("dtype", [None, "int8", "float8_e4m3fn", "float64", object])
def test_dtypes_that_are_none_of_weights_are_refused(dtype, without_shape_checks):
    with pytest.raises(ValueError, match="^cast"):
        dsv4.cast(dsv4.RMSNorm(5), dtype)


def test_cast_over_a_mesh_leaves_arrays_in_their_places():
    model = dsv4.shard(small_model(), make_mesh(data=2), fsdp=True)
    found = dsv4.cast(model, jnp.bfloat16)
    assert isinstance(found, dsv4.ShardedModel)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(found), strict=True):
        assert x.sharding == y.sharding
    assert dtypes_of(found.model) == dtypes_of(dsv4.cast(small_model(), jnp.bfloat16))


def test_gradients_of_a_cast_model_are_those_of_the_wide_one():
    linear = dsv4.GroupedLinear(3, 14, 7, key=jax.random.key(0))

    @jax.jit
    @jax.grad
    def gradient(linear):
        x = jnp.ones((2, 7, 3), jnp.bfloat16)
        return dsv4.cast(linear, jnp.bfloat16)(x).astype(jnp.float32).sum()

    found = gradient(linear).weight
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.full(found.shape, 2.0))
