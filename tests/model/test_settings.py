"""JAX's settings that a user may have, and what others compile a model for."""

import functools

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv4_eqx import (
    Sampling,
    balance_loss,
    generate,
    next_token_loss,
    scored_routings,
    shard,
    use_kernels,
)
from tests.checkpoint.saving import small_model
from tests.models import forward_once, random_model, random_tokens, small_config
from tests.sharded import make_mesh
from tests.tiers import tiers

# Sizes that two devices divide.
CONFIG = small_config(
    vocab_size=96, n_routed_experts=6, num_attention_heads=4, o_groups=2
)


@functools.cache
def model():
    return random_model(CONFIG)


@pytest.fixture
def without_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("form", tiers(["cpu", "tpu", "reference"], in_ci=["cpu"]))
def test_no_operation_promotes_ranks(form, without_rank_promotion):
    tokens = random_tokens(0, 133, config=CONFIG)
    segment_ids = np.repeat([[0, 4, 7]], [1, 32, 100], axis=1).repeat(2, 0)

    def loss(model, *segment_ids):
        streams, layers = model.observe_streams(tokens, *segment_ids, remat=True)
        logits, ahead = model.multi_token_logits(tokens, *segment_ids)
        nats = model.cross_entropy(model.collapse(streams), tokens, tokens > 3)
        options = dict(mask=tokens > 3, streams=streams, mtp_weight=0.3, chunk=60)
        mean, _ = next_token_loss(model, tokens, *segment_ids, **options)
        balance, _ = balance_loss(scored_routings(model, layers), *segment_ids)
        return nats.sum() + logits.sum() + ahead.sum() + mean + balance

    def extend(model):
        hidden, cache = model.extend(tokens, model.init_cache(2, 140))
        _, lookahead = model.lookahead(tokens[:, :3], cache)
        return hidden, lookahead.keep(jnp.array([1, 2]))

    with use_kernels(form):
        for args in ((), (segment_ids,)):
            jax.eval_shape(jax.grad(loss, allow_int=True), model(), *args)
        jax.eval_shape(extend, model())


@pytest.mark.slow
def test_no_operation_promotes_ranks_over_a_mesh(without_rank_promotion):
    mesh = make_mesh(expert=2, context=2, tensor=2)
    sharded = shard(model(), mesh)
    tokens = random_tokens(0, 48, config=CONFIG)
    segment_ids = np.repeat([[0, 4, 7]], [1, 30, 17], axis=1).repeat(2, 0)

    def loss(sharded, *segment_ids):
        hidden, _ = sharded.observe(tokens, *segment_ids)
        return sharded.cross_entropy(hidden, tokens, tokens > 3).sum()

    for args in ((), (segment_ids,)):
        jax.eval_shape(jax.grad(loss, allow_int=True), sharded, *args)


@pytest.mark.exhaustive
def test_text_is_generated_where_ranks_are_not_promoted(without_rank_promotion):
    sampling = Sampling(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01)
    options = dict(max_new_tokens=3, sampling=sampling, key=jax.random.key(0))
    prompts = random_tokens(1, 7, config=CONFIG)
    out = generate(model(), prompts, speculative=True, **options)
    assert out.tokens.shape == (2, 3)


@pytest.mark.parametrize("shape", ["rows, 9", "2, seq"])
def test_symbolic_sizes_are_refused(shape):
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.int32)
    with pytest.raises(ValueError, match="symbolic shape .* export one for each"):
        jax.export.export(jax.jit(lambda tokens: model()(tokens)))(tokens)


def test_what_explicit_axes_split_is_refused_and_may_be_called_with_auto_axes():
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    model, tokens = small_model(), random_tokens(0, 7, config=small_model().config)
    expected = forward_once(model, tokens)
    with jax.set_mesh(mesh):
        whole = jax.device_put(model, NamedSharding(mesh, P()))
        assert jax.eval_shape(forward_once, whole, tokens).shape == expected.shape
        rows = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        columns = NamedSharding(mesh, P(None, "model"))
        split = eqx.tree_at(
            lambda model: model.embedding,
            whole,
            jax.device_put(whole.embedding, columns),
        )
        for method in (whole, jax.jit(lambda tokens: whole(tokens)), whole.hidden):
            with pytest.raises(
                ValueError, match="tokens is split over data, .*auto_ax"
            ):
                method(rows)
        with pytest.raises(ValueError, match="model.embedding is split over model, "):
            split(tokens)
        logits = jax.sharding.auto_axes(forward_once, out_sharding=P("data"))(
            split, rows
        )
    assert logits.sharding.spec == P("data", None, None)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
