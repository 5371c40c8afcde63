"""One layer is replaced, in models of any arrays and in trees of anything else."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import replace_layer
from tests.model.test_layers import STACK
from tests.models import random_model

SINGLE, STACKED = 5, 3  # layers of STACK


@pytest.mark.parametrize("layer", range(6))
def test_a_layer_is_replaced_alone(layer):
    model = random_model(STACK)
    block = model.layers[layer]
    sinks = block.attention.sinks + 3
    edited = eqx.tree_at(lambda block: block.attention.sinks, block, sinks)
    after = replace_layer(model, layer, edited)
    for number, (now, before) in enumerate(zip(after.layers, model.layers)):
        assert eqx.tree_equal(now, edited if number == layer else before)
    assert after.config == model.config
    gradient = jax.grad(
        lambda sinks: jnp.sum(
            replace_layer(
                model.layers,
                layer,
                eqx.tree_at(lambda block: block.attention.sinks, block, sinks),
            )[layer].attention.sinks
        )
    )(sinks)
    np.testing.assert_array_equal(gradient, jnp.ones_like(sinks))


def test_a_layer_of_its_own_may_become_another_kind():
    layers = random_model(STACK).layers
    after = replace_layer(layers, 0, layers[1])
    assert eqx.tree_equal(after[0], layers[1])
    with pytest.raises(ValueError, match="layer 2 lies in a stack with others"):
        replace_layer(layers, 2, layers[1])  # compressed, and not
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layers[2])
    with pytest.raises(ValueError, match=r"weight is an array of bfloat16\[.*float32"):
        replace_layer(layers, 2, narrow)


@pytest.mark.parametrize("layer", [6, -1, True, "2"])
def test_a_layer_that_is_not_there_is_not_replaced(layer, without_shape_checks):
    model = random_model(STACK)
    with pytest.raises(ValueError, match=r"replace_layer\(layer=.*6 layers"):
        replace_layer(model, layer, model.layers[0])


@pytest.mark.parametrize("layer", [SINGLE, STACKED])
def test_a_layer_of_numpys_arrays_is_replaced_in_a_copy(layer):
    model = jax.tree.map(np.asarray, random_model(STACK))
    block = jax.tree.map(lambda x: x + 1, model.layers[layer])
    after = replace_layer(model, layer, block)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(after.layers))
    for number, (now, before) in enumerate(zip(after.layers, model.layers)):
        assert eqx.tree_equal(now, block if number == layer else before)
    # JAX's arrays may stand among numpy's, as inside `jit`.
    found = jax.jit(lambda block: replace_layer(model, layer, block))(block)
    assert eqx.tree_equal(found, jax.tree.map(jnp.asarray, after))


@pytest.mark.parametrize("layer", [SINGLE, STACKED])
def test_a_layer_of_shapes_is_replaced_by_the_same_shapes(layer):
    model = random_model(STACK)
    shapes = eqx.filter_eval_shape(lambda: model)
    assert replace_layer(shapes, layer, shapes.layers[layer]) == shapes


def test_shapes_and_arrays_are_not_stacked():
    model = random_model(STACK)
    shapes = eqx.filter_eval_shape(lambda: model)
    with pytest.raises(ValueError, match="is an abstract array of .* not an array of"):
        replace_layer(model, STACKED, shapes.layers[STACKED])
    with pytest.raises(ValueError, match="is an array of .* not an abstract array of"):
        replace_layer(shapes, STACKED, model.layers[STACKED])
    with pytest.raises(ValueError, match="'adam', not an array of float32"):
        labels = jax.tree.map(lambda _: "adam", model)
        replace_layer(model, STACKED, labels.layers[STACKED])


@pytest.mark.parametrize("old, new", [("adam", "muon"), (1, 2.5), (True, 1)])
def test_labels_of_one_layer_are_replaced_where_no_others_share_them(old, new):
    model = random_model(STACK)
    tree, other = (jax.tree.map(lambda _: label, model) for label in (old, new))
    after = replace_layer(tree, SINGLE, other.layers[SINGLE])
    assert after.layers[SINGLE] == other.layers[SINGLE]
    assert after.layers[STACKED] == tree.layers[STACKED]
    assert replace_layer(tree, STACKED, tree.layers[STACKED]) == tree
    with pytest.raises(
        ValueError, match=f"share {old!r} at .* has {new!r}.*layer_mask"
    ):
        replace_layer(tree, STACKED, other.layers[STACKED])


def test_a_tree_of_none_takes_none_in_a_stack():
    model = random_model(STACK)
    nothing = jax.tree.map(lambda _: None, model)
    for layer in (SINGLE, STACKED):
        assert replace_layer(nothing, layer, nothing.layers[layer]) == nothing
    after = replace_layer(nothing, SINGLE, model.layers[SINGLE])
    assert eqx.tree_equal(after.layers[SINGLE], model.layers[SINGLE])
    with pytest.raises(ValueError, match="its structure is another"):
        replace_layer(nothing, STACKED, model.layers[STACKED])


def test_numbers_for_whole_stacks_are_shared():
    model = random_model(STACK)
    norms = jax.tree.map(lambda x: jnp.sqrt(jnp.sum(x * x)), model)
    block = norms.layers[STACKED]
    assert eqx.tree_equal(replace_layer(norms, STACKED, block), norms)
    with pytest.raises(ValueError, match="lies in a stack with others, which share"):
        replace_layer(norms, STACKED, jax.tree.map(lambda x: x + 1, block))
