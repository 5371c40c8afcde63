"""Room in a cache: less than a window, rounded up, and more than there was."""

import functools

import jax
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from dsv4_eqx.generation.capacity import rounded_capacity
from tests.models import QUICKLY, random_model, random_tokens, relative, small_config
from tests.tiers import tiers

WINDOW, LENGTH = 9, 21
extend = jax.jit(
    lambda model, *args: model.extend(*args)[::-1], compiler_options=QUICKLY
)


@functools.cache
def model():
    """Two layers, which are scanned."""
    config = small_config(
        num_hidden_layers=2,
        layer_types=(CSA, CSA),
        compress_ratios=(4, 4),
        mlp_layer_types=(TOPK_MOE, TOPK_MOE),
        num_nextn_predict_layers=0,
    )
    assert config.sliding_window == WINDOW
    return random_model(config)


@functools.cache
def whole():
    """Tokens, and what the whole forward pass has at each."""
    tokens = random_tokens(4, LENGTH, config=model().config)
    hidden = jax.jit(lambda m, x: m.hidden(x), compiler_options=QUICKLY)
    return tokens, np.asarray(hidden(model(), tokens))


def one_by_one(cache, first, last):
    """The cache after more tokens, each of which has what the whole pass has."""
    tokens, hidden = whole()
    for i in range(first, last):
        cache, found = extend(model(), tokens[:, i : i + 1], cache)
        assert relative(found[:, 0], hidden[:, i]) < 2e-5, i
    return cache


@pytest.mark.parametrize("capacity", tiers([1, 2, 5, 8, 9], in_ci=[1, 8, 9], quick=[5]))
def test_a_small_cache_has_what_one_token_at_a_time_needs_and_grows(capacity):
    small = one_by_one(model().init_cache(2, capacity), 0, capacity - 1)
    one_by_one(small, capacity - 1, capacity)  # to its end
    larger = dsv4.grow_cache(model(), small, LENGTH)
    assert (small.capacity, larger.capacity) == (capacity, LENGTH)
    one_by_one(larger, capacity - 1, LENGTH)


def test_what_does_not_grow_is_refused():
    cache = model().init_cache(2, 12)
    assert dsv4.grow_cache(model(), cache, 12) is cache
    with pytest.raises(ValueError, match=r"grow_cache\(capacity=11\): .*\[12, 1024\]"):
        dsv4.grow_cache(model(), cache, 11)
    small = model().init_cache(2, 3)
    full = dsv4.Cache(small.lengths.at[1].set(3), small.layers, 3)
    with pytest.raises(ValueError, match="row 1 has filled a cache for 3 tokens"):
        dsv4.grow_cache(model(), full, 20)


@pytest.mark.parametrize("needed", [1, 127, 128, 129, 513, 1000, 5000, 65_601, 900_000])
def test_capacities_are_few_and_little_above_what_is_needed(needed):
    capacity = rounded_capacity(needed, 1 << 20)
    assert needed <= capacity < max(needed + 128, 1.25 * needed)
    assert rounded_capacity(capacity, 1 << 20) == capacity
    assert rounded_capacity(needed, needed) == needed


def test_a_cache_of_another_model_is_not_enlarged():
    other = random_model(small_config(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="grow_cache: the cache is one of another"):
        dsv4.grow_cache(model(), other.init_cache(2, 16), 32)
