"""Generation by real models, against the whole forward pass and transformers."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dsv4_eqx as dsv4
from tests.models import QUICKLY, M, pair, random_model, random_tokens, small_config

NEW = 17
LENGTHS = np.array([41, 17, 33, 3, 40])
PROMPTS = random_tokens(5, 41, 5)


@functools.cache
def two_words():
    """A model of which a draft is right about as often as not."""
    model = random_model(small_config())
    up = np.random.default_rng(4).normal(size=model.unembedding.shape[1])
    weight = np.zeros_like(model.unembedding)
    weight[3], weight[5] = up, -up
    return eqx.tree_at(lambda model: model.unembedding, model, jnp.asarray(weight))


@functools.cache
def generated(**arguments):
    return dsv4.generate(
        two_words(), PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, **arguments
    )


def drafts_that_stay(drafts, length):
    """How many drafts of a row are judged, and how many of them are right."""
    drafted, accepted, at = 0, 0, length + 1
    while at <= length + NEW - 2:
        drafted, is_right = drafted + 1, bool(drafts[at])
        accepted, at = accepted + is_right, at + 1 + is_right
    return drafted, accepted


@pytest.mark.slow
def test_tokens_and_drafts_are_those_of_the_whole_forward_pass():
    plain, out = generated(), generated(speculative=True)
    rows = np.zeros((5, 41 + NEW), np.int32)
    for row, prompt, length, new in zip(rows, PROMPTS, LENGTHS, plain.tokens):
        row[: length + NEW] = [*prompt[:length], *new]
    run = jax.jit(lambda m, x: m.multi_token_logits(x), compiler_options=QUICKLY)
    logits, ahead = map(np.asarray, run(two_words(), rows))
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for row, length in enumerate(LENGTHS):
        seen = log_probabilities[row, length - 1 : length - 1 + NEW]
        for found in (plain, out):
            np.testing.assert_array_equal(found.tokens[row], seen.argmax(-1))
            error = found.log_probabilities[row] - seen.max(-1)
            assert np.abs(error).max() < 5e-5
        is_right = np.zeros(len(rows[row]), bool)
        is_right[2:] = ahead[row, :-1].argmax(-1) == rows[row, 2:]
        counts = int(out.num_drafted[row]), int(out.num_accepted[row])
        assert counts == drafts_that_stay(is_right, length)
    assert 0.2 < out.num_accepted.sum() / out.num_drafted.sum() < 0.9
    # Both go on alike from what they keep.
    np.testing.assert_array_equal(out.cache.lengths, plain.cache.lengths)
    extend = jax.jit(lambda model, *args: model.extend(*args), compiler_options=QUICKLY)
    last = plain.tokens[:, -1:]
    hidden = [extend(two_words(), last, x.cache)[0] for x in (plain, out)]
    np.testing.assert_allclose(*hidden, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_a_long_prompt_is_read_in_parts_by_both_blocks(monkeypatch):
    at_once = generated(speculative=True)
    monkeypatch.setattr("dsv4_eqx.generation.prompt._LARGEST_PART", 32)
    in_parts = generated.__wrapped__(speculative=True)
    np.testing.assert_array_equal(in_parts.tokens, at_once.tokens)
    np.testing.assert_array_equal(in_parts.num_accepted, at_once.num_accepted)


def of_transformers(reference, prompts, new):
    """Greedy tokens after prompts of one length."""
    ids, threads = torch.tensor(prompts).long(), torch.get_num_threads()
    torch.set_num_threads(1)  # so small sums wait for one another's threads
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # or it takes 0 for padding
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    torch.set_num_threads(threads)
    return out[:, prompts.shape[1] :].numpy()


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers():
    reference, model = pair(0, small_config())
    lengths = np.array([1, 8, 9, 23, 47])
    prompts = random_tokens(0, max(lengths), len(lengths))
    out = dsv4.generate(model, prompts, max_new_tokens=48, lengths=lengths)
    for row, length in enumerate(lengths):
        expected = of_transformers(reference, prompts[row : row + 1, :length], 48)
        np.testing.assert_array_equal(out.tokens[row], expected[0])


@pytest.mark.slow
def test_greedy_tokens_after_long_prompts_are_those_of_transformers():
    """Past the end of a heavily compressed window, and of choosing all CSA entries."""
    reference, model = pair(0, M)
    lengths, new = np.array([500, 2040]), 24
    _, heavy, sparse, _ = M.compress_ratios
    assert 500 < 4 * heavy < 520 and 2040 < sparse * M.index_topk < 2060
    prompts = random_tokens(0, max(lengths), len(lengths))
    out = dsv4.generate(model, prompts, max_new_tokens=new, lengths=lengths)
    for rows in (slice(0, 1), slice(1, 2)):
        expected = of_transformers(reference, prompts[rows, : lengths[rows][0]], new)
        np.testing.assert_array_equal(out.tokens[rows], expected)
