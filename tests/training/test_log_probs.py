"""Log-probabilities of tokens against whole logits, and against decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.models import (
    DIVISIBLE,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)
from tests.sharded import assert_equal_gradients, make_mesh

CONFIG = small_config(
    **DIVISIBLE,
    num_hidden_layers=1,
    layer_types=(CSA,),
    compress_ratios=(4,),
    mlp_layer_types=(TOPK_MOE,),
    num_nextn_predict_layers=0,
    hc_sinkhorn_iters=2,
)
BATCH, SEQ, CHUNK = 2, 30, 7  # 60 tokens in 9 chunks
IDS = np.repeat([[4, 2, -1]], [17, 9, 4], axis=1).repeat(BATCH, 0)
model = functools.cache(lambda: random_model(CONFIG, 3))
tokens = functools.cache(lambda: random_tokens(1, SEQ, BATCH, CONFIG))


@functools.cache
def step(chunk=CHUNK):
    def loss(model, segment_ids):
        found = dsv4.token_log_probs(
            model, tokens(), segment_ids, chunk=chunk, remat=True
        )
        return jnp.sum(jnp.exp(found)), found

    return quick_jit(jax.grad(loss, has_aux=True, allow_int=True))


@quick_jit
def plain_step(model, segment_ids, is_target):
    """From the log-softmax of all logits."""

    def loss(model):
        every = jax.nn.log_softmax(model(tokens(), segment_ids)[:, :-1])
        found = jnp.take_along_axis(every, tokens()[:, 1:, None], axis=-1)[..., 0]
        found = jnp.where(is_target, found, 0)
        return jnp.sum(jnp.exp(found)), found

    return jax.grad(loss, has_aux=True, allow_int=True)(model)


@functools.cache
def expected():
    is_target = (IDS[:, 1:] == IDS[:, :-1]) & (IDS[:, 1:] >= 0)
    return plain_step(model(), IDS, is_target)


@pytest.mark.slow
def test_they_are_those_of_whole_logits():
    gradients, wanted = expected()
    found_gradients, found = step()(model(), IDS)
    assert found.shape == (BATCH, SEQ - 1) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, 1e-5, 1e-6)
    assert not found[:, 16].any() and not found[:, 25:].any()
    assert_equal_gradients(found_gradients, gradients, 1e-5, floor=1e-2)


@pytest.mark.slow
def test_they_are_those_of_decoding():
    prompt = tokens()[:, :11]
    out = dsv4.generate(
        model(),
        prompt,
        max_new_tokens=SEQ - 11,
        sampling=dsv4.Sampling(),
        key=jax.random.key(0),
    )
    whole = np.concatenate([prompt, out.tokens], axis=1)
    log_probs = quick_jit(lambda model, tokens: dsv4.token_log_probs(model, tokens))
    found = log_probs(model(), whole)[:, 10:]
    np.testing.assert_allclose(found, out.log_probabilities, 0, 1e-5)


@pytest.mark.slow
def test_they_are_the_same_over_a_mesh():
    gradients, wanted = expected()
    sharded = dsv4.shard(model(), make_mesh(context=2, tensor=2))
    found_gradients, found = step(chunk=4)(sharded, IDS)
    np.testing.assert_allclose(found, wanted, 1e-5, 1e-6)
    assert_equal_gradients(found_gradients.model, gradients, 1e-4, floor=1e-2)


def test_streams_that_are_there_are_not_computed_again():
    generator, shape = np.random.default_rng(2), (BATCH, SEQ, 4, CONFIG.hidden_size)
    streams = jnp.asarray(generator.standard_normal(shape).astype(np.float32))
    found = dsv4.token_log_probs(model(), tokens(), streams=streams)
    nats = model().cross_entropy(model().collapse(streams[:, :-1]), tokens()[:, 1:])
    np.testing.assert_allclose(found, -nats, 1e-5, 1e-6)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((tokens()[:, :1],), {}, "token_log_probs.*at least two tokens"),
        ((tokens() + 96,), {}, "token_log_probs.*token id .* outside"),
        ((tokens(), IDS[:, 1:]), {}, "token_log_probs.*segment_ids of shape"),
        ((tokens(),), dict(chunk=0), "token_log_probs.*chunk=0"),
        ((tokens(),), dict(streams=np.ones((2, 9, 4, 60))), "streams of shape"),
        ((tokens(),), dict(experts=[]), r"DeepSeekV4\(experts='0 of them'"),
    ],
)
def test_what_does_not_fit_is_refused(args, options, message, without_shape_checks):
    abstract = abstract_model(CONFIG, jnp.float32)
    with pytest.raises(ValueError, match=message):
        dsv4.token_log_probs(abstract, *args, **options)
