"""The prediction block on its own cache, against the whole sequence at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import LENGTH, quick_jit, random_model, random_tokens, small_config


def test_any_parts_give_what_the_whole_gives():
    model, tokens = random_model(small_config()), random_tokens(3)

    @quick_jit
    def whole(model, tokens):
        return model.streams(tokens)[:, :-1], model.multi_token_logits(tokens)[1]

    @quick_jit
    def extend(model, streams, tokens, cache, lengths):
        mtp, embedded = model.mtp[0], model.embedding[tokens]
        hidden, cache = mtp.extend(streams, embedded, tokens, cache, lengths)
        return model.unembed(hidden), cache

    streams, expected = map(np.asarray, whole(model, tokens))
    following = tokens[:, 1:]
    cache = model.mtp[0].init_cache(2, LENGTH, jnp.float32)
    found, done = np.full_like(expected, np.nan), np.zeros(2, int)
    for counts in [(5, 3), (0, 7), (4, 4), (7, 0)] + [(7, 7)] * 6:
        lengths = np.minimum(counts, LENGTH - 1 - done)
        part = np.zeros((2, 7), np.int32)
        padded = np.full((2, 7, *streams.shape[2:]), 1e3, np.float32)
        for row, (first, count) in enumerate(zip(done, lengths)):
            part[row, :count] = following[row, first : first + count]
            padded[row, :count] = streams[row, first : first + count]
        logits, cache = extend(model, padded, part, cache, lengths.astype(np.int32))
        for row, (first, count) in enumerate(zip(done, lengths)):
            found[row, first : first + count] = logits[row, :count]
        done += lengths
    assert (done == LENGTH - 1).all()
    np.testing.assert_array_equal(cache.lengths, done)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_streams_of_other_positions_are_refused(without_shape_checks):
    model, lengths = random_model(small_config()), np.array([3, 3], np.int32)
    streams = jnp.zeros((2, 1, 4, 60))
    given = streams, jnp.zeros((2, 3), jnp.int32), model.init_mtp_cache(2, 9), lengths
    with pytest.raises(ValueError, match=r"streams of shape \(2, 1, 4, 60\)"):
        model.extend_mtp(*given)


def test_hidden_activations_of_the_block_are_those_of_its_logits():
    model, tokens = random_model(small_config()), random_tokens(4, 9)

    @quick_jit
    def both(model, tokens):
        hidden = model.hidden_ahead(model.streams(tokens), tokens)
        return model.unembed(hidden), model.multi_token_logits(tokens)[1]

    found, expected = both(model, tokens)
    assert found.shape == (2, 9, 97)
    np.testing.assert_array_equal(found[:, :-1], expected)


def test_what_does_not_fit_the_prediction_block_is_refused(without_shape_checks):
    model = random_model(small_config())
    without = random_model(small_config(num_nextn_predict_layers=0))
    streams = np.zeros((2, 3, *model.head.base.shape, 60), np.float32)
    tokens, lengths = np.zeros((2, 3), np.int32), np.array([3, 1], np.int32)
    cache = model.init_mtp_cache(2, 9)
    for call, message in (
        (lambda: without.init_mtp_cache(2, 9), "init_mtp_cache: .* 0 prediction"),
        (lambda: model.init_mtp_cache(-1, 9), r"init_mtp_cache\(batch=-1"),
        (lambda: model.init_mtp_cache(2, 0), r"init_mtp_cache\(capacity=0"),
        (
            lambda: without.extend_mtp(streams, tokens, cache, lengths),
            "extend_mtp: .* 0 prediction",
        ),
        (
            lambda: without.hidden_ahead(streams, tokens),
            "hidden_ahead: .* 0 prediction",
        ),
        (
            lambda: model.hidden_ahead(streams[:, :1], tokens[:, :1]),
            "hidden_ahead: give at least two tokens",
        ),
        (
            lambda: model.hidden_ahead(streams[:, 1:], tokens),
            r"hidden_ahead: streams of shape \(2, 2, .* tokens of shape \(2, 3\)",
        ),
        (
            lambda: model.extend_mtp(streams, tokens + 97, cache, lengths),
            r"extend_mtp: token id 97 at \[0, 0\]",
        ),
        (
            lambda: model.extend_mtp(streams[:1], tokens[:1], cache, lengths[:1]),
            "extend_mtp: the cache is a MTPCache",
        ),
        (
            lambda: model.extend_mtp(streams, tokens, model.init_cache(2, 9), lengths),
            "extend_mtp: the cache is a Cache of None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_counts_that_cannot_be_are_refused(without_shape_checks):
    model = random_model(small_config())
    streams = np.zeros((2, 3, *model.head.base.shape, 60), np.float32)
    tokens, cache = np.zeros((2, 3), np.int32), model.mtp[0].init_cache(2, 9, "float32")
    for counts, message in (
        (np.array([3, 4]), r"lengths\[1\] is 4: the row has 0 to 3 tokens"),
        (np.array([1, 2, 3]), "each of the 2 rows"),
        (None, "integers, not NoneType"),
    ):
        with pytest.raises(ValueError, match="MTP.extend: .*" + message):
            model.mtp[0].extend(streams, streams[:, :, 0], tokens, cache, counts)
