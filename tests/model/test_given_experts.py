"""Layers that are given the experts of each token, against those that choose them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import HASH_MOE, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.models import (
    DIVISIBLE,
    quick_jit,
    random_model,
    random_tokens,
    relative,
    small_config,
)
from tests.sharded import assert_equal_gradients, assert_same_bits, make_mesh

# A layer that hashes, then one that scores, twice, in a loop.
CONFIG = small_config(
    **DIVISIBLE,
    num_hidden_layers=3,
    layer_types=(SLIDING,) * 3,
    compress_ratios=(0,) * 3,
    mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
    num_nextn_predict_layers=0,
    hc_sinkhorn_iters=2,
)
EXPERTS, SLOTS = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
BATCH, SEQ = 2, 10
IDS = np.repeat([[4, 7]], [6, 4], axis=1).repeat(BATCH, 0)
model = functools.cache(lambda: random_model(CONFIG, 2))
tokens = functools.cache(lambda: random_tokens(3, SEQ, BATCH, CONFIG))


def other_experts(seed=0):
    """Of each layer, experts that its router would not choose; none for the first."""
    generator = np.random.default_rng(seed)
    order = generator.random((2, BATCH, SEQ, EXPERTS)).argsort(axis=-1)
    return [None, *order[..., :SLOTS]]


def weigh(logits):
    return jnp.sum(logits * jnp.sin(jnp.arange(logits.size).reshape(logits.shape)))


@functools.cache
def step():
    def loss(model, experts):
        hidden, layers = model.observe(tokens(), IDS, remat=True, experts=experts)
        logits = model.unembed(hidden)
        return weigh(logits), (logits, [layer.routing for layer in layers])

    return quick_jit(jax.grad(loss, has_aux=True, allow_int=True))


@pytest.mark.slow
def test_replaying_the_own_routing_changes_no_bit():
    gradients, (logits, routings) = step()(model(), None)
    experts = [np.asarray(routing.experts) for routing in routings]
    found_gradients, (found, found_routings) = step()(model(), experts)
    assert_same_bits((found, found_routings), (logits, routings))
    assert_equal_gradients(found_gradients, gradients, 1e-6, floor=1e-2)


@functools.cache
def expected():
    return step()(model(), other_experts())


def test_given_experts_are_run_with_weights_from_all_scores():
    gradients, (_, routings) = expected()
    table = np.asarray(model().layers[0].moe.router.table)
    np.testing.assert_array_equal(routings[0].experts, table[tokens()])
    for routing, experts in zip(routings[1:], other_experts()[1:]):
        np.testing.assert_array_equal(routing.experts, experts)
        chosen = np.take_along_axis(np.asarray(routing.scores, "f8"), experts, axis=-1)
        weights = 1.5 * chosen / chosen.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(routing.weights, weights, 1e-5)
    router = gradients.layers.repeated[0].moe.router
    assert all(np.any(x) for x in router.weight) and not np.any(router.bias)


def test_a_mixture_runs_the_given_experts():
    moe, generator = model().layers[1].moe, np.random.default_rng(1)
    x = generator.standard_normal((BATCH, SEQ, CONFIG.hidden_size)).astype(np.float32)
    experts = other_experts()[1]
    found = moe(jnp.asarray(x), jnp.asarray(tokens()), jnp.asarray(experts, jnp.int32))

    def swiglu(x, gate_up, down):
        gate, up = (x @ np.asarray(part, "f8").T for part in gate_up)
        gate = np.minimum(gate, CONFIG.swiglu_limit)
        up = np.clip(up, -CONFIG.swiglu_limit, CONFIG.swiglu_limit)
        return (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down, "f8").T

    scores = np.sqrt(np.log1p(np.exp(x @ np.asarray(moe.router.weight, "f8").T)))
    wanted = swiglu(x, moe.shared.gate_up, moe.shared.down)
    for place in np.ndindex(BATCH, SEQ):
        chosen = experts[place]
        weights = 1.5 * scores[place][chosen] / scores[place][chosen].sum()
        for expert, weight in zip(chosen, weights):
            parts = moe.experts.gate_up[expert], moe.experts.down[expert]
            wanted[place] += weight * swiglu(x[place].astype("f8"), *parts)
    assert relative(found, wanted) <= 1e-5


def test_layers_that_are_given_none_choose():
    abstract = abstract_model(CONFIG, jnp.float32)

    def program(**options):
        run = jax.make_jaxpr(lambda model: model.streams(tokens(), IDS, **options))
        return str(run(abstract))

    assert program() == program(experts=[None] * 3)
    # What stands at a layer that hashes is not read.
    given = other_experts()
    nothing = np.full((BATCH, SEQ, SLOTS), -1)
    assert program(experts=given) == program(experts=[nothing, *given[1:]])
    assert program(experts=given) != program()


@pytest.mark.slow
def test_given_experts_over_a_mesh_equal_those_of_one_device():
    gradients, (logits, routings) = expected()
    sharded = dsv4.shard(model(), make_mesh(data=1, expert=2, context=2, tensor=2))
    found_gradients, (found, found_routings) = step()(sharded, other_experts())
    np.testing.assert_allclose(found, logits, 1e-4, 1e-5)
    for one, other in zip(found_routings, routings, strict=True):
        np.testing.assert_array_equal(one.experts, other.experts)
    # Those after the layers are mostly rounding, where streams are nearly parallel.
    assert_equal_gradients(found_gradients.model.layers, gradients.layers, 1e-5, 1e-2)


def changed(layer, value):
    experts = other_experts()
    experts[layer] = value
    return experts


def with_expert(value, place=(1, 3, 2)):
    experts = other_experts()[1].copy()
    experts[place] = value
    return experts


@pytest.mark.parametrize(
    "experts, message",
    [
        (other_experts()[1:], r"experts='2 of them'\): .* each of the 3 layers"),
        (np.zeros((3, BATCH, SEQ, SLOTS), int), "experts='ndarray'"),
        (changed(1, None), r"layers \[1, 2\] run in one loop"),
        (changed(2, other_experts()[1][:, 1:]), r"layer 2: experts of shape \(2, 9, 3"),
        (changed(1, other_experts()[1] * 1.0), "layer 1: experts must .* not float64"),
        (changed(1, other_experts()[1] > 0), "layer 1: experts must .* not bool"),
        (changed(1, with_expert(6)), r"layer 1: expert 6 at \[1, 3, 2\] is outside"),
        (changed(2, with_expert(-1)), r"layer 2: expert -1 at \[1, 3, 2\] is outside"),
        (
            changed(1, with_expert(np.array([2, 5, 2]), (1, 3))),
            r"the experts \[2, 5, 2\] of the token at \[1, 3\] are not different",
        ),
    ],
)
def test_what_is_no_routing_of_the_tokens_is_refused(
    experts, message, without_shape_checks
):
    abstract = abstract_model(CONFIG, jnp.float32)
    for call in (abstract, abstract.hidden, abstract.streams, abstract.observe):
        with pytest.raises(ValueError, match=rf"DeepSeekV4.*{message}"):
            call(tokens(), experts=experts)


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_that_is_not_there_gives_nan_where_nobody_can_look(expert):
    router, x = model().layers[1].moe.router, jnp.ones((2, CONFIG.hidden_size))
    route = quick_jit(lambda experts: router(x, jnp.zeros(2, jnp.int32), experts))
    weights = route(jnp.array([[0, 1, 2], [3, expert, 1]])).weights
    assert np.isfinite(weights[0]).all() and np.isnan(weights[1]).all()
