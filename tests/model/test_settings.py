"""JAX's settings that a user may have, and what others compile a model for."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import (
    Sampling,
    balance_loss,
    generate,
    next_token_loss,
    scored_routings,
    shard,
    use_kernels,
)
from tests.models import random_model, random_tokens, small_config
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
