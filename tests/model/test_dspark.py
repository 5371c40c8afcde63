"""The drafter against plain numpy, and what its drafts depend on."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.drafters import CONFIG, SIZES, Oracle, drafter_tensors, write_drafter
from tests.models import QUICKLY
from tests.official import meanings, random_release

LENGTHS = (1, 2, 8, 9, 10, 25)  # around the window of 9
RNG = np.random.default_rng(7)
MEANS = RNG.normal(size=(6, 25, 2, CONFIG.hidden_size)).astype(np.float32)
ANCHORS = np.array([3, 100, 0, 17, 101, 42], np.int32)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A release's directory, model and drafter, and its tensors' meaning."""
    tensors = random_release(CONFIG) | drafter_tensors()
    directory = write_drafter(tmp_path_factory.mktemp("dspark"), tensors)
    drafter = dsv4.load_dspark(directory, dtype="float32")
    with pytest.warns(UserWarning, match="DSpark"):
        model = dsv4.from_pretrained(directory, dtype="float32")
    return directory, model, drafter, meanings(tensors)


read = jax.jit(lambda drafter, *args: drafter.read(*args), compiler_options=QUICKLY)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def draft(drafter, model, anchors, context):
    return drafter.draft(model, anchors, context)


def context_of(drafter, means=MEANS, lengths=LENGTHS):
    start = drafter.init_context(len(means))
    return read(drafter, means, start, np.array(lengths, np.int32))


def test_drafts_are_those_of_plain_numpy(release):
    _, model, drafter, weights = release
    found = draft(drafter, model, ANCHORS, context_of(drafter))
    oracle = Oracle(weights)
    for row, length in enumerate(LENGTHS):
        wanted = oracle.draft(MEANS[row, :length].astype(float), ANCHORS[row])
        np.testing.assert_array_equal(found.tokens[row], wanted[0])
        np.testing.assert_allclose(found.logits[row], wanted[1], rtol=0, atol=5e-5)
        np.testing.assert_allclose(found.confidence[row], wanted[2], rtol=0, atol=5e-5)


def test_a_context_read_in_parts_is_that_read_at_once(release):
    drafter = release[2]
    whole, parts = context_of(drafter), drafter.init_context(6)
    done = np.zeros(6, np.int32)
    for size in (1, 3, 6, 9, 9):
        new = np.minimum(size, np.array(LENGTHS) - done)
        rows = np.arange(6)[:, None]
        places = np.minimum(done[:, None] + np.arange(size), 24)
        padded = MEANS[rows, places]
        parts = read(drafter, padded, parts, new)
        done += new
    np.testing.assert_array_equal(parts.lengths, LENGTHS)
    window = np.arange(9) >= 9 - np.array(LENGTHS)[:, None]
    for found, wanted, there in zip(parts.keys, whole.keys, window):
        np.testing.assert_allclose(found[:, there], wanted[:, there], atol=1e-5)


def test_every_place_sees_the_last_window_and_nothing_before(release):
    _, model, drafter, _ = release
    base = draft(drafter, model, ANCHORS, context_of(drafter)).logits

    def moved(position):
        means = MEANS.copy()
        means[5, position] += 1
        logits = draft(drafter, model, ANCHORS, context_of(drafter, means)).logits
        return np.abs(logits - base)[5].max(axis=-1)

    assert (moved(25 - 9) > 1e-4).all()  # all places alike
    assert (moved(24) > 1e-4).all()
    assert (moved(25 - 10) == 0).all()


def test_what_is_not_read_is_not_there(release):
    """Padding, and slots that are empty yet, may hold anything."""
    _, model, drafter, _ = release
    means = MEANS.copy()
    for row, length in enumerate(LENGTHS):
        means[row, length:] = np.nan
    context = context_of(drafter, means)
    empty = np.arange(9) < 9 - np.array(LENGTHS)[:, None]
    keys = jnp.where(empty[:, None, :, None], jnp.nan, context.keys)
    context = eqx.tree_at(lambda c: c.keys, context, keys)
    found = draft(drafter, model, ANCHORS, context)
    wanted = draft(drafter, model, ANCHORS, context_of(drafter))
    np.testing.assert_array_equal(found.logits, wanted.logits)


def test_the_first_place_sees_the_noise_of_the_last(release):
    _, model, drafter, _ = release
    context = context_of(drafter)
    logits = draft(drafter, model, ANCHORS, context).logits
    row = model.embedding[SIZES.noise_token_id]
    louder = eqx.tree_at(
        lambda m: m.embedding, model, model.embedding.at[SIZES.noise_token_id].set(-row)
    )
    changed = draft(drafter, louder, ANCHORS, context).logits
    assert (np.abs(changed - logits)[:4, 0].max(axis=-1) > 1e-4).all()


def test_drafts_walk_as_the_token_before_says(release):
    """Without the model's logits, each token follows from the one before alone."""
    _, model, drafter, _ = release
    vocab, rank = CONFIG.vocab_size, SIZES.markov_rank
    codes = np.random.default_rng(3).normal(size=(vocab, rank))
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    follows = np.random.default_rng(4).permutation(vocab)
    out = np.empty_like(codes)
    out[follows] = codes  # the largest product with a row is that of what follows
    silent = eqx.tree_at(lambda m: m.unembedding, model, model.unembedding * 0)
    walker = eqx.tree_at(
        lambda d: (d.markov_in, d.markov_out),
        drafter,
        (jnp.asarray(codes, jnp.float32), jnp.asarray(out, jnp.float32)),
    )
    found = draft(walker, silent, ANCHORS, context_of(drafter))
    before = ANCHORS
    for i in range(SIZES.block_size):
        before = follows[before]
        np.testing.assert_array_equal(found.tokens[:, i], before)


def test_drawn_drafts_have_the_distribution_of_their_logits(release):
    _, model, drafter, _ = release
    context = context_of(drafter, MEANS[:1], LENGTHS[-1:])
    rows = 500
    many = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), context)
    anchors = jnp.full(rows, 42, jnp.int32)
    drawn = jax.jit(
        lambda d, m, a, c: d.draft(m, a, c, temperature=0.7, key=jax.random.key(1)),
        compiler_options=QUICKLY,
    )(drafter, model, anchors, many)
    for place in (0, 1):
        p = jax.nn.softmax(drawn.logits[:, place] / 0.7, axis=-1)
        expected = np.asarray(p, np.float64).sum(axis=0)
        counts = np.bincount(drawn.tokens[:, place], minlength=CONFIG.vocab_size)
        common = expected > 8
        z = (counts - expected)[common] / np.sqrt(expected[common])
        assert common.sum() >= 5 and np.abs(z).max() < 4.5
    # Each was drawn from its own logits: the second depends on the first.
    assert len(np.unique(np.argmax(drawn.logits[:, 1], axis=-1))) > 1


def test_means_are_of_the_chosen_layers_in_their_order(release):
    drafter = release[2]
    streams = RNG.normal(size=(3, 2, 5, 4, CONFIG.hidden_size)).astype(np.float32)
    found = drafter.means(list(map(jnp.asarray, streams)))
    wanted = np.stack([streams[0].mean(axis=2), streams[2].mean(axis=2)], axis=2)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_arguments_are_refused(release):
    _, model, drafter, _ = release
    context = drafter.init_context(6)
    bad = {
        r"means of the shape \(6, 25, 1, ": lambda: drafter.read(
            MEANS[:, :, :1], context
        ),
        r"means of the shape \(5, ": lambda: drafter.read(MEANS[:5], context),
        "the context is a tuple": lambda: drafter.read(MEANS, ()),
        "lengths": lambda: drafter.read(MEANS, context, np.full(6, 26)),
        "anchors=.*6 token ids": lambda: drafter.draft(model, ANCHORS[:5], context),
        r"anchors=.*\[0, 102\)": lambda: drafter.draft(model, ANCHORS + 1, context),
        "context is a NoneType": lambda: drafter.draft(model, ANCHORS, None),
        "temperature=-1": lambda: drafter.draft(
            model, ANCHORS, context, temperature=-1
        ),
        "key=None": lambda: drafter.draft(model, ANCHORS, context, temperature=1.0),
        "DSpark.config=3": lambda: dsv4.DSpark(3, SIZES, key=jax.random.key(0)),
        "of one release": lambda: dsv4.DSpark(
            dsv4.Config.tiny(),
            SIZES.__class__(**vars(SIZES) | {"noise_token_id": 256}),
            key=jax.random.key(0),
        ),
    }
    for match, call in bad.items():
        with pytest.raises(ValueError, match=match):
            call()
