"""Extending a cache in any parts against the whole sequence at once."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import DeepSeekV4
from dsv4_eqx.attention.cache import CompressorState, Extended
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.models import (
    LENGTH,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)
from tests.tiers import tiers

CAPACITY = 53
extend = quick_jit(lambda model, *args: model.extend(*args))
# A layer of each kind, and a unit that repeats.
CONFIG = small_config(
    num_hidden_layers=5,
    layer_types=(SLIDING, HCA, CSA, HCA, CSA),
    compress_ratios=(0, 16, 4, 16, 4),
    mlp_layer_types=(HASH_MOE,) + (TOPK_MOE,) * 4,
)
model = functools.cache(lambda: random_model(CONFIG))
TOKENS = random_tokens(3)


@functools.cache
def whole():
    """What the whole sequences give."""
    call = quick_jit(lambda model, tokens: model.hidden(tokens))
    return np.asarray(call(model(), TOKENS))


def in_parts(cache, seq, lengths_of_parts, padding_seed=0):
    """Hidden activations of all tokens, extended by some of each row at a time."""
    generator = np.random.default_rng(padding_seed)
    done, out, caches = np.zeros(len(TOKENS), int), np.full_like(whole(), np.nan), []
    for lengths in lengths_of_parts:
        tokens = generator.integers(-9, 10**6, (len(TOKENS), seq)).astype(np.int32)
        for row, count in enumerate(lengths):
            tokens[row, :count] = TOKENS[row, done[row] : done[row] + count]
        hidden, cache = extend(model(), tokens, cache, np.asarray(lengths, np.int32))
        for row, count in enumerate(lengths):
            out[row, done[row] : done[row] + count] = hidden[row, :count]
        done += lengths
        caches.append(cache)
    assert (done == LENGTH).all()
    np.testing.assert_array_equal(cache.lengths, done)
    return out, caches


def equal_parts(size):
    sizes = [min(size, LENGTH - first) for first in range(0, LENGTH, size)]
    return [[size, size] for size in sizes]


def random_parts(most, seed):
    """Rows out of phase; some advance by nothing."""
    generator, left, parts = np.random.default_rng(seed), np.full(2, LENGTH), []
    while left.any():
        parts.append(np.minimum(generator.integers(0, most + 1, 2), left))
        left = left - parts[-1]
    return parts


def fresh(fill=0):
    cache = model().init_cache(2, CAPACITY)
    layers = jax.tree.map(lambda x: jnp.full_like(x, fill), cache.layers)
    return eqx.tree_at(lambda cache: cache.layers, cache, layers)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5)


PARTS = {
    "all at once": (LENGTH, [[LENGTH, LENGTH]]),
    "by five": (5, equal_parts(5)),
    "out of phase by up to five": (5, random_parts(5, 1)),
}
MORE_PARTS = {
    "one by one": (1, equal_parts(1)),
    "by sixteen": (16, equal_parts(16)),
    **{f"out of phase by up to {n}": (n, random_parts(n, n)) for n in (2, 3, 7, 13)},
}


@pytest.mark.parametrize("parts", PARTS)
def test_any_parts_give_what_the_whole_gives(parts):
    seq, lengths = PARTS[parts]
    out, _ = in_parts(fresh(), seq, lengths)
    assert_close(out, whole())


IN_CI = ("one by one", "by sixteen", "out of phase by up to 3")


@pytest.mark.parametrize("parts", tiers(MORE_PARTS, in_ci=IN_CI))
def test_more_parts_give_what_the_whole_gives(parts):
    out, _ = in_parts(fresh(), *MORE_PARTS[parts])
    assert_close(out, whole())


@pytest.mark.parametrize("first", range(LENGTH + 1))
def test_every_prompt_length_then_the_rest(first):
    lengths = [[first, LENGTH - first], [LENGTH - first, first]]
    out, _ = in_parts(fresh(), LENGTH, lengths)
    assert_close(out, whole())


def test_what_the_cache_held_before_does_not_matter_to_the_bit():
    seq, lengths = PARTS["out of phase by up to five"]
    clean, _ = in_parts(fresh(), seq, lengths)
    stale, _ = in_parts(fresh(3e38), seq, lengths)
    np.testing.assert_array_equal(stale, clean)


def test_what_the_padding_says_does_not_matter_to_the_bit():
    seq, lengths = PARTS["out of phase by up to five"]
    one, caches = in_parts(fresh(), seq, lengths)
    other, others = in_parts(fresh(), seq, lengths, padding_seed=1)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(caches[-1].lengths, others[-1].lengths)


def test_going_back_is_going_on_from_the_old_cache_to_the_bit():
    seq, lengths = PARTS["by five"]
    out, caches = in_parts(fresh(), seq, lengths)
    before = jax.tree.map(np.asarray, caches[3])
    wrong = np.full((2, seq), 7, np.int32)
    extend(model(), wrong, caches[3], np.full(2, seq, np.int32))
    for now, then in zip(jax.tree.leaves(caches[3]), jax.tree.leaves(before)):
        np.testing.assert_array_equal(now, then)
    again, _ = extend(model(), TOKENS[:, 20:25], caches[3], np.full(2, seq, np.int32))
    np.testing.assert_array_equal(again, out[:, 20:25])


def test_a_row_that_does_not_advance_keeps_its_state():
    seq, lengths = PARTS["by five"]
    _, caches = in_parts(fresh(), seq, lengths)
    _, after = extend(
        model(), np.full((2, seq), 7, np.int32), caches[3], np.array([0, 3], np.int32)
    )
    for before, now in zip(jax.tree.leaves(caches[3]), jax.tree.leaves(after)):
        np.testing.assert_array_equal(now[0], before[0])


@pytest.mark.parametrize("order", [[1, 0], [1, 1]])
def test_rows_of_a_cache_in_another_order_go_on_as_those_rows(order):
    seq, lengths = PARTS["out of phase by up to five"]
    _, caches = in_parts(fresh(), seq, lengths)
    cache = jax.tree.map(lambda x: x[np.array(order)], caches[4])
    assert eqx.tree_equal(*map(jax.tree.structure, (cache, caches[4])))
    done = np.asarray(cache.lengths)
    assert len(set(np.asarray(caches[4].lengths))) == 2  # or any order would do
    rest = np.stack(
        [TOKENS[row, n : n + seq] for row, n in zip(order, done, strict=True)]
    )
    hidden, _ = extend(model(), rest, cache, np.full(2, seq, np.int32))
    for i, (row, n) in enumerate(zip(order, done)):
        assert_close(hidden[i], whole()[row, n : n + seq])


def test_every_array_of_a_state_has_the_rows_first():
    cache = eqx.filter_eval_shape(model().init_cache, 7, CAPACITY)
    _, lookahead = jax.eval_shape(
        lambda model, *args: model.lookahead(*args),
        model(),
        np.ones((7, 3), int),
        cache,
    )
    mtp = eqx.filter_eval_shape(model().init_mtp_cache, 7, CAPACITY)
    for leaf in jax.tree.leaves((cache, lookahead, mtp)):
        assert leaf.shape[0] == 7


def parts_with_states(num_new, capacity=CAPACITY):
    """Each part's `extend` by new tokens after `start`, and its state before any."""
    block = model().layers[2]
    attention, lengths = block.attention, jnp.full(2, num_new)
    cache = attention.init_cache(2, capacity, jnp.float32)
    x = jnp.ones((2, num_new, CONFIG.hidden_size))
    streams = jnp.ones((2, num_new, CONFIG.hc_mult, CONFIG.hidden_size))
    latent = jnp.ones((2, num_new, CONFIG.q_lora_rank))
    ids = TOKENS[:, :num_new]
    return {
        "Attention": (lambda s, start: attention.extend(x, s, start, lengths), cache),
        "Compressor": (
            lambda s, start: attention.compressor.extend(x, s, start, lengths),
            cache.compressor,
        ),
        "Indexer": (
            lambda s, start: attention.indexer.extend(x, latent, s, start, lengths),
            cache.indexer,
        ),
        "Block": (
            lambda s, start: block.extend(streams, ids, s, start, lengths),
            cache,
        ),
        "DeepSeekV4": (lambda s, _: model().lookahead(SOME, s), fresh()),
    }


def extended_twice(part):
    """A part's `extend` given what its `extend` gave."""
    (call, state), start = parts_with_states(3)[part], jnp.ones(2, jnp.int32)
    return jax.eval_shape(lambda: call(call(state, start)[1], start))


@pytest.mark.parametrize(
    "part", ["Attention", "Compressor", "Indexer", "Block", "DeepSeekV4"]
)
def test_what_was_extended_is_settled_before_it_is_extended(part, without_shape_checks):
    with pytest.raises(ValueError, match=r"not settled.*give \w+.keep\(lengths\)"):
        extended_twice(part)


@pytest.mark.parametrize("part", ["Attention", "Compressor", "Indexer", "Block"])
def test_a_part_takes_no_more_tokens_than_its_state_has_room_for(
    part, without_shape_checks
):
    """A capacity of 9 has room for two entries of four tokens, and so for 11 tokens."""
    start = jnp.array([8, 9])
    call, state = parts_with_states(3, capacity=9)[part]
    with pytest.raises(ValueError, match=rf"{part}.extend: row 1 .* 12 .* for 11"):
        call(state, start)
    jax.eval_shape(call, state, start)  # unknown numbers: there may be padding


def test_a_window_takes_no_more_tokens_than_its_capacity():
    attention = model().layers[0].attention
    assert attention.compressor is None
    x = jnp.ones((2, 3, CONFIG.hidden_size))
    start, lengths = jnp.array([5, 4]), jnp.full(2, 3)
    short = attention.init_cache(2, 7, jnp.float32)
    with pytest.raises(ValueError, match="row 0 would have 8 tokens.* room for 7"):
        attention.extend(x, short, start, lengths)
    whole, much_later = attention.init_cache(2, 9, jnp.float32), start + 90
    assert CONFIG.sliding_window == 9
    jax.eval_shape(lambda x: attention.extend(x, whole, much_later, lengths), x)


def test_no_more_tokens_stay_than_were_new(without_shape_checks):
    attention, ones = model().layers[0].attention, jnp.ones(2, jnp.int32)
    cache = attention.init_cache(2, CAPACITY, jnp.float32)
    extended = Extended(cache, 3)
    with pytest.raises(
        ValueError, match=r"Extended.keep: lengths\[1\] is 4: .* 0 to 3"
    ):
        extended.keep(3 * ones + jnp.arange(2))
    with pytest.raises(ValueError, match="each of the 2 rows"):
        extended.keep(jnp.ones(3, jnp.int32))


@pytest.mark.parametrize("stay", [(0, 5), (2, 4), (3, 0), (1, 1)])
def test_a_lookahead_keeps_what_it_is_told(stay):
    seq, lengths = PARTS["by five"]
    out, caches = in_parts(fresh(), seq, lengths)
    ahead = np.array(TOKENS[:, 20:25])
    for row, count in enumerate(stay):
        ahead[row, count:] = 7  # complete entries that are not to be
    look = quick_jit(lambda model, *args: model.lookahead(*args))
    _, lookahead = look(model(), ahead, caches[3])
    cache = lookahead.keep(np.array(stay))
    np.testing.assert_array_equal(cache.lengths, np.add(20, stay))
    for row, count in enumerate(stay):
        first = 20 + count
        rest = np.array([TOKENS[row, first : first + seq]] * 2)
        hidden, _ = extend(model(), rest, cache, np.full(2, seq, np.int32))
        assert_close(hidden[row], whole()[row, first : first + seq])
    expected = extend(model(), ahead, caches[3], np.array(stay, np.int32))[1]
    for kept, other in zip(cache.layers, expected.layers, strict=True):
        assert_close(kept.window_keys, other.window_keys)


def test_a_token_copies_neither_the_experts_nor_the_entries_of_a_layer():
    config = dataclasses.replace(
        CONFIG, n_routed_experts=512, max_position_embeddings=131072
    )
    make = functools.partial(DeepSeekV4, config)
    abstract = eqx.filter_eval_shape(make, key=jax.random.key(0))
    cache = eqx.filter_eval_shape(abstract.init_cache, 2, 131072)
    step = quick_jit(
        lambda cache, model, tokens: model.extend(tokens, cache), donate_argnums=0
    )
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    memory = step.lower(cache, abstract, token).compile().memory_analysis()
    unit, state = abstract.layers.repeated[1], cache.layers[2].compressor
    for stack in (unit.moe.experts.gate_up, unit.moe.experts.down, state.entries):
        a_layer = stack.size // abstract.layers.num_repeats * stack.dtype.itemsize
        assert memory.temp_size_in_bytes < a_layer / 3


def test_cache_has_what_is_needed_and_no_more():
    cache = eqx.filter_eval_shape(model().init_cache, 3, CAPACITY)
    entries = pending = keys = 0
    for layer in cache.layers:
        keys += layer.window_keys.size
        for state in (layer.compressor, layer.indexer):
            if isinstance(state, CompressorState):
                entries += state.entries.size
                pending += state.values.size + state.gates.size
    head_dim, index_dim = CONFIG.head_dim, CONFIG.index_head_dim
    num_csa, num_hca = CONFIG.compress_ratios.count(4), CONFIG.compress_ratios.count(16)
    assert keys == 3 * CONFIG.num_hidden_layers * (CONFIG.sliding_window - 1) * head_dim
    csa, hca = CAPACITY // 4, CAPACITY // 16
    assert entries == 3 * (
        num_csa * csa * (head_dim + index_dim) + num_hca * hca * head_dim
    )
    overlapping = num_csa * (2 * 4 - 1) * 2 * (head_dim + index_dim)
    assert pending == 3 * 2 * (overlapping + num_hca * (16 - 1) * head_dim)


SOME = np.zeros((2, 3), np.int32)
REFUSALS = {
    "floats": (lambda c: (np.ones((2, 3), np.float32), c), "must be integers"),
    "a list": (lambda c: ([[1, 2]], c), "not list"),
    "a token beyond the vocabulary": (
        lambda c: (np.array([[1, 97], [0, 0]]), c),
        r"token id 97 at \[0, 1\] is outside \[0, 97\)",
    ),
    "too many tokens": (
        lambda c: (np.zeros((2, CAPACITY + 1), np.int32), c),
        f"row 0 would have {CAPACITY + 1} tokens, and the cache has room for 53",
    ),
    "lengths beyond the tokens": (
        lambda c: (SOME, c, np.array([1, 4])),
        r"lengths\[1\] is 4",
    ),
    "negative lengths": (
        lambda c: (SOME, c, np.array([-1, 3])),
        r"lengths\[0\] is -1",
    ),
    "lengths of another batch": (
        lambda c: (SOME, c, np.array([1, 2, 3])),
        "each of the 2 rows",
    ),
    "lengths that are floats": (
        lambda c: (SOME, c, np.ones(2, np.float32)),
        "array of integers",
    ),
    "a cache of another batch": (
        lambda c: (np.zeros((3, 3), np.int32), c),
        "2 rows of its model",
    ),
    "a cache of another model": (
        lambda c: (SOME, random_model(small_config()).init_cache(2, CAPACITY)),
        "of its model",
    ),
    "no cache": (lambda c: (SOME, None), "NoneType"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_refused_before_anything_is_compiled(what, without_shape_checks):
    arguments, message = REFUSALS[what]
    with pytest.raises(ValueError, match=message):
        model().extend(*arguments(fresh()))


BAD_COUNTS = {
    "more than there are": (np.array([1, 4]), r"lengths\[1\] is 4: .* 0 to 3 tokens"),
    "more than were meant": (np.array([3, 0]), r"lengths\[0\] is 3: .* 0 to 2 tokens"),
    "fewer than none": (np.array([0, -1]), r"lengths\[1\] is -1"),
    "of another batch": (np.array([1]), "each of the 2 rows"),
    "of two dimensions": (np.array([[1, 1]]), "each of the 2 rows"),
    "floats": (np.ones(2, np.float32), "integers, not float32"),
    "booleans": (np.ones(2, bool), "integers, not bool"),
    "a list": ([1, 1], "integers, not list"),
    "a number": (1, "integers, not int"),
}


@functools.cache
def lookahead():
    """With two new tokens in row 0, and three in row 1."""
    look = quick_jit(lambda model, *args: model.lookahead(*args)[1])
    return look(model(), SOME, fresh(), np.array([2, 3], np.int32))


@pytest.mark.parametrize("what", BAD_COUNTS)
def test_a_lookahead_keeps_no_tokens_that_there_are_not(what, without_shape_checks):
    counts, message = BAD_COUNTS[what]
    with pytest.raises(ValueError, match="Lookahead.keep: .*" + message):
        lookahead().keep(counts)
    np.testing.assert_array_equal(lookahead().keep(np.array([2, 3])).lengths, [2, 3])


@pytest.mark.parametrize(
    "batch, capacity", [(0, 5), (2, 0), (2, 1025), (2.0, 5), (True, 5), (2, -1)]
)
def test_caches_that_cannot_be_are_refused(batch, capacity, without_shape_checks):
    with pytest.raises(ValueError, match="init_cache"):
        model().init_cache(batch, capacity)
