"""The loss over the next tokens against the plain one, from whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.models import (
    DIVISIBLE,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)
from tests.sharded import assert_equal_gradients, make_mesh
from tests.tiers import tiers

CONFIG = small_config(
    **DIVISIBLE,
    num_hidden_layers=1,
    layer_types=(SLIDING,),
    compress_ratios=(0,),
    mlp_layer_types=(TOPK_MOE,),
)
WITHOUT_BLOCK = small_config(num_nextn_predict_layers=0)
BATCH, SEQ, CHUNK = 4, 22, 9  # 88 tokens in 10 chunks, the last one with padding
# Documents of one token and two, a whole row, and padding before and after.
IDS = np.stack(
    [
        np.repeat([4, 2, 9], [1, 2, 19]),
        np.repeat([0], SEQ),
        np.repeat([-7, 3, -1], [2, 15, 5]),
        np.repeat([5, 6], [11, 11]),
    ]
)
MASK = np.random.default_rng(7).random((BATCH, SEQ)) < 0.7
MASK[1, 3:] = False  # one target is left: of the prediction block, none or one
CASES = {
    "rows": (None, None),
    "documents": (IDS, None),
    "mask": (None, MASK),
    "both": (IDS, MASK),
}

model = functools.cache(lambda: random_model(CONFIG, 3))
tokens = functools.cache(lambda: random_tokens(1, SEQ, BATCH, CONFIG))


def targets(segment_ids, mask, steps):
    """Positions with a target so many steps ahead, found one by one."""
    found = np.zeros((BATCH, SEQ), bool)
    for row in range(BATCH):
        for at in range(SEQ - steps):
            to = at + steps
            counts = mask is None or mask[row, to]
            if segment_ids is not None:
                own = set(segment_ids[row, at : to + 1])
                counts = counts and len(own) == 1 and min(own) >= 0
            found[row, at] = counts
    return found


@quick_jit
def plain_step(model, segment_ids, are_targets, weight):
    """The loss from whole logits, with both means, and its gradients."""

    def mean_nats(logits, is_target, steps):
        right = jnp.asarray(tokens()[:, steps:, None])
        nats = -jax.nn.log_softmax(logits[:, : SEQ - steps])
        nats = jnp.take_along_axis(nats, right, axis=-1)[..., 0]
        is_target = is_target[:, : SEQ - steps]
        return jnp.sum(nats, where=is_target) / is_target.sum().astype(nats.dtype)

    def loss(model):
        both = model.multi_token_logits(tokens(), segment_ids)
        now, after = map(mean_nats, both, are_targets, (1, 2))
        return now + weight * after, (now, after)

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)(model)


@functools.cache
def chunked_step(chunk=CHUNK):
    def loss(model, segment_ids, mask, weight):
        return dsv4.next_token_loss(
            model, tokens(), segment_ids, mask, mtp_weight=weight, chunk=chunk
        )

    return quick_jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))


@functools.cache
def expected(case):
    are_targets = [targets(*CASES[case], steps) for steps in (1, 2)]
    result = plain_step(model(), CASES[case][0], are_targets, 0.3)
    return result, *(is_target.sum() for is_target in are_targets)


@pytest.mark.parametrize(
    "case", tiers(["rows", "both"], in_ci=["rows"], quick=["both"])
)
def test_loss_and_gradients_equal_those_of_whole_logits(case):
    ((loss, (now, after)), gradients), num_targets, num_ahead = expected(case)
    (found, parts), found_gradients = chunked_step()(model(), *CASES[case], 0.3)
    np.testing.assert_allclose(found, loss, 1e-5)
    np.testing.assert_allclose(parts.next_token, now, 1e-5)
    np.testing.assert_allclose(parts.ahead, after, 1e-5)
    assert (parts.num_targets, parts.num_ahead) == (num_targets, num_ahead)
    assert num_targets > num_ahead > 0
    assert_equal_gradients(found_gradients, gradients, 1e-5, floor=1e-2)


@pytest.mark.slow
def test_loss_over_a_mesh_equals_that_of_one_device():
    ((loss, means), gradients), num_targets, num_ahead = expected("both")
    mesh = make_mesh(data=2, context=2, tensor=2)
    sharded = dsv4.shard(model(), mesh, fsdp=True)
    step = chunked_step(chunk=5)  # of the tokens of a device
    (found, parts), found_gradients = step(sharded, *CASES["both"], 0.3)
    np.testing.assert_allclose(found, loss, 1e-5)
    np.testing.assert_allclose([parts.next_token, parts.ahead], means, 1e-5)
    assert (parts.num_targets, parts.num_ahead) == (num_targets, num_ahead)
    assert_equal_gradients(found_gradients.model, gradients, 1e-4, floor=1e-2)


def test_rows_without_a_target_cost_nothing_and_give_no_nan():
    nothing = np.zeros((BATCH, SEQ), bool)
    (loss, parts), gradients = chunked_step()(model(), IDS, nothing, 0.3)
    assert (loss, parts.num_targets, parts.num_ahead) == (0, 0, 0)
    for gradient in jax.tree.leaves(gradients):
        assert gradient.dtype == jax.dtypes.float0 or not np.asarray(gradient).any()
    # With other rows, the mean is over theirs.
    mask = nothing.copy()
    mask[3] = True
    (_, parts), gradients = chunked_step()(model(), IDS, mask, 0.3)
    assert (parts.num_targets, parts.num_ahead) == (20, 18)
    assert np.isfinite(gradients.unembedding).all() and gradients.unembedding.any()


def test_the_block_runs_only_where_its_loss_counts():
    without = abstract_model(WITHOUT_BLOCK, jnp.float32)
    loss, parts = jax.eval_shape(dsv4.next_token_loss, without, tokens())
    assert parts.ahead is None and parts.num_ahead is None and loss.shape == ()
    for weight in (0.1, jnp.ones(())):
        with pytest.raises(ValueError, match="next_token_loss: .* 0 prediction blocks"):
            jax.eval_shape(
                lambda w: dsv4.next_token_loss(without, tokens(), mtp_weight=w), weight
            )


@pytest.mark.parametrize("case", CASES)
def test_streams_that_are_there_are_not_computed_again(case):
    generator, shape = np.random.default_rng(2), (BATCH, SEQ, 4, CONFIG.hidden_size)
    streams = jnp.asarray(generator.standard_normal(shape).astype(np.float32))
    loss, parts = dsv4.next_token_loss(
        model(), tokens(), *CASES[case], streams=streams, chunk=CHUNK
    )
    is_target = targets(*CASES[case], 1)
    following = np.roll(tokens(), -1, axis=1)
    nats = model().cross_entropy(model().collapse(streams), following)
    np.testing.assert_allclose(loss, np.asarray(nats)[is_target].mean(), 1e-6)
    assert parts.next_token == loss and parts.num_targets == is_target.sum()


def test_few_logits_are_held_at_a_time():
    config = small_config(
        vocab_size=129_280,
        hidden_size=8,
        max_position_embeddings=8192,
        num_nextn_predict_layers=0,
    )
    model = abstract_model(config, jnp.bfloat16)
    shape = (1, 8192, config.hc_mult, config.hidden_size)
    tokens = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def loss(model, streams, tokens):
        return dsv4.next_token_loss(model, tokens, streams=streams)[0]

    step = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), allow_int=True))
    streams = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    memory = step.lower(model, streams, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 400e6


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((tokens()[:, :1],), {}, "at least two tokens"),
        ((tokens()[0],), {}, r"\(batch, seq\)"),
        ((tokens() + 96,), {}, "token id .* outside"),
        ((tokens(), IDS[:, 1:]), {}, "segment_ids of shape"),
        ((tokens(), IDS % 3), {}, "comes back"),
        ((tokens(), None, MASK[:, 1:]), {}, r"the mask .* not bool\[4, 21\]"),
        ((tokens(), None, MASK.astype(int)), {}, r"the mask .* not int64"),
        ((tokens(),), dict(chunk=0), "chunk=0"),
        ((tokens(),), dict(mtp_weight=-0.1), "mtp_weight=-0.1"),
        ((tokens(),), dict(streams=np.ones((BATCH, 9, 4, 60))), "streams of shape"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    args, options, message, without_shape_checks
):
    abstract = abstract_model(CONFIG, jnp.float32)
    with pytest.raises(ValueError, match=rf"next_token_loss.*{message}"):
        dsv4.next_token_loss(abstract, *args, **options)
