"""What a model over a mesh shows of its layers, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.models import quick_jit, random_model, random_tokens, small_config
from tests.sharded import assert_equal_gradients, make_mesh, normal

pytestmark = pytest.mark.slow
REPEATING = (SLIDING, HCA, CSA, HCA, CSA)
RATES = {SLIDING: 0, HCA: 16, CSA: 4}
observe = quick_jit(lambda model, *args: model.observe(*args))


@functools.cache
def config_of(*layers):
    """Sizes that two devices divide."""
    return small_config(
        vocab_size=96,
        n_routed_experts=6,
        num_attention_heads=4,
        o_groups=2,
        o_lora_rank=14,
        num_hidden_layers=len(layers),
        layer_types=layers,
        compress_ratios=tuple(RATES[layer] for layer in layers),
        mlp_layer_types=((HASH_MOE,) + (TOPK_MOE,) * 4)[-len(layers) :],
        num_nextn_predict_layers=0,
    )


@pytest.mark.parametrize(
    "layers, sizes, seq, fsdp, has_documents",
    [
        # A layer that hashes, and a unit of two that repeats.
        (REPEATING, dict(data=2, context=2, tensor=2), 48, True, False),
        ((CSA,), dict(context=2, tensor=2), 20, False, True),
        # No window of HCA is complete, and `tensor` does not split tokens.
        ((HCA, CSA), dict(expert=2, context=2, tensor=2), 6, False, False),
        ((CSA,), dict(expert=2, tensor=2), 47, True, False),
    ],
    ids=["all-tokens", "documents", "short", "odd"],
)
def test_values_over_a_mesh_equal_those_of_one_device(
    layers, sizes, seq, fsdp, has_documents
):
    config = config_of(*layers)
    model = random_model(config, seed=6)
    tokens = random_tokens(1, seq, batch=4, config=config)
    segment_ids = ()
    if has_documents:
        segment_ids = (np.repeat([[2, 0, 5]], [11, 2, seq - 13], axis=1).repeat(4, 0),)
    expected = observe(model, tokens, *segment_ids)
    sharded = dsv4.shard(model, make_mesh(**sizes), fsdp=fsdp)
    found = observe(sharded, tokens, *segment_ids)
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def check(found, expected):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if jnp.issubdtype(found.dtype, jnp.integer):
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, 2e-5, 2e-5)

    jax.tree.map(check, found, expected)
    for one, other in zip(found[1], expected[1]):
        np.testing.assert_array_equal(one.routing.counts, other.routing.counts)


def shown(values):
    """What has a gradient."""
    routing = values.routing
    sums = values.attention.log_sum_exp
    return values.streams, sums, sums**2, routing.scores, routing.weights


@functools.cache
def with_gradients():
    config = config_of(CSA)
    tokens = random_tokens(2, 22, batch=4, config=config)

    def loss(model):
        _, (values,) = model.observe(tokens, remat=True)
        return sum(
            jnp.vdot(normal(x.shape, seed), x) for seed, x in enumerate(shown(values))
        )

    run = quick_jit(jax.value_and_grad(loss, allow_int=True))
    model = random_model(config, seed=6)
    return run, model, run(model)


@pytest.mark.parametrize("sizes", [dict(data=2), dict(context=2, tensor=2)], ids=str)
def test_gradients_through_values_equal_those_of_one_device(sizes):
    run, model, (expected, gradients) = with_gradients()
    sharded = dsv4.shard(model, make_mesh(**sizes), fsdp="data" in sizes)
    found, found_gradients = run(sharded)
    np.testing.assert_allclose(found, expected, 1e-5)
    assert_equal_gradients(found_gradients, gradients, 1e-5, floor=1e-3)
