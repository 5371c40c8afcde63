"""The balance loss against the formula, document by document."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.models import quick_jit, random_model, random_tokens, relative, small_config
from tests.sharded import make_mesh

EXPERTS, SLOTS, BATCH, SEQ = 7, 3, 3, 13
# Documents of one token and more, a whole row, and padding.
IDS = np.stack(
    [
        np.repeat([4, 2, 9], [1, 5, 7]),
        np.repeat([0], SEQ),
        np.repeat([-2, 3, -1], [2, 8, 3]),
    ]
)


def random_routing(seed=0, batch=BATCH, seq=SEQ):
    generator = np.random.default_rng(seed)
    scores = generator.uniform(0.1, 2, (batch, seq, EXPERTS)).astype(np.float32)
    # Some experts are more popular than others.
    noise = generator.gumbel(size=scores.shape) + np.linspace(0, 2, EXPERTS)
    experts = np.argsort(-noise, axis=-1)[..., :SLOTS].astype(np.int32)
    weights = np.ones(experts.shape, np.float32)
    return dsv4.Routing(*map(jnp.asarray, (experts, weights, scores)))


def documents(segment_ids):
    """Row and tokens of each document that is no padding."""
    for row, ids in enumerate(segment_ids):
        for document in np.unique(ids[ids >= 0]):
            yield row, np.flatnonzero(ids == document)


def expected_loss(routing, segment_ids, alpha):
    """The formula in float64."""
    experts, scores = np.asarray(routing.experts), np.asarray(routing.scores, "f8")
    losses = []
    for row, at in documents(segment_ids):
        share = scores[row, at] / scores[row, at].sum(axis=1, keepdims=True)
        counts = np.bincount(experts[row, at].ravel(), minlength=EXPERTS)
        load = EXPERTS / (SLOTS * len(at)) * counts
        losses.append(alpha * np.sum(load * share.mean(axis=0)))
    return np.mean(losses)


def expected_load(routing, is_token):
    counts = np.bincount(np.asarray(routing.experts)[is_token].ravel())
    return counts.max() / (counts.sum() / EXPERTS)


@pytest.mark.parametrize("segment_ids", [None, IDS, IDS.astype(np.int64) * 2**40])
def test_loss_and_load_equal_the_formula(segment_ids):
    routings = random_routing(1), random_routing(2)
    loss, parts = dsv4.balance_loss(routings, segment_ids, alpha=0.02)
    ids = np.zeros((BATCH, SEQ), int) if segment_ids is None else segment_ids
    expected = [expected_loss(routing, ids, 0.02) for routing in routings]
    np.testing.assert_allclose(parts.losses, expected, 1e-6)
    np.testing.assert_allclose(loss, sum(expected), 1e-6)
    loads = [expected_load(routing, ids >= 0) for routing in routings]
    np.testing.assert_allclose(parts.largest_load, loads, 1e-6)
    assert min(loads) > 1.2 and loss.dtype == jnp.float32


def test_equal_loads_give_alpha():
    seq = 2 * EXPERTS
    experts = np.arange(BATCH * seq * SLOTS).reshape(BATCH, seq, SLOTS) % EXPERTS
    scores = random_routing(3, seq=seq).scores
    routing = dsv4.Routing(jnp.asarray(experts), jnp.ones(experts.shape), scores)
    loss, parts = dsv4.balance_loss(routing)
    np.testing.assert_allclose(loss, 1e-4, 3e-7)
    np.testing.assert_array_equal(parts.largest_load, [1])


def test_rows_of_documents_give_the_mean_over_documents_alone():
    routing = random_routing(4)

    def alone(scores):
        found = []
        for row, at in documents(IDS):
            own = routing.experts[row, at], routing.weights[row, at], scores[row, at]
            own = dsv4.Routing(*(x[None] for x in own))
            found.append(dsv4.balance_loss(own)[0])
        return jnp.mean(jnp.stack(found))

    def together(scores):
        own = dsv4.Routing(routing.experts, routing.weights, scores)
        return dsv4.balance_loss(own, IDS)[0]

    wanted, wanted_gradient = quick_jit(jax.value_and_grad(alone))(routing.scores)
    found, gradient = quick_jit(jax.value_and_grad(together))(routing.scores)
    np.testing.assert_allclose(found, wanted, 1e-6)
    assert relative(gradient, wanted_gradient) <= 1e-6
    assert not np.asarray(gradient)[IDS < 0].any()


def test_gradient_of_a_router_equals_finite_differences():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        router = dsv4.TopKRouter(5, EXPERTS, SLOTS, std=0.5, key=keys[0])
        bias = 0.3 * jax.random.normal(keys[1], EXPERTS)
        router = eqx.tree_at(
            lambda router: (router.weight, router.bias),
            router,
            (router.weight.astype(jnp.float64), bias),
        )
        x = jax.random.normal(keys[2], (BATCH * SEQ, 5))
        direction = jax.random.normal(keys[3], router.weight.shape)

        def loss(router):
            routing = router(x, jnp.zeros(len(x), jnp.int32))
            rows = jax.tree.map(lambda x: x.reshape(BATCH, SEQ, -1), routing)
            return dsv4.balance_loss(rows, IDS, alpha=1.0)[0], routing.experts

        step = quick_jit(jax.value_and_grad(loss, has_aux=True))

        def moved(size):
            weight = router.weight + size * direction
            return step(eqx.tree_at(lambda router: router.weight, router, weight))[0]

        _, gradient = step(router)
        (above, experts), (below, others) = moved(1e-6), moved(-1e-6)
        np.testing.assert_array_equal(experts, others)
        slope = jnp.vdot(gradient.weight, direction)
        assert above.dtype == jnp.float64 and abs(slope) > 1e-3
        np.testing.assert_allclose((above - below) / 2e-6, slope, 1e-5)
        assert not gradient.bias.any()


def test_scores_that_underflow_give_no_nan():
    routing = random_routing(5)
    scores = routing.scores.at[1].set(0)

    def loss(scores):
        own = dsv4.Routing(routing.experts, routing.weights, scores)
        return dsv4.balance_loss(own)[0]

    for found in jax.value_and_grad(loss)(scores):
        assert np.isfinite(found).all()


def test_padding_alone_costs_nothing():
    loss, parts = dsv4.balance_loss(random_routing(6), np.full((BATCH, SEQ), -1))
    assert loss == 0 and parts.largest_load == 0


def test_layers_that_hash_take_no_part():
    # One layer first, then a pair of layers twice; `last` too.
    types = (SLIDING, HCA, CSA, HCA, CSA, SLIDING)
    moes = (HASH_MOE, TOPK_MOE, HASH_MOE, TOPK_MOE, HASH_MOE, TOPK_MOE)
    config = small_config(
        num_hidden_layers=6,
        layer_types=types,
        compress_ratios=(0, 16, 4, 16, 4, 0),
        mlp_layer_types=moes,
    )
    model = abstract_model(config, jnp.float32)
    assert model.layers.num_repeats == 2 and len(model.layers.last) == 1
    streams = jnp.zeros((1, 1, 1, 1))
    routings = [random_routing(i) for i in range(6)]
    layers = tuple(dsv4.LayerValues(streams, None, x) for x in routings)
    found = dsv4.scored_routings(model, layers)
    assert [id(x) for x in found] == [id(routings[i]) for i in (1, 3, 5)]
    with pytest.raises(ValueError, match=r"scored_routings\(layers='5 layers'\): .* 6"):
        dsv4.scored_routings(model, layers[1:])
    with pytest.raises(ValueError, match=r"scored_routings\(model='Layers'\)"):
        dsv4.scored_routings(model.layers, layers)


@pytest.mark.slow
@pytest.mark.parametrize("segment_ids", [None, np.repeat([[5, 1, -1]], [9, 8, 3], 1)])
def test_loss_over_a_mesh_equals_that_of_one_device(segment_ids):
    config = small_config(
        vocab_size=96,
        num_hidden_layers=1,
        layer_types=(SLIDING,),
        compress_ratios=(0,),
        mlp_layer_types=(TOPK_MOE,),
        num_nextn_predict_layers=0,
    )
    model, tokens = random_model(config, 1), random_tokens(1, 20, 4, config)
    ids = () if segment_ids is None else (segment_ids.repeat(4, 0),)

    @quick_jit
    def step(model):
        def loss(model):
            _, layers = model.observe(tokens, *ids)
            routings = dsv4.scored_routings(model, layers)
            return dsv4.balance_loss(routings, *ids, alpha=1.0)

        return jax.value_and_grad(loss, has_aux=True, allow_int=True)(model)

    (loss, parts), gradients = step(model)
    sharded = dsv4.shard(model, make_mesh(data=2, context=2))
    (found, found_parts), found_gradients = step(sharded)
    np.testing.assert_allclose(found, loss, 1e-6)
    np.testing.assert_array_equal(found_parts.largest_load, parts.largest_load)
    for get in (
        lambda model: model.layers.first[0].moe.router.weight,
        lambda model: model.embedding,
    ):
        assert relative(get(found_gradients.model), get(gradients)) <= 1e-5


def without_scores():
    routing = random_routing()
    return dsv4.Routing(routing.experts, routing.weights)


@pytest.mark.parametrize(
    "routings, segment_ids, options, message",
    [
        (without_scores(), None, {}, "a router gives no scores"),
        ((), None, {}, r"routings=\(\)\): must be at least one"),
        ([random_routing(), None], None, {}, "routings='NoneType'"),
        (random_routing(), IDS[:, 1:], {}, r"segment_ids of shape \(3, 12\)"),
        (random_routing(), np.where(IDS == 9, 4, IDS), {}, "segment id 4 comes back"),
        (random_routing(), IDS * 0.5, {}, "array of integers, not float64"),
        (random_routing(), None, dict(alpha=-1), "alpha=-1"),
        (
            jax.tree.map(lambda x: x[0], random_routing()),
            None,
            {},
            r"shape \(13, 7\) .* dimensions batch and seq",
        ),
    ],
)
def test_what_is_no_routing_of_the_tokens_is_refused(
    routings, segment_ids, options, message, without_shape_checks
):
    with pytest.raises(ValueError, match=f"balance_loss.*{message}"):
        dsv4.balance_loss(routings, segment_ids, **options)
