"""How the next token is chosen, against the distributions that arguments describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.generation.sampling import Sampling, stop_ids

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
NUM_DRAWS = 40_000


def sampling(**changes):
    fields = dict(
        temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, key=jax.random.key(0)
    )
    return Sampling("call", **(fields | changes))


def frequencies(**changes):
    logits = jnp.asarray(np.tile(LOGITS, (NUM_DRAWS, 1)))
    drawn = jax.jit(lambda s, x, key: s(x, key))(
        sampling(**changes), logits, jax.random.key(7)
    )
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


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-46])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    rules = sampling(temperature=temperature)
    logits = jnp.array([[-3.0, -1.0, -2.0], [5.0, -9.0, 4.0]])
    key = jax.random.key(1)
    np.testing.assert_array_equal(rules(logits, key), [1, 0])
    ahead = jnp.stack([logits, logits[::-1]], axis=1)
    cut = rules.cut(logits)
    stays, following = rules.verify(ahead, jnp.array([1, 1]), cut, key)
    np.testing.assert_array_equal(stays, [True, False])
    np.testing.assert_array_equal(following, [0, 0])


def test_any_count_of_the_likeliest_may_be_asked_for():
    assert sampling(top_k=2**40).top_k == sampling(top_k=None).top_k


DRAFT_LOGITS = np.log(np.array([0.3, 0.1, 0.1, 0.45, 0.05], np.float32))
NEXT_LOGITS = np.log(np.array([0.1, 0.1, 0.6, 0.1, 0.1], np.float32))


@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"temperature": 0.7}])
def test_speculation_does_not_change_the_distribution(changes):
    rules = sampling(**changes)
    rows = [
        jnp.asarray(np.tile(x, (NUM_DRAWS, 1)))
        for x in (LOGITS, NEXT_LOGITS, DRAFT_LOGITS)
    ]

    @jax.jit
    def draw(rules, now, after, guess, key):
        draft_key, verify_key = jax.random.split(key)
        draft = rules(guess, draft_key)
        logits = jnp.stack([now, after], axis=1)
        stays, following = rules.verify(logits, draft, rules.cut(guess), verify_key)
        left = [jax.nn.softmax(rules.cut(x[:1]))[0] for x in (now, after, guess)]
        return draft, stays, following, left

    draft, stays, following, left = draw(rules, *rows, jax.random.key(3))
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
    greedy = sampling(temperature=0.0, key=None)
    logits = jnp.array([[[0.0, 2, 1], [5, 1, 3]], [[0.0, 2, 1], [5, 1, 3]]])
    stays, following = greedy.verify(logits, jnp.array([1, 2]), None, None)
    assert stays.tolist() == [True, False]
    assert following.tolist() == [0, 1]


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equal_ones():
    greedy = sampling(temperature=0.0, key=None)
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
    ({"key": None}, "key"),
]


@pytest.mark.parametrize("changes, name", BAD)
def test_values_out_of_range_are_refused(changes, name, without_shape_checks):
    with pytest.raises(ValueError, match=rf"call\({name}="):
        sampling(**changes)


def test_stop_ids_are_one_several_or_none():
    assert stop_ids("call", None, 5).shape == (0,)
    assert stop_ids("call", 3, 5).tolist() == [3]
    assert stop_ids("call", (3, 0), 5).tolist() == [3, 0]
    for bad in (5, -1, [1, 7], 2.0, True):
        with pytest.raises(ValueError, match=r"call\(eos_id="):
            stop_ids("call", bad, 5)
