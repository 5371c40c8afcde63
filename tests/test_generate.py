"""Generation against the whole forward pass and transformers' own."""

import functools
import importlib

import jax
import numpy as np
import pytest
import torch

import dsv4_eqx as dsv4
from tests.models import pair, random_model, random_tokens, small_config

SMALL = functools.cache(lambda: random_model(small_config()))
NEW = 7
module = importlib.import_module("dsv4_eqx.generate")  # the function has its name


@functools.cache
def greedy(lengths, new=NEW):
    prompts = random_tokens(5, max(lengths), len(lengths))
    out = dsv4.generate(SMALL(), prompts, max_new_tokens=new, lengths=np.array(lengths))
    return prompts, out


@pytest.mark.slow
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass():
    lengths = (13, 1, 6)
    prompts, out = greedy(lengths)
    forward = jax.jit(lambda model, tokens: model(tokens))
    rows = np.zeros((len(lengths), max(lengths) + NEW), np.int32)
    for row, length in enumerate(lengths):
        rows[row, :length] = prompts[row, :length]
        rows[row, length : length + NEW] = out.tokens[row]
    logits = forward(SMALL(), rows)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for row, length in enumerate(lengths):
        seen = log_probabilities[row, length - 1 : length - 1 + NEW]
        np.testing.assert_array_equal(out.tokens[row], seen.argmax(-1))
        np.testing.assert_allclose(
            out.log_probabilities[row], seen.max(-1), rtol=0, atol=5e-5
        )
    np.testing.assert_array_equal(out.lengths, NEW)


@pytest.mark.slow
def test_stream_gives_the_same_tokens_one_by_one():
    lengths = (13, 1, 6)
    prompts, out = greedy(lengths)
    stop = int(out.tokens[1, 2])
    stream = dsv4.generate_stream(
        SMALL(),
        prompts,
        max_new_tokens=NEW,
        lengths=np.array(lengths),
        eos_id=[stop, 96],
    )
    streamed = np.stack(list(stream), axis=1)
    stopped = dsv4.generate(
        SMALL(),
        prompts,
        max_new_tokens=NEW,
        lengths=np.array(lengths),
        eos_id=[stop, 96],
    )
    for row in range(len(lengths)):
        count = int(stopped.lengths[row])
        ends = np.flatnonzero(np.isin(out.tokens[row], [stop, 96]))
        assert count == (ends[0] + 1 if len(ends) else NEW)
        np.testing.assert_array_equal(streamed[row, :count], out.tokens[row, :count])
        assert (streamed[row, count:] == -1).all()
        np.testing.assert_array_equal(
            stopped.tokens[row, :count], out.tokens[row, :count]
        )
        assert (stopped.tokens[row, count:] == 0).all()


@pytest.mark.slow
def test_other_prompts_and_numbers_compile_nothing_again():
    greedy((13, 1, 6))
    prompts = random_tokens(8, 16, 3)

    def compiled():
        return [
            function._cache_size()
            for function in (module._read_part, module._first_state)
        ]

    before = compiled()
    dsv4.generate(SMALL(), prompts[:, :14], max_new_tokens=NEW)
    assert compiled() == before


@pytest.mark.slow
def test_sampling_depends_on_the_key_alone():
    prompts = random_tokens(9, 5, 2)
    draw = functools.partial(
        dsv4.generate, SMALL(), prompts, max_new_tokens=NEW, top_p=0.9
    )
    one = draw(key=jax.random.key(1), temperature=1.5)
    again = draw(key=jax.random.key(1), temperature=1.5)
    other = draw(key=jax.random.key(2), temperature=1.5)
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert (one.tokens != other.tokens).any()


REFUSALS = {
    "no new tokens": (dict(max_new_tokens=0), "max_new_tokens=0"),
    "beyond the last position": (dict(max_new_tokens=1020), "1020 are beyond"),
    "an empty prompt": (dict(lengths=np.array([5, 0])), "row 1 has no token"),
    "no key": (dict(temperature=1.0), "key=None"),
    "a token that there is not": (dict(eos_id=97), "eos_id=97"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_refused_before_anything_is_compiled(what):
    changes, message = REFUSALS[what]
    prompts = random_tokens(9, 5, 2)
    arguments = dict(max_new_tokens=NEW) | changes
    before = module._read_part._cache_size()
    with pytest.raises(ValueError, match=message):
        dsv4.generate(SMALL(), prompts, **arguments)
    assert module._read_part._cache_size() == before


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers():
    reference, model = pair(0)
    lengths = np.array([1, 5, 8, 9, 16, 23, 31, 40, 47, 64])
    prompts = random_tokens(0, max(lengths), len(lengths))
    out = dsv4.generate(model, prompts, max_new_tokens=64, lengths=lengths)
    for row, length in enumerate(lengths):
        ids = torch.tensor(prompts[row : row + 1, :length]).long()
        with torch.no_grad():
            expected = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),  # or it takes 0 for padding
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(out.tokens[row], expected[0, length:])
