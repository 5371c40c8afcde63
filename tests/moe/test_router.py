"""Both routers against transformers; ties, extreme logits and the hash table."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx import HashRouter, TopKRouter
from dsv4_eqx.config.kinds import HASH_MOE, TOPK_MOE
from dsv4_eqx.model.parts import make_router
from dsv4_eqx.numerics.product import project
from tests.models import relative
from tests.reference import reference_config
from tests.tiny import tiny_config

CONFIG = tiny_config(hidden_size=15)  # 7 experts, 3 of them for each token
TOKENS = 11


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def top_k_routers(seed=0, scale=1.0):
    theirs = hf.DeepseekV4TopKRouter(reference_config(CONFIG))
    weight, bias = normal((7, 15), seed, scale), normal(7, seed + 1, 0.5)
    theirs.weight.data = torch.tensor(weight)
    theirs.e_score_correction_bias.copy_(torch.tensor(bias))
    ours = make_router(CONFIG, TOPK_MOE, key=jax.random.key(0))
    arrays = jnp.asarray(weight), jnp.asarray(bias)
    return eqx.tree_at(lambda m: (m.weight, m.bias), ours, arrays), theirs


def hash_routers(seed=0, scale=1.0):
    """Rows are drawn freely: many name an expert twice or three times."""
    theirs = hf.DeepseekV4HashRouter(reference_config(CONFIG))
    table = np.random.default_rng(seed).integers(0, 7, (CONFIG.vocab_size, 3))
    weight = normal((7, 15), seed, scale)
    theirs.weight.data = torch.tensor(weight)
    theirs.tid2eid.copy_(torch.tensor(table))
    ours = make_router(CONFIG, HASH_MOE, key=jax.random.key(0))
    arrays = jnp.asarray(weight), jnp.asarray(table, jnp.int32)
    return eqx.tree_at(lambda m: (m.weight, m.table), ours, arrays), theirs


def token_ids(seed=0):
    ids = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, TOKENS)
    return ids.astype(np.int32)


def dense(experts, weights):
    """`[tokens, 7]`: the weight of each expert; torch does not sort what it selects."""
    experts, weights = np.asarray(experts), np.asarray(weights)
    out = np.zeros((len(experts), 7), weights.dtype)
    np.add.at(out, (np.arange(len(experts))[:, None], experts), weights)
    return out


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_top_k_router_equals_transformers(seed):
    ours, theirs = top_k_routers(seed)
    x = normal((TOKENS, 15), seed + 2)
    routing = ours(jnp.asarray(x), jnp.asarray(token_ids()))
    _, weights, experts = theirs(torch.tensor(x))
    np.testing.assert_array_equal(
        np.sort(routing.experts, axis=-1), np.sort(experts, axis=-1)
    )
    close(
        dense(routing.experts, routing.weights), dense(experts, weights.detach()), 1e-6
    )
    close(routing.weights.sum(axis=-1), np.full(TOKENS, 1.5), 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_hash_router_equals_transformers(seed):
    ours, theirs = hash_routers(seed)
    x, ids = normal((TOKENS, 15), seed + 2), token_ids(seed)
    routing = ours(jnp.asarray(x), jnp.asarray(ids))
    _, weights, experts = theirs(torch.tensor(x), torch.tensor(ids))
    np.testing.assert_array_equal(routing.experts, experts)
    close(routing.weights, weights.detach(), 1e-6)


def test_a_row_that_repeats_an_expert_counts_it_each_time():
    ours, _ = hash_routers()
    ours = eqx.tree_at(lambda m: m.table, ours, ours.table.at[5].set(2))
    ours = eqx.tree_at(lambda m: m.table, ours, ours.table.at[6].set([2, 4, 2]))
    x = jnp.asarray(normal((1, 15)))
    close(ours(x, jnp.array([5])).weights, np.full((1, 3), 0.5), 1e-6)
    scores = np.sqrt(np.log1p(np.exp(np.asarray(x @ ours.weight.T, np.float64))))
    chosen = scores[:, [2, 4, 2]]
    expected = 1.5 * chosen / chosen.sum()
    close(ours(x, jnp.array([6])).weights, expected, 1e-6)


def test_gradients_equal_transformers():
    x, ids, by_expert = normal((TOKENS, 15), 3), token_ids(), normal((TOKENS, 7), 4)
    rows = np.arange(TOKENS)[:, None]
    for make in (top_k_routers, hash_routers):
        ours, theirs = make()

        def loss(router, x):
            routing = router(x, jnp.asarray(ids))
            return jnp.sum(
                routing.weights * jnp.asarray(by_expert)[rows, routing.experts]
            )

        grads = jax.grad(loss, argnums=(0, 1), allow_int=True)(ours, jnp.asarray(x))
        tensor = torch.tensor(x, requires_grad=True)
        ids_too = (torch.tensor(ids),) if make is hash_routers else ()
        _, weights, experts = theirs(tensor, *ids_too)
        (weights * torch.tensor(by_expert)[rows, experts]).sum().backward()
        assert relative(grads[0].weight, theirs.weight.grad) < 5e-4
        assert relative(grads[1], tensor.grad) < 5e-4


@pytest.mark.parametrize("make", [top_k_routers, hash_routers])
def test_scores_shown_are_those_that_select(make):
    ours, _ = make()
    x = jnp.asarray(normal((TOKENS, 15), 3, scale=30.0))
    scores = jnp.sqrt(jax.nn.softplus(project(x, ours.weight, wide=True)))
    assert (scores == 0).any()
    routing = ours(x, jnp.asarray(token_ids()))
    np.testing.assert_array_equal(routing.scores, scores)


def test_bias_only_selects():
    ours, _ = top_k_routers()
    x, ids = jnp.asarray(normal((TOKENS, 15), 3)), jnp.asarray(token_ids())
    forced = eqx.tree_at(lambda m: m.bias, ours, ours.bias.at[4].set(100.0))
    routing = forced(x, ids)
    assert (routing.experts[:, 0] == 4).all()
    scores = jnp.sqrt(jax.nn.softplus(x @ ours.weight.T))
    chosen = jnp.take_along_axis(scores, routing.experts, axis=-1)
    close(routing.scores, scores, 1e-6)
    close(routing.weights, 1.5 * chosen / chosen.sum(axis=-1, keepdims=True), 1e-6)

    def loss(router):
        return jnp.sum(jnp.sin(router(x, ids).weights))

    np.testing.assert_array_equal(jax.grad(loss)(ours).bias, np.zeros(7))
    shifted = eqx.tree_at(lambda m: m.bias, ours, ours.bias + 1.0)
    np.testing.assert_array_equal(shifted(x, ids).weights, ours(x, ids).weights)


def test_given_experts_replace_the_choice_alone(without_shape_checks):
    ours, _ = top_k_routers()
    x, ids = jnp.asarray(normal((TOKENS, 15), 3)), jnp.asarray(token_ids())
    order = np.random.default_rng(5).random((TOKENS, 7)).argsort(axis=1)
    experts = order[:, :3].astype(np.int32)
    chosen, given = ours(x, ids), ours(x, ids, jnp.asarray(experts))
    np.testing.assert_array_equal(given.experts, experts)
    np.testing.assert_array_equal(given.scores, chosen.scores)
    scores = np.take_along_axis(np.asarray(chosen.scores), experts, axis=1)
    close(given.weights, 1.5 * scores / scores.sum(axis=1, keepdims=True), 1e-6)
    np.testing.assert_array_equal(ours(x, ids, chosen.experts).weights, chosen.weights)
    for wrong in (experts[1:], experts + 1, experts[:, [0, 1, 1]]):
        with pytest.raises(ValueError, match="TopKRouter: "):
            ours(x, ids, jnp.asarray(wrong))
    hashed, _ = hash_routers()
    wanted = hashed(x, ids).experts
    np.testing.assert_array_equal(hashed(x, ids, jnp.asarray(experts)).experts, wanted)


def test_ties_go_to_the_lower_index():
    ours, _ = top_k_routers()
    ours = eqx.tree_at(lambda m: m.bias, ours, jnp.zeros(7))
    zeros = jnp.zeros((TOKENS, 15))
    routing = ours(zeros, jnp.asarray(token_ids()))
    np.testing.assert_array_equal(routing.experts, np.tile([0, 1, 2], (TOKENS, 1)))
    close(routing.weights, np.full((TOKENS, 3), 0.5), 1e-6)
    bias = jnp.array([0, 1, 0, 1, 1, 1, 0.0])
    tied = eqx.tree_at(lambda m: m.bias, ours, bias)
    experts = tied(zeros, jnp.asarray(token_ids())).experts
    np.testing.assert_array_equal(experts, np.tile([1, 3, 4], (TOKENS, 1)))


@pytest.mark.parametrize("make", [top_k_routers, hash_routers])
@pytest.mark.parametrize("logit", [-200.0, -100.0, -88.0, -20.0, 0.0, 88.0, 200.0])
def test_equal_extreme_logits_are_finite(make, logit):
    # All scores underflow, or all overflow: a plain quotient is 0/0 or inf/inf.
    ours, _ = make()
    ours = eqx.tree_at(lambda m: m.weight, ours, jnp.full((7, 15), logit / 15))
    x, ids = jnp.ones((TOKENS, 15)), jnp.asarray(token_ids())

    def loss(router, x):
        routing = router(x, ids)
        return jnp.sum(jnp.sin(routing.weights)) + jnp.sum(routing.scores)

    grads = jax.grad(loss, argnums=(0, 1), allow_int=True)(ours, x)
    close(ours(x, ids).weights, np.full((TOKENS, 3), 0.5), 1e-5)
    assert jnp.isfinite(grads[0].weight).all() and jnp.isfinite(grads[1]).all()


@pytest.mark.parametrize("make", [top_k_routers, hash_routers])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mixed_extreme_logits_are_finite(make, dtype):
    ours, _ = make()
    weight = jnp.linspace(-200, 200, 7)[:, None] * jnp.ones((7, 15)) / 15
    ours = eqx.tree_at(lambda m: m.weight, ours, weight.astype(dtype))
    signs = np.array([1.0, -1.0, 0.5, -0.5, 0.1, -0.1, 0, 1, 1, -1, -1], np.float32)
    x = jnp.asarray(np.tile(signs[:, None], (1, 15))).astype(dtype)
    ids = jnp.asarray(token_ids())

    def loss(router, x):
        return jnp.sum(jnp.sin(router(x, ids).weights))

    weights = ours(x, ids).weights
    assert jnp.isfinite(weights).all() and (weights >= 0).all()
    close(weights.sum(axis=-1), np.full(TOKENS, 1.5), 1e-5)
    grads = jax.grad(loss, argnums=(0, 1), allow_int=True)(ours, x)
    assert jnp.isfinite(grads[0].weight).all() and jnp.isfinite(grads[1]).all()


def test_log_score_is_exact_around_its_switch():
    ours, _ = hash_routers()
    ours = eqx.tree_at(lambda m: m.table, ours, jnp.tile(jnp.arange(3), (97, 1)))
    ours = eqx.tree_at(lambda m: m.weight, ours, jnp.eye(7, 15))
    rng = np.random.default_rng(0)
    logits = rng.uniform(-22, -18, (TOKENS, 15)).astype(np.float32)
    exact = np.sqrt(np.log1p(np.exp(logits[:, :3].astype(np.float64))))
    expected = 1.5 * exact / exact.sum(axis=-1, keepdims=True)
    weights = ours(jnp.asarray(logits), jnp.asarray(token_ids())).weights
    close(weights, expected, 3e-6)  # float32 logits of 20 carry 1e-6 of their own


@pytest.mark.parametrize("vocab, slots, experts", [(97, 3, 7), (129, 5, 8), (3, 2, 11)])
@pytest.mark.parametrize("seed", range(3))
def test_hash_table_spreads_evenly_without_repeats(vocab, slots, experts, seed):
    key = jax.random.key(seed)
    router = HashRouter(5, experts, slots, vocab_size=vocab, key=key)
    table = np.asarray(router.table)
    assert table.shape == (vocab, slots) and table.dtype == np.int32
    assert table.min() >= 0 and table.max() < experts
    assert all(len(set(row)) == slots for row in table)
    for counted in (table, *table.T):
        counts = np.bincount(counted.ravel(), minlength=experts)
        assert counts.max() - counts.min() <= 1


def test_hash_table_depends_on_the_key_only():
    tables = [
        make_router(CONFIG, HASH_MOE, key=jax.random.key(s)).table for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


@pytest.mark.parametrize("make", [top_k_routers, hash_routers])
def test_bfloat16_is_routed_in_float32(make):
    ours, _ = make()
    low = eqx.tree_at(lambda m: m.weight, ours, ours.weight.astype(jnp.bfloat16))
    wide = eqx.tree_at(lambda m: m.weight, ours, low.weight.astype(jnp.float32))
    x = jnp.asarray(normal((TOKENS, 15), 3)).astype(jnp.bfloat16)
    ids = jnp.asarray(token_ids())
    routing, expected = low(x, ids), wide(x.astype(jnp.float32), ids)
    assert routing.weights.dtype == jnp.float32
    np.testing.assert_array_equal(routing.experts, expected.experts)
    close(routing.weights, expected.weights, 1e-6)


@pytest.mark.parametrize("router", [TopKRouter, HashRouter])
def test_more_slots_than_experts_are_refused(router):
    sizes = {} if router is TopKRouter else dict(vocab_size=11)
    with pytest.raises(ValueError, match=r"num_slots=4\): must be at most num_exp.*=3"):
        router(5, 3, 4, **sizes, key=jax.random.key(0))
