"""How the next token is chosen, against the distributions that arguments describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import Sampling

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
NUM_DRAWS = 40_000


draw = jax.jit(lambda sampling, logits, key: sampling(logits, key))


def frequencies(**changes):
    logits = jnp.asarray(np.tile(LOGITS, (NUM_DRAWS, 1)))
    drawn = draw(Sampling(**changes), logits, jax.random.key(7))
    return np.bincount(drawn, minlength=5) / NUM_DRAWS


CASES = {
    "everything": ({}, [0.05, 0.4, 0.1, 0.25, 0.2]),
    "temperature": ({"temperature": 0.5}, [0.0025, 0.16, 0.01, 0.0625, 0.04]),
    "top-k": ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
    "top-k above the vocabulary": ({"top_k": 9}, [0.05, 0.4, 0.1, 0.25, 0.2]),
    # 0.4 + 0.25 are less than 0.7, with 0.2 they are more.
    "top-p": ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2]),
    "top-p takes no more than it needs": ({"top_p": 0.64}, [0, 0.4, 0, 0.25, 0]),
    "tiny top-p": ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
    "min-p": ({"min_p": 0.45}, [0, 0.4, 0, 0.25, 0.2]),
    "min-p of 1": ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
    # Of the three likeliest: 0.47, 0.29 and 0.24.
    "top-k, then top-p": ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_have_the_distribution_that_is_left(case):
    changes, weights = CASES[case]
    expected = np.array(weights) / np.sum(weights)
    found = frequencies(**changes)
    assert (found[expected == 0] == 0).all()
    # Four standard deviations of a mean over the draws.
    bound = 4 * np.sqrt(expected * (1 - expected) / NUM_DRAWS) + 1e-12
    assert (np.abs(found - expected) <= bound).all(), found


VOCAB = 129_280
NEUTRAL = [
    dict(top_p=1.0),
    dict(top_k=VOCAB),
    dict(min_p=0.0),
    dict(temperature=1.0),
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=str)
def test_neutral_values_leave_logits_to_the_bit(changes):
    normal = np.random.default_rng(0).normal(size=(1, VOCAB))
    logits = jnp.asarray(np.array([[3], [6], [10]]) * normal, jnp.float32)
    np.testing.assert_array_equal(cut(Sampling(**changes), logits), logits)


cut = jax.jit(lambda sampling, logits: sampling.cut(logits))


def test_top_p_just_below_1_cuts():
    logits = jnp.asarray([[0.0, -1.0, -12.0]])
    found = cut(Sampling(top_p=0.999), logits)
    np.testing.assert_array_equal(found, [[0.0, -1.0, -np.inf]])


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-46])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    rules = Sampling(temperature=temperature)
    logits = jnp.array([[-3.0, -1.0, -2.0], [5.0, -9.0, 4.0]])
    key = jax.random.key(1)
    np.testing.assert_array_equal(rules(logits, key), [1, 0])
    ahead = jnp.stack([logits, logits[::-1]], axis=1)
    cut = rules.cut(logits)
    stays, following = rules.verify(ahead, jnp.array([1, 1]), cut, key)
    np.testing.assert_array_equal(stays, [True, False])
    np.testing.assert_array_equal(following, [0, 0])


def test_any_count_of_the_likeliest_may_be_asked_for():
    assert Sampling(top_k=2**40).top_k == Sampling(top_k=None).top_k


DRAFT_LOGITS = np.log(np.array([0.3, 0.1, 0.1, 0.45, 0.05], np.float32))
NEXT_LOGITS = np.log(np.array([0.1, 0.1, 0.6, 0.1, 0.1], np.float32))


@jax.jit
def draw_and_verify(rules, now, after, guess, key):
    draft_key, verify_key = jax.random.split(key)
    draft = rules(guess, draft_key)
    logits = jnp.stack([now, after], axis=1)
    stays, following = rules.verify(logits, draft, rules.cut(guess), verify_key)
    left = [jax.nn.softmax(rules.cut(x[:1]))[0] for x in (now, after, guess)]
    return draft, stays, following, left


@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"temperature": 0.7}])
def test_speculation_does_not_change_the_distribution(changes):
    rows = [
        jnp.asarray(np.tile(x, (NUM_DRAWS, 1)))
        for x in (LOGITS, NEXT_LOGITS, DRAFT_LOGITS)
    ]
    found = draw_and_verify(Sampling(**changes), *rows, jax.random.key(3))
    draft, stays, following, left = found
    now, after, guess = np.asarray(left, "f8")

    def assert_drawn_from(tokens, expected):
        found = np.bincount(tokens, minlength=5) / len(tokens)
        bound = 4 * np.sqrt(expected * (1 - expected) / len(tokens)) + 1e-6
        assert (np.abs(found - expected) <= bound).all(), (found, expected)

    assert_drawn_from(np.where(stays, draft, following), now)
    assert_drawn_from(following[stays], after)
    # As often as the two distributions overlap.
    overlap = np.minimum(now, guess).sum()
    assert abs(np.mean(stays) - overlap) < 4 / np.sqrt(NUM_DRAWS)


def test_greedy_speculation_keeps_a_draft_that_is_the_likeliest():
    greedy = Sampling(temperature=0)
    logits = jnp.array([[[0.0, 2, 1], [5, 1, 3]], [[0.0, 2, 1], [5, 1, 3]]])
    stays, following = greedy.verify(logits, jnp.array([1, 2]), None, None)
    assert stays.tolist() == [True, False]
    assert following.tolist() == [0, 1]


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equal_ones():
    greedy = Sampling(temperature=0)
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    assert greedy(logits, None).tolist() == [1, 0]


BAD = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 2.0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": float("nan")}, "min_p"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": jnp.ones(2)}, "temperature"),
]


@pytest.mark.parametrize("changes, name", BAD)
def test_values_out_of_range_are_refused(changes, name, without_shape_checks):
    with pytest.raises(ValueError, match=rf"^Sampling\({name}="):
        Sampling(**changes)
