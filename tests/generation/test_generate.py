"""Generation against the whole forward pass and transformers' own."""

import contextlib
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from tests.models import QUICKLY, M, pair, random_model, random_tokens, small_config

SMALL = functools.cache(lambda: random_model(small_config()))
NEW = 7


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


@contextlib.contextmanager
def compilations():
    """Counts what XLA compiles, of any size."""
    found, is_on = [], [True]

    def note(event, duration, **_):
        if is_on[0] and event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    is_on[0] = False


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [False, True])
def test_two_programs_and_none_for_another_prompt(speculative):
    config = small_config(
        num_hidden_layers=1,
        layer_types=(CSA,),
        compress_ratios=(4,),
        mlp_layer_types=(TOPK_MOE,),
    )
    model, prompts = random_model(config), random_tokens(8, 16, 4)
    arguments = dict(max_new_tokens=NEW, speculative=speculative)
    with pytest.raises(ValueError, match="row 0 has no token"):
        # JAX compiles its own casts of the arguments, once a process.
        dsv4.generate(model, prompts, lengths=np.zeros(4, np.int32), **arguments)
    jnp.asarray(prompts), jnp.asarray([], jnp.int32)
    with compilations() as first:
        dsv4.generate(model, prompts[:, :13], **arguments)
    with compilations() as second:
        dsv4.generate(model, prompts[:, :2], **arguments)
        dsv4.generate(model, prompts, lengths=np.array([3, 1, 16, 2]), **arguments)
    assert len(first) == 2
    assert len(second) == 0


@functools.cache
def two_words():
    """A model of which a draft is right about as often as not."""
    up = np.random.default_rng(4).normal(size=SMALL().unembedding.shape[1])
    weight = np.zeros_like(SMALL().unembedding)
    weight[3], weight[5] = up, -up
    return eqx.tree_at(lambda model: model.unembedding, SMALL(), jnp.asarray(weight))


LENGTHS = np.array([41, 17, 33, 3, 40])
PROMPTS = random_tokens(5, 41, 5)


def two_words_go_on(eos=96, call=dsv4.generate, **arguments):
    """17 new tokens of each row; there is no 96."""
    return call(
        two_words(),
        PROMPTS,
        max_new_tokens=17,
        lengths=LENGTHS,
        eos_id=eos,
        **arguments,
    )


@pytest.mark.slow
@pytest.mark.parametrize("eos", [96, 5])
def test_speculation_gives_the_same_tokens(eos):
    plain, out = two_words_go_on(eos), two_words_go_on(eos, speculative=True)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    np.testing.assert_allclose(out.log_probabilities, plain.log_probabilities, 0, 5e-5)
    accepted, drafted = np.asarray(out.num_accepted), np.asarray(out.num_drafted)
    assert (accepted <= drafted).all()
    assert (np.asarray(plain.num_drafted) == 0).all()
    if eos == 96:
        # Each step gives a token, and another one where the draft was right; the
        # last one has no room for a draft in some rows.
        assert 0.2 < accepted.sum() / drafted.sum() < 0.9
        steps = drafted + accepted + 1
        assert ((steps == 17) | (steps == 16)).all() and len(set(steps)) == 2
    # Both go on alike from what they keep.
    np.testing.assert_array_equal(out.cache.lengths, plain.cache.lengths)
    last = jnp.stack([row[n - 1] for row, n in zip(plain.tokens, plain.lengths)])
    extend = jax.jit(lambda model, *args: model.extend(*args), compiler_options=QUICKLY)
    hidden = [extend(two_words(), last[:, None], x.cache)[0] for x in (plain, out)]
    np.testing.assert_allclose(*hidden, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_speculation_streams_the_same_tokens():
    out = two_words_go_on(speculative=True)
    stream = two_words_go_on(call=dsv4.generate_stream, speculative=True)
    assert (stream.num_drafted == 0).all()  # nothing has been asked for
    streamed = np.stack(list(stream), axis=1)
    for row, tokens in zip(streamed, out.tokens):
        np.testing.assert_array_equal(row[row >= 0], tokens)
    assert (streamed >= 0).any(axis=0).all()
    np.testing.assert_array_equal(stream.num_drafted, out.num_drafted)
    np.testing.assert_array_equal(stream.num_accepted, out.num_accepted)


@pytest.mark.slow
def test_a_long_prompt_is_read_in_parts_by_both_blocks(monkeypatch):
    at_once = two_words_go_on(speculative=True)
    monkeypatch.setattr("dsv4_eqx.generation.prompt._LARGEST_PART", 32)
    in_parts = two_words_go_on(speculative=True)
    np.testing.assert_array_equal(in_parts.tokens, at_once.tokens)
    np.testing.assert_array_equal(in_parts.num_accepted, at_once.num_accepted)


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
    "a number for a key": (dict(temperature=1.0, key=0), "key=0"),
    "a token that there is not": (dict(eos_id=97), "eos_id=97"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_refused_before_the_model_is_compiled(what, without_shape_checks):
    changes, message = REFUSALS[what]
    arguments = dict(max_new_tokens=NEW) | changes
    nothing_to_run = eqx.filter_eval_shape(lambda model: model, SMALL())
    for call in (dsv4.generate, dsv4.generate_stream):
        with pytest.raises(ValueError, match=f"{call.__name__}\\W.*{message}"):
            call(nothing_to_run, random_tokens(9, 5, 2), **arguments)


def test_what_is_no_model_is_refused(without_shape_checks):
    with pytest.raises(ValueError, match=r"generate\(model='NoneType'\): must be a"):
        dsv4.generate(None, random_tokens(9), max_new_tokens=3)


def test_prompts_that_are_traced_are_refused():
    def call(tokens):
        return dsv4.generate(SMALL(), tokens, max_new_tokens=3).tokens

    with pytest.raises(ValueError, match="generate: the prompts are traced"):
        jax.jit(call)(jnp.asarray(random_tokens(9)))


def test_speculation_needs_a_prediction_block():
    model = eqx.tree_at(lambda model: model.mtp, SMALL(), ())
    for call in (dsv4.generate, dsv4.generate_stream):
        with pytest.raises(ValueError, match="has 0 prediction blocks"):
            call(model, random_tokens(9), max_new_tokens=3, speculative=True)


def of_transformers(reference, prompts):
    """64 greedy tokens after prompts of one length."""
    ids, threads = torch.tensor(prompts).long(), torch.get_num_threads()
    torch.set_num_threads(1)  # so small sums wait for one another's threads
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # or it takes 0 for padding
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    torch.set_num_threads(threads)
    return out[:, prompts.shape[1] :].numpy()


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers():
    reference, model = pair(0)
    lengths = np.array([1, 5, 8, 9, 16, 23, 31, 40, 47, 64])
    prompts = random_tokens(0, max(lengths), len(lengths))
    out = dsv4.generate(model, prompts, max_new_tokens=64, lengths=lengths)
    for row, length in enumerate(lengths):
        expected = of_transformers(reference, prompts[row : row + 1, :length])
        np.testing.assert_array_equal(out.tokens[row], expected[0])


@pytest.mark.slow
def test_greedy_tokens_after_long_prompts_are_those_of_transformers():
    """Past the end of a heavily compressed window, and of choosing all CSA entries."""
    reference, model = pair(0, M)
    lengths = np.array([500] * 8 + [2030] * 2)
    _, heavy, sparse, _ = M.compress_ratios
    assert 500 < 4 * heavy < 564 and 2030 < sparse * M.index_topk < 2090
    prompts = random_tokens(0, max(lengths), len(lengths))
    out = dsv4.generate(model, prompts, max_new_tokens=64, lengths=lengths)
    for rows in (slice(0, 8), slice(8, 10)):
        expected = of_transformers(reference, prompts[rows, : lengths[rows][0]])
        np.testing.assert_array_equal(out.tokens[rows], expected)
