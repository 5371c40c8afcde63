"""The routers' biases after an optimizer step, against the rule."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.models import quick_jit, random_model, small_config
from tests.sharded import assert_same_bits, make_mesh

# A layer that hashes, a pair of layers twice, one of which hashes, a last layer, and a
# prediction block.
CONFIG = small_config(
    vocab_size=96,
    n_routed_experts=6,
    num_hidden_layers=6,
    layer_types=(SLIDING, HCA, CSA, HCA, CSA, SLIDING),
    compress_ratios=(0, 16, 4, 16, 4, 0),
    mlp_layer_types=(HASH_MOE, TOPK_MOE, HASH_MOE, TOPK_MOE, HASH_MOE, TOPK_MOE),
)
SCORED, MTP = (1, 3, 5), 6
model = functools.cache(lambda: random_model(CONFIG))


def random_counts(num=6, seed=0):
    """Counts of each layer, None for those that hash."""
    generator = np.random.default_rng(seed)
    counts = [generator.integers(0, 9, CONFIG.n_routed_experts) for _ in range(num)]
    return [x if i in (*SCORED, MTP) else None for i, x in enumerate(counts)]


def biases(model):
    """The bias of each layer that has one, and of the prediction block."""
    layers = {i: model.layers[i].moe.router.bias for i in SCORED}
    return layers | {MTP: model.mtp[0].block.moe.router.bias}


def without_biases(model):
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return [x for path, x in leaves if "router.bias" not in jax.tree_util.keystr(path)]


def assert_moved(found, counts, speed):
    for i, before in biases(model()).items():
        step = 0.0
        if i < len(counts):
            step = speed * np.sign(counts[i].mean() - counts[i])
            assert 0 < np.count_nonzero(step)
        wanted = np.asarray(before) + np.float32(step)
        np.testing.assert_array_equal(biases(found)[i], wanted, f"layer {i}")
    assert_same_bits(without_biases(found), without_biases(model()))


@pytest.mark.parametrize("num", [6, 7])
def test_biases_follow_the_rule_and_nothing_else_changes(num):
    counts = random_counts(num)
    assert_moved(dsv4.update_router_bias(model(), counts), counts, 1e-3)


@pytest.mark.parametrize("sizes", [None, dict(data=2, expert=2)], ids=str)
def test_biases_move_under_jit_and_over_a_mesh(sizes):
    counts, one = random_counts(seed=1), model()
    if sizes is not None:
        one = dsv4.shard(one, make_mesh(**sizes), fsdp=True)
    update = quick_jit(lambda *args: dsv4.update_router_bias(*args, speed=0.25))
    found = update(one, counts)
    for before, after in zip(jax.tree.leaves(one), jax.tree.leaves(found)):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    found = found if sizes is None else jax.device_get(found.model)
    assert_moved(found, counts, 0.25)


def test_equal_counts_move_nothing():
    # In float32, their mean is another number.
    counts = [jnp.full(CONFIG.n_routed_experts, 2**24 + 1)] * 6
    assert_same_bits(dsv4.update_router_bias(model(), counts), model())


def test_a_difference_of_one_moves_large_counts():
    counts = [np.full(CONFIG.n_routed_experts, 10**9, np.int32) for _ in range(6)]
    for x in counts:
        x[2] += 1
    found = dsv4.update_router_bias(model(), counts, speed=1.0)
    for i in SCORED:
        step = biases(found)[i] - biases(model())[i]
        np.testing.assert_allclose(step, [1, 1, -1, 1, 1, 1], 1e-6)


def test_the_part_that_is_not_trained_has_the_biases():
    trained, rest = eqx.partition(model(), dsv4.trainable(model()))
    counts = random_counts()
    found = eqx.combine(trained, dsv4.update_router_bias(rest, counts))
    assert_moved(found, counts, 1e-3)
    with pytest.raises(ValueError, match="the bias of layer 1 is None: give the whole"):
        dsv4.update_router_bias(trained, counts)


@pytest.mark.parametrize("moes", [(HASH_MOE,) * 3, (HASH_MOE, HASH_MOE, TOPK_MOE)])
def test_models_without_a_stack_or_a_prediction_block_are_moved_too(moes):
    single = random_model(
        small_config(mlp_layer_types=moes, num_nextn_predict_layers=0)
    )
    counts = [np.arange(7)] * 3
    found = dsv4.update_router_bias(single, counts, speed=2.0)
    assert_same_bits(without_biases(found), without_biases(single))
    if moes[2] == TOPK_MOE:
        before, after = (x.layers[2].moe.router.bias for x in (single, found))
        np.testing.assert_allclose(after - before, [2, 2, 2, 0, -2, -2, -2], 1e-6)


@pytest.mark.parametrize(
    "counts, options, message",
    [
        (random_counts(5), {}, r"counts='5 of them'\): must be those of 6 layers"),
        (random_counts(7) + [None], {}, "counts='8 of them'"),
        ([None] * 6, {}, r"counts\[1\]=None\): must be an array of 6 numbers"),
        ([np.ones(5, int)] * 6, {}, r"counts\[1\]='int64\[5\]'"),
        ([np.ones((2, 6), int)] * 6, {}, r"counts\[1\]='int64\[2, 6\]'"),
        ([np.ones(6, bool)] * 6, {}, r"counts\[1\]='bool\[6\]'"),
        (random_counts(), dict(speed=-1), "speed=-1"),
        (random_counts(), dict(speed=np.nan), "speed=nan"),
    ],
)
def test_counts_that_are_not_of_the_layers_are_refused(
    counts, options, message, without_shape_checks
):
    with pytest.raises(ValueError, match=rf"update_router_bias\({message}"):
        dsv4.update_router_bias(model(), counts, **options)
    with pytest.raises(ValueError, match="model='Layers'"):
        dsv4.update_router_bias(model().layers, counts)
