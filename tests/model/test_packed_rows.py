"""Rows of several documents: each is what it is alone, forward and backward.

Alone, documents are the first tokens of rows of their own, and transformers sees each
without anything else.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, TOPK_MOE
from tests.models import pair, quick_jit, random_model, small_config
from tests.sharded import assert_equal_gradients

# Windows of 9, 16 and 4 tokens, an index_topk of 5; the prediction block slides.
CONFIG = small_config(
    num_hidden_layers=2,
    layer_types=(HCA, CSA),
    compress_ratios=(16, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE),
)
# Documents shorter than every window and one token around each; where CSA selects, and
# longer than a block of queries. None begins where a window would.
ROWS = (
    (1, 3, 16, 4, 5, 17, 41, 1, 15, 57),
    (33, 7, 8, 9, 70, 2, 31),
)
SEQ, LONGEST = 160, 70
PLACES = [
    (row, sum(lengths[:i]), length)
    for row, lengths in enumerate(ROWS)
    for i, length in enumerate(lengths)
]


def packed_ids(names=lambda row, i: 3 * i - 2):
    rows = [
        np.repeat([names(row, i) for i in range(len(lengths))], lengths)
        for row, lengths in enumerate(ROWS)
    ]
    return np.stack(rows).astype(np.int32)


def packed_tokens(seed=0):
    generator = np.random.default_rng(seed)
    shape = len(ROWS), SEQ
    return generator.integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def alone(packed):
    """Each document first in a row of its own, then zeros."""
    rows = np.zeros((len(PLACES), LONGEST, *packed.shape[2:]), packed.dtype)
    for own, (row, start, length) in zip(rows, PLACES, strict=True):
        own[:length] = packed[row, start : start + length]
    return rows


def cotangents(seed=1):
    """Of both logits in packed rows; zero where the second means nothing."""
    generator = np.random.default_rng(seed)
    shape = len(ROWS), SEQ, CONFIG.vocab_size
    first, second = (generator.standard_normal(shape, np.float32) for _ in range(2))
    for row, start, length in PLACES:
        second[row, start + length - 1] = 0
    return first, second


@functools.partial(quick_jit, static_argnames="remat")
def step(model, tokens, segment_ids, cotangents, remat=False):
    """Gradients of both logits' product with the cotangents, and the logits."""

    def loss(model):
        first, second = model.multi_token_logits(tokens, segment_ids, remat=remat)
        total = jnp.sum(first * cotangents[0])
        return total + jnp.sum(second * cotangents[1][:, :-1]), (first, second)

    return jax.grad(loss, has_aux=True, allow_int=True)(model)


@functools.cache
def model():
    """With the weights of transformers' model, and a prediction block beside."""

    def main(model):
        parts = model.embedding, model.layers, model.head, model.norm
        return *parts, model.unembedding

    return eqx.tree_at(main, random_model(CONFIG), main(pair(0, CONFIG)[1]))


@functools.cache
def packed_step():
    return step(model(), packed_tokens(), packed_ids(), cotangents())


@functools.cache
def alone_step():
    given = tuple(map(alone, cotangents()))
    return step(model(), alone(packed_tokens()), None, given)


def test_logits_of_each_document_are_those_of_the_document_alone():
    _, (first, second) = packed_step()
    _, (first_alone, second_alone) = alone_step()
    for own, (row, start, length) in enumerate(PLACES):
        end = start + length
        np.testing.assert_allclose(
            first[row, start:end], first_alone[own, :length], rtol=0, atol=5e-5
        )
        np.testing.assert_allclose(
            second[row, start : end - 1],
            second_alone[own, : length - 1],
            rtol=0,
            atol=5e-5,
        )


def test_gradients_are_the_sum_of_those_of_the_documents_alone():
    found, expected = packed_step()[0], alone_step()[0]
    # How the head weighs streams that are nearly parallel has next to no gradient.
    assert_equal_gradients(found, expected, 5e-5, floor=0.1)


def test_logits_of_each_document_are_those_of_transformers():
    tokens, (_, (logits, _)) = packed_tokens(), packed_step()
    for row, start, length in PLACES:
        document = torch.tensor(tokens[row : row + 1, start : start + length])
        with torch.no_grad():
            expected = pair(0, CONFIG)[0](document.long()).logits[0].numpy()
        found = logits[row, start : start + length]
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_no_document_sees_another():
    before = packed_step()
    others = packed_tokens(3)
    for row, start, length in PLACES[3:12:4]:
        tokens = others.copy()
        tokens[row, start : start + length] = packed_tokens()[
            row, start : start + length
        ]
        _, after = step(model(), tokens, packed_ids(), cotangents())
        for new, old, end in zip(after, before[1], (length, length - 1)):
            new, old = (x[row, start : start + end] for x in (new, old))
            np.testing.assert_array_equal(new, old)


def test_ids_are_names_alone_and_one_that_comes_back_is_another_document_under_jit():
    _, expected = packed_step()
    extremes = np.array([0, -1, np.iinfo("i4").max, np.iinfo("i4").min, 7], "i4")
    for names in (lambda row, i: -i, lambda row, i: extremes[i % 5 - row]):
        ids = packed_ids(names)
        _, found = step(model(), packed_tokens(), ids, cotangents())
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.exhaustive
def test_recomputed_layers_have_the_same_gradients():
    given = model(), packed_tokens(), packed_ids(), cotangents()
    found, _ = step(*given, remat=True)
    assert_equal_gradients(found, packed_step()[0], 5e-5, floor=0.1)


@pytest.mark.slow
def test_a_schedule_that_repeats_is_the_same_in_packed_rows():
    config = small_config(
        num_hidden_layers=2,
        layer_types=(CSA,) * 2,
        compress_ratios=(4,) * 2,
        mlp_layer_types=(TOPK_MOE,) * 2,
        num_nextn_predict_layers=0,
    )
    repeating = random_model(config)
    run = quick_jit(lambda model, *args: model(*args))
    found = run(repeating, packed_tokens(), packed_ids())
    expected = run(repeating, alone(packed_tokens()))
    for own, (row, start, length) in enumerate(PLACES):
        logits = found[row, start : start + length]
        np.testing.assert_allclose(logits, expected[own, :length], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1, 1, 2]] * 2, "integers, not list"),
        (np.ones((2, 3), np.float32), "integers, not float32"),
        (np.ones((2, 3), bool), "integers, not bool"),
        (np.ones((2, 4), np.int32), r"shape \(2, 4\) are not .* shape \(2, 3\)"),
        (np.ones(3, np.int32), r"shape \(3,\) are not .* shape \(2, 3\)"),
        (np.array([[4, 4, 4], [5, 6, 5]]), r"id 5 comes back at \[1, 2\] .* its own"),
        (jnp.array([[0, 1, 0], [0, 0, 0]]), r"id 0 comes back at \[0, 2\]"),
    ],
)
def test_what_is_no_document_of_each_token_is_refused(
    ids, message, without_shape_checks
):
    tokens = np.zeros((2, 3), np.int32)
    for call, name in (
        (model().__call__, "DeepSeekV4"),
        (model().hidden, "DeepSeekV4"),
        (model().streams, "DeepSeekV4"),
        (model().multi_token_logits, "multi_token_logits"),
    ):
        with pytest.raises(ValueError, match=f"{name}: segment.*{message}"):
            call(tokens, ids)
