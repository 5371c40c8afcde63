"""Rows of several documents over a mesh against the same rows on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HCA, TOPK_MOE
from tests.models import quick_jit
from tests.sharded import (
    BATCH,
    assert_equal_gradients,
    make_mesh,
    normal,
    random_module,
)
from tests.tiers import tiers

# One layer of each kind that compresses, windows of 8 and of 4 tokens, and a prediction
# block that does not.
CONFIG = dataclasses.replace(
    dsv4.Config.tiny(),
    num_hidden_layers=2,
    layer_types=(HCA, CSA),
    compress_ratios=(8, 4),
    mlp_layer_types=(TOPK_MOE, TOPK_MOE),
    hc_sinkhorn_iters=2,
)
SEQ = 48  # over 8 devices, 6 tokens each: shorter than windows, and between them
# 37 tokens are 9 entries for an index_topk of 8. Documents begin on the first and last
# tokens of devices and between, and lie on one device or on all.
ROWS = (
    (1, 37, 10),
    (5, 1, 6, 36),
    (48,),
    (3, 4, 5, 7, 8, 9, 12),
    (47, 1),
    (15, 16, 17),
    (1,) * 11 + (37,),
    (18, 30),
)


def segment_ids():
    rows = [np.repeat(np.arange(len(lengths)), lengths) for lengths in ROWS]
    return np.stack(rows).astype(np.int32)


def tokens(seq=SEQ):
    ids = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (BATCH, seq))
    return ids.astype(np.int32)


@functools.cache
def plain():
    return random_module(lambda _, key: dsv4.DeepSeekV4(CONFIG, key=key))


@quick_jit
def step(model, tokens, segment_ids):
    """Gradients of the logits' product with something, and the logits."""

    def loss(model):
        first, second = model.multi_token_logits(tokens, segment_ids)
        # Of a document's last token the second means nothing.
        is_meant = (segment_ids[:, 1:] == segment_ids[:, :-1])[..., None]
        second = jnp.where(is_meant, second, 0)
        total = jnp.sum(first * normal(first.shape, 5))
        return total + jnp.sum(second * normal(second.shape, 6)), (first, second)

    return jax.grad(loss, has_aux=True, allow_int=True)(model)


@functools.cache
def expected():
    return step(plain(), tokens(), segment_ids())


MESHES = [
    dict(context=4, tensor=2),
    dict(data=2, expert=2, context=2, fsdp=True),
    dict(data=2, expert=2, tensor=2, fsdp=True),
]


@pytest.mark.parametrize("sizes", tiers(MESHES, in_ci=MESHES[:1]), ids=str)
def test_logits_and_gradients_of_packed_rows_equal_those_of_one_device(sizes):
    sizes = dict(sizes)
    fsdp = sizes.pop("fsdp", False)
    model = dsv4.shard(plain(), make_mesh(**sizes), fsdp=fsdp)
    grads, logits = step(model, tokens(), segment_ids())
    expected_grads, expected_logits = expected()
    for found, wanted in zip(logits, expected_logits, strict=True):
        np.testing.assert_allclose(found, wanted, 0, 2e-5 * np.abs(wanted).max())
    # How the head weighs streams that are nearly parallel has next to no gradient.
    assert_equal_gradients(grads.model, expected_grads, 1e-4, floor=0.1)


def test_documents_on_a_mesh_are_judged_before_anything_runs(without_shape_checks):
    model = dsv4.shard(plain(), make_mesh(context=4, tensor=2))
    for ids, message in (
        (segment_ids()[:, 1:], "segment_ids of shape"),
        (segment_ids() % 2, "segment id 0 comes back at"),
    ):
        for call in (model, model.multi_token_logits):
            with pytest.raises(ValueError, match=message):
                call(tokens(), ids)
