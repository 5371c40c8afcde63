"""Masks of parameters: what a loss reaches, what is decayed, some layers of a stack."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.models import random_model, small_config

# One layer first, then a pair of layers twice: layers 1 and 3 lie in one stack.
CONFIG = small_config(
    num_hidden_layers=5,
    layer_types=(SLIDING, HCA, CSA, HCA, CSA),
    compress_ratios=(0, 16, 4, 16, 4),
    mlp_layer_types=(HASH_MOE,) + (TOPK_MOE,) * 4,
)
model = functools.cache(lambda: random_model(CONFIG))


def marked(mask):
    """Paths of the leaves that are marked."""
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    assert all(isinstance(x, bool) for _, x in leaves)
    return {jax.tree_util.keystr(path) for path, x in leaves if x}


def moved_layers(before, after):
    """Layers of which any parameter, or every parameter, differs."""
    pairs = [list(map(jax.tree.leaves, pair)) for pair in zip(before, after)]
    differ = [
        [bool((x != y).any()) for x, y in zip(old, new, strict=True)]
        for old, new in pairs
    ]
    some, every = ([i for i, x in enumerate(differ) if f(x)] for f in (any, all))
    return some, every


@pytest.mark.parametrize("mtp", [False, True])
def test_a_loss_reaches_all_floats_but_indexers_biases_of_routers_and_drafts(mtp):
    abstract = abstract_model(CONFIG, jnp.bfloat16)
    found = marked(dsv4.trainable(abstract, mtp=mtp))
    floats = marked(
        jax.tree.map(lambda x: bool(jnp.issubdtype(x.dtype, jnp.inexact)), abstract)
    )
    assert found < floats
    for path in floats - found:
        is_draft = path.startswith(".mtp") and not mtp
        assert is_draft or ".indexer" in path or path.endswith(".router.bias"), path
    assert any(path.startswith(".mtp") for path in found) == mtp
    assert not any(".indexer" in path or ".router.bias" in path for path in found)


def test_indexers_are_trained_beside_the_rest_or_alone():
    indexers = marked(dsv4.indexer_mask(model()))
    every = marked(jax.tree.map(lambda _: True, model()))
    assert indexers == {path for path in every if ".indexer." in path}
    assert len(indexers) == 6  # of two layers, stacked
    without = marked(dsv4.trainable(model()))
    assert marked(dsv4.trainable(model(), indexers=True)) == without | indexers
    trained = dsv4.trainable(model(), indexers=True, layers=[1])
    assert not any(".indexer." in path for path in marked(trained))


def test_trainable_parts_the_model_in_two():
    trained, rest = eqx.partition(model(), dsv4.trainable(model()))
    assert eqx.tree_equal(eqx.combine(trained, rest), model())
    assert trained.layers.repeated[1].attention.indexer.query_up is None
    assert rest.layers.repeated[1].moe.router.bias is not None
    assert trained.mtp[0].norm.weight is None and trained.norm.weight is not None


def test_only_matrices_are_decayed():
    found = marked(dsv4.decay_mask(abstract_model(CONFIG, jnp.bfloat16)))
    names = {path.rpartition(".")[2] for path in found}
    assert names == set(
        "embedding unembedding embedding_in streams_in query_down query_up key_value "
        "output_up value gate head_weights gate_up down weight".split()
    )
    assert not any(".norm.weight" in path or "_norm.weight" in path for path in found)
    kinds = ("router.weight", "connection.weight", "head.weight", "output_down.weight")
    for path in found:
        assert not path.endswith(".weight") or path.endswith(kinds), path


def test_masks_are_what_optax_takes():
    optax = pytest.importorskip("optax")
    trained = eqx.filter(model(), dsv4.trainable(model()))
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        optimizer = optax.add_decayed_weights(0.5, mask=dsv4.decay_mask)
        zeros = jax.tree.map(np.zeros_like, trained)
        params = jax.tree.map(np.ones_like, trained)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    attention = updates.layers.repeated[1].attention
    assert (np.asarray(attention.query_up) == 0.5).all()
    for still in (attention.sinks, attention.compressor.position_bias):
        assert not np.asarray(still).any()


@pytest.mark.parametrize("layers", [[2], [1, 3], [0, 4], [], range(5)])
def test_updates_of_some_layers_move_those_alone(layers):
    mask = dsv4.layer_mask(model(), layers)
    ones = jax.tree.map(lambda x: jnp.ones_like(x), model())
    moved = jax.tree.map(lambda x, d: x + d, model(), dsv4.apply_mask(mask, ones))
    some, every = moved_layers(model().layers, moved.layers)
    assert some == every == list(layers)
    for name in ("embedding", "head", "norm", "unembedding", "mtp"):
        assert eqx.tree_equal(getattr(moved, name), getattr(model(), name)), name


def test_all_but_a_layer_of_a_stack_is_frozen_in_training():
    optax = pytest.importorskip("optax")
    mask = dsv4.layer_mask(model(), [2])
    trained, frozen = eqx.partition(model(), dsv4.trainable(model(), layers=[2]))
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(trained)
    # Arrays that hold no part of the layer are not in the optimizer's state.
    assert jax.tree.leaves((trained.layers.first, trained.layers.repeated[0])) == []
    grads = jax.tree.map(jnp.ones_like, trained)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        updates, _ = optimizer.update(grads, state, trained)
        trained = optax.apply_updates(trained, dsv4.apply_mask(mask, updates))
    after = eqx.combine(trained, frozen)
    some, _ = moved_layers(model().layers, after.layers)
    assert some == [2]
    assert eqx.tree_equal(after.embedding, model().embedding)


@pytest.mark.parametrize("layers", [[5], [-1, 2]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match=r"layer_mask\(layers=\[.*in \[0, 5\)"):
        dsv4.layer_mask(model(), layers)
    with pytest.raises(ValueError, match="trainable"):
        dsv4.trainable(model(), layers=layers)


def test_own_modules_and_models_in_two_parts_have_masks_too():
    parts = eqx.nn.MLP(3, 3, 5, 1, key=jax.random.key(0)), model().layers[2].moe.router
    trained = eqx.partition(parts, dsv4.trainable(parts))[0]
    assert trained[1].bias is None and trained[0].layers[0].weight is not None
    again = dsv4.trainable(trained)
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    assert not jax.tree.leaves(dsv4.decay_mask(eqx.nn.Lambda(jnp.tanh)))[0]


def test_prediction_blocks_are_trained_beside_some_layers():
    marks = dsv4.trainable(model(), mtp=True, layers=np.array([2]))
    assert any(jax.tree.leaves(marks.mtp)) and not marks.embedding
    assert not any(jax.tree.leaves(dsv4.trainable(model(), layers=[2]).mtp))


@pytest.mark.parametrize("layers", [2, [True], ["2"]])
def test_what_is_no_number_of_a_layer_is_refused(layers, without_shape_checks):
    with pytest.raises(ValueError, match=r"layer_mask\(layers="):
        dsv4.layer_mask(model(), layers)
    with pytest.raises(ValueError, match="must be one with Layers"):
        dsv4.layer_mask(model().layers[2], [2])
