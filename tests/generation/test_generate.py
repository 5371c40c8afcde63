"""The loop of generation, on a model whose tokens are computed by hand in numpy."""

import contextlib
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.generation.recurrent import VOCAB, Recurrent

MODEL = Recurrent()
PROMPTS = [[3, 1, 4, 1, 5, 2], [6], [2, 0, 5]]
NEW = 8
generate = functools.partial(dsv4.generate, MODEL, PROMPTS, max_new_tokens=NEW)
stream = functools.partial(dsv4.generate_stream, MODEL, PROMPTS, max_new_tokens=NEW)
KEY = jax.random.key(5)
DRAWN = dict(sampling=dsv4.Sampling(temperature=1.5), key=KEY)


def streamed(steps):
    """The new tokens of each row, from what a stream gives."""
    columns = np.stack(list(steps), axis=1)
    return [row[row >= 0].tolist() for row in columns]


def rows_of(out):
    """The new tokens of each row, with nothing after its end."""
    rows = []
    for row, length in zip(np.asarray(out.tokens), np.asarray(out.lengths)):
        assert (row[length:] == 0).all()
        rows.append(row[:length].tolist())
    return rows


@pytest.mark.parametrize("speculative", [False, True])
def test_the_likeliest_tokens_and_drafts_are_those_of_the_whole_row(speculative):
    out = generate(speculative=speculative)
    expected = [MODEL.likeliest(prompt, NEW) for prompt in PROMPTS]
    assert rows_of(out) == [tokens for tokens, *_ in expected]
    counts = [(n, m) if speculative else (0, 0) for _, n, m in expected]
    assert list(zip(out.num_drafted.tolist(), out.num_accepted.tolist())) == counts
    if speculative:
        assert 0 < sum(m for _, m in counts) < sum(n for n, _ in counts)
    steps = stream(speculative=speculative)
    assert streamed(steps) == rows_of(out)
    assert list(zip(steps.num_drafted, steps.num_accepted)) == counts
    # All but the last token are in the caches.
    read = [len(prompt) + NEW - 1 for prompt in PROMPTS]
    assert out.cache.lengths.tolist() == read
    assert speculative == (out.mtp_cache is not None)
    if speculative:
        assert out.mtp_cache.lengths.tolist() == read
        rows = [prompt + new for prompt, new in zip(PROMPTS, rows_of(out))]
        states = [MODEL.draft_states_after(row)[-1] for row in rows]
        found = out.mtp_cache.attention.window_keys[:, 0]
        np.testing.assert_allclose(found, states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_log_probabilities_are_the_models_own(drawn, speculative):
    cut = dict(sampling=dsv4.Sampling(temperature=0.7, top_k=3), key=KEY)
    out = generate(speculative=speculative, **(cut if drawn else {}))
    for prompt, tokens, found in zip(PROMPTS, rows_of(out), out.log_probabilities):
        logits = MODEL.logits_after(prompt + tokens)[len(prompt) - 1 : -1]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(NEW), tokens]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_row_ends_at_the_first_of_its_stop_tokens(drawn, speculative):
    whole = rows_of(generate(speculative=speculative, **drawn))
    places, pairs = (
        set(),
        [[i, (i + shift) % VOCAB] for i in range(7) for shift in (1, 3)],
    )
    for ids in pairs:
        out = generate(eos_id=ids, speculative=speculative, **drawn)
        for row, found in zip(whole, rows_of(out)):
            ends = [i for i, token in enumerate(row) if token in ids]
            assert found == row[: ends[0] + 1 if ends else NEW], ids
            places.add(len(found))
        read = np.array([len(row) for row in PROMPTS]) + out.lengths - 1
        np.testing.assert_array_equal(out.cache.lengths, read)
    assert {1, 2, 3} < places
    if speculative and not drawn:
        steps = stream(eos_id=ids, speculative=speculative)
        assert streamed(steps) == rows_of(out)


NEUTRAL = dict(temperature=1.0, top_k=VOCAB, top_p=1.0, min_p=0.0)


@pytest.mark.parametrize(
    "forced", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=0)]
)
def test_each_way_to_cut_reaches_the_loop(forced):
    """Each alone leaves the likeliest token only."""
    sampling = dsv4.Sampling(**(NEUTRAL | forced))
    expected = [MODEL.likeliest(prompt, NEW)[0] for prompt in PROMPTS]
    assert rows_of(generate(sampling=sampling, key=KEY)) == expected
    assert streamed(stream(sampling=sampling, key=KEY)) == expected


def test_neutral_values_draw_the_same_tokens():
    plain = generate(sampling=dsv4.Sampling(), key=KEY)
    neutral = generate(sampling=dsv4.Sampling(**NEUTRAL), key=KEY)
    np.testing.assert_array_equal(neutral.tokens, plain.tokens)
    other = generate(sampling=dsv4.Sampling(), key=jax.random.key(6))
    assert (other.tokens != plain.tokens).any()


@pytest.mark.parametrize("speculative", [False, True])
def test_each_step_has_randomness_of_its_own(speculative):
    """Of constant logits, tokens are equally often, and so are neighbours."""
    constant = Recurrent(scale=0.0)
    arguments = dict(sampling=dsv4.Sampling(), key=KEY, speculative=speculative)
    out = dsv4.generate(constant, [[1]] * 40, max_new_tokens=110, **arguments)
    tokens = np.asarray(out.tokens)
    for shift in (1, 2, 3):
        pairs = VOCAB * tokens[:, shift:] + tokens[:, :-shift]
        counts = np.bincount(pairs.reshape(-1), minlength=VOCAB**2)
        expected = pairs.size / VOCAB**2
        # Five standard deviations of a count.
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert len(np.unique(tokens, axis=0)) == 40


def test_tokens_drawn_with_drafts_have_the_exact_distribution():
    """Of the second and third new token, drafts decide."""
    num, sampling = 6000, dsv4.Sampling(temperature=3.0, top_k=3)
    out = dsv4.generate(
        MODEL,
        PROMPTS[:1],
        max_new_tokens=3,
        sampling=sampling,
        key=KEY,
        num_samples=num,
        speculative=True,
    )
    expected = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, p in expected.items():
            logits = MODEL.logits_after(PROMPTS[0] + list(tokens))[-1] / 3.0
            kept = np.argsort(-logits)[:3]
            weights = np.exp(logits[kept] - logits.max())
            for token, weight in zip(kept, weights / weights.sum()):
                longer[*tokens, int(token)] = p * weight
        expected = longer
    found = {tokens: 0 for tokens in expected}
    for tokens in np.asarray(out.tokens).tolist():
        found[tuple(tokens)] += 1  # none that is cut away
    p = np.array(list(expected.values()))
    error = np.abs(np.array(list(found.values())) / num - p)
    assert (error < 5 * np.sqrt(p / num) + 5 / num).all()
    assert 0.2 < np.mean(out.num_accepted) < 0.9


def test_samples_of_a_prompt_are_rows_beside_each_other():
    out = generate(num_samples=2, speculative=True)
    assert out.cache.lengths.tolist() == [13, 13, 8, 8, 10, 10]
    expected = [MODEL.likeliest(prompt, NEW)[0] for prompt in PROMPTS]
    assert rows_of(out) == [row for row in expected for _ in range(2)]


def letters(ids):
    return "".join("abcdefg"[i] for i in ids)


@pytest.mark.parametrize(
    "drawn, speculative", [({}, False), (DRAWN, True)], ids=["greedy", "drafts"]
)
def test_a_row_ends_with_a_stop_string(drawn, speculative):
    arguments = dict(speculative=speculative, decode=letters, **drawn)
    whole = generate(**arguments)
    assert whole.texts == tuple(map(letters, rows_of(whole)))
    stops = [letters(row[i : i + 2]) for row in rows_of(whole) for i in (0, 1, 2, 4)]
    for stop in stops:
        out = generate(stop=stop, **arguments)
        for row, found, text in zip(rows_of(whole), rows_of(out), out.texts):
            end = letters(row).find(stop)
            assert found == (row if end < 0 else row[: end + 2])
            assert text == (letters(row) if end < 0 else letters(row)[:end])
        read = np.array([len(row) for row in PROMPTS]) + out.lengths - 1
        np.testing.assert_array_equal(out.cache.lengths, read)
        if speculative:
            np.testing.assert_array_equal(out.mtp_cache.lengths, read)
    steps = stream(stop=[stop, "never"], **arguments)
    assert streamed(steps) == rows_of(out)
    assert steps.texts == out.texts


def test_a_token_that_ends_a_row_is_not_in_its_text():
    row = MODEL.likeliest(PROMPTS[0], NEW)[0]
    arguments = dict(max_new_tokens=NEW, eos_id=row[3], decode=letters)
    for stop in ((), "never"):
        out = dsv4.generate(MODEL, PROMPTS[0], stop=stop, **arguments)
        length = row.index(row[3])
        assert out.lengths.tolist() == [length + 1]
        assert out.texts == (letters(row[:length]),)


def not_again(logits, tokens, lengths):
    """Forbids the tokens that a row has, until it has all."""
    is_there = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    seen = jax.vmap(lambda row, here: jnp.zeros(VOCAB).at[row].max(here))(
        tokens, is_there.astype(jnp.float32)
    )
    return jnp.where(jnp.all(seen > 0, axis=1, keepdims=True), 0.0, logits - 1e3 * seen)


@pytest.mark.parametrize("speculative", [False, True])
def test_logits_fn_sees_each_rows_tokens_so_far(speculative):
    out = generate(logits_fn=not_again, eos_id=(), speculative=speculative)
    for prompt, tokens in zip(PROMPTS, rows_of(out)):
        row = list(prompt)
        while len(row) < len(prompt) + NEW:
            logits = MODEL.logits_after(row)[-1]
            left = set(range(VOCAB)) - set(row)
            row.append(max(left, key=lambda i: logits[i]) if left else 0)
        assert tokens == row[len(prompt) :]
    if speculative:
        steps = stream(logits_fn=not_again, speculative=speculative)
        assert streamed(steps) == rows_of(out)


def test_logits_fn_must_keep_the_shape():
    with pytest.raises(ValueError, match=r"logits_fn gave the shape \(3, 2\) for"):
        generate(logits_fn=lambda logits, tokens, lengths: logits[:, :2])


@pytest.mark.parametrize("speculative", [False, True])
def test_a_second_turn_follows_the_first(speculative):
    first = generate(speculative=speculative, eos_id=5)
    more = [[2, 2], [1], [4, 0, 6]]
    before = [p + row for p, row in zip(PROMPTS, rows_of(first))]
    whole = [row + new for row, new in zip(before, more)]
    arguments = dict(max_new_tokens=NEW, speculative=speculative)
    for capacity in (None, None if speculative else 300):
        out = dsv4.generate(MODEL, more, after=first, capacity=capacity, **arguments)
        assert rows_of(out) == [MODEL.likeliest(row, NEW)[0] for row in whole]
        assert out.cache.capacity == (capacity or first.cache.capacity)
    if speculative:
        drafts = [MODEL.likeliest(row, NEW)[1:] for row in whole]
        counts = zip(out.num_drafted.tolist(), out.num_accepted.tolist())
        assert list(counts) == drafts
    third = dsv4.generate(MODEL, [[3]] * 3, after=out, **arguments)
    whole = [row + new + [3] for row, new in zip(whole, rows_of(out))]
    assert rows_of(third) == [MODEL.likeliest(row, NEW)[0] for row in whole]


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


@pytest.mark.parametrize("speculative", [False, True])
def test_two_programs_and_none_for_another_prompt_count_or_number(speculative):
    model = Recurrent(dim=4)  # of which nothing is compiled yet
    prompts, key = np.full((3, 16), 2, np.int32), jax.random.key(1)
    cold = dsv4.Sampling(temperature=0.1, top_k=2)
    arguments = dict(speculative=speculative, key=key)
    with compilations() as first:
        dsv4.generate(
            model, prompts, max_new_tokens=5, sampling=dsv4.Sampling(), **arguments
        )
    with compilations() as second:
        for new in (1, 2, 3, 64):
            dsv4.generate(
                model, PROMPTS, max_new_tokens=new, sampling=cold, **arguments
            )
    assert (len(first), len(second)) == (2, 0)


def test_two_programs_for_a_capacity_and_none_for_another_count():
    model = Recurrent(dim=4)
    with compilations() as first:
        dsv4.generate(model, PROMPTS, max_new_tokens=200, capacity=400)
    with compilations() as second:
        dsv4.generate(model, PROMPTS, max_new_tokens=390, capacity=400)
    assert (len(first), len(second)) == (2, 0)


def test_prompts_of_every_form_are_the_same():
    expected = rows_of(generate())
    for form in (np.asarray, jnp.asarray, list, lambda row: list(map(np.int64, row))):
        rows = [form(row) for row in PROMPTS]
        assert rows_of(dsv4.generate(MODEL, rows, max_new_tokens=NEW)) == expected
        one = dsv4.generate(MODEL, form(PROMPTS[0]), max_new_tokens=NEW)
        assert rows_of(one) == expected[:1]
    padded = np.full((3, 9), 99)
    for row, prompt in zip(padded, PROMPTS):
        row[: len(prompt)] = prompt
    for lengths in ([6, 1, 3], (6, 1, 3), np.array([6, 1, 3]), jnp.array([6, 1, 3])):
        for tokens in (padded, jnp.asarray(padded), padded.tolist()):
            out = dsv4.generate(MODEL, tokens, lengths=lengths, max_new_tokens=NEW)
            assert rows_of(out) == expected


def test_a_mask_tells_which_tokens_of_left_padded_prompts_are_meant():
    tokens, mask = np.full((3, 6), 9), np.zeros((3, 6), int)
    for i, prompt in enumerate(PROMPTS):
        tokens[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, 1
    rows = [row[kept] for row, kept in zip(tokens, mask.astype(bool))]
    out = dsv4.generate(MODEL, rows, max_new_tokens=NEW)
    assert rows_of(out) == rows_of(generate())


SCALARS = [int, np.int64, np.int32, np.array, jnp.asarray]


@pytest.mark.parametrize("scalar", SCALARS)
def test_numbers_of_numpy_and_jax_are_numbers(scalar, without_shape_checks):
    expected = rows_of(generate(eos_id=5))
    numbers = dict(max_new_tokens=scalar(NEW), num_samples=scalar(1))
    for ids in (scalar(5), [scalar(5)], np.array([5, 5]), jnp.array([5]), {5}):
        out = dsv4.generate(MODEL, PROMPTS, eos_id=ids, **numbers)
        assert rows_of(out) == expected
    half = [float(x) for x in (np.float32(0.5), np.float64(0.5), jnp.array(0.5))]
    assert half == [dsv4.Sampling(temperature=x).temperature for x in half]


def test_nothing_is_transferred_unasked():
    prompts = jax.device_put(np.array([[1, 2, 3], [4, 5, 0], [6, 0, 0]]))
    lengths = jax.device_put(np.array([3, 2, 1]))
    with jax.transfer_guard("disallow"):
        arguments = dict(max_new_tokens=NEW, lengths=lengths, speculative=True)
        sampling = dsv4.Sampling(temperature=0.5, top_k=3)
        arguments |= dict(sampling=sampling, key=KEY, decode=letters)
        out = dsv4.generate(MODEL, prompts, **arguments)
        steps = dsv4.generate_stream(MODEL, prompts, stop="never", **arguments)
        assert streamed(steps) == rows_of(out)


BAD = {
    "no new tokens": (dict(max_new_tokens=0), r"\(max_new_tokens=0\)"),
    "half a token": (dict(max_new_tokens=1.5), r"\(max_new_tokens=1.5\)"),
    "beyond the last position": (dict(max_new_tokens=1019), "1019 are beyond max_pos"),
    "an empty prompt": (dict(lengths=[6, 0, 1]), "prompt of row 1 has no token"),
    "lengths of other rows": (dict(lengths=[6, 1]), "one for each of the 3 rows"),
    "a length beyond the row": (dict(lengths=[6, 2, 3]), r"lengths\[1\] is 2"),
    "no key": (dict(sampling=dsv4.Sampling()), r"\(key=None\)"),
    "a number for a key": (dict(key=0), r"\(key=0\)"),
    "a dict of sampling": (dict(sampling=dict(top_k=2)), r"\(sampling=.*a Sampling"),
    "a token that there is not": (dict(eos_id=7), r"\(eos_id=7\)"),
    "half a stop token": (dict(eos_id=[1, 2.5]), r"\(eos_id=\[1, 2.5\]\)"),
    "a truth for a stop token": (dict(eos_id=True), r"\(eos_id=True\)"),
    "a small cache": (
        dict(capacity=13),
        r"\(capacity=13\): must be an integer in \[14",
    ),
    "a large cache": (dict(capacity=1025), r"\(capacity=1025\)"),
    "an empty stop string": (dict(stop=["a", ""], decode=letters), r"\(stop="),
    "nothing to decode": (dict(stop="a"), r"\(decode=None\)"),
    "no samples": (dict(num_samples=0), r"\(num_samples=0\)"),
    "no function": (dict(logits_fn=3), r"\(logits_fn=3\)"),
    "no earlier result": (dict(after=[1]), r"\(after='list'\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_before_the_model_is_compiled(
    what, without_shape_checks
):
    changes, message = BAD[what]
    nothing_to_run = eqx.filter_eval_shape(lambda model: model, MODEL)
    arguments = dict(max_new_tokens=NEW) | changes
    for call in (dsv4.generate, dsv4.generate_stream):
        with pytest.raises(ValueError, match=f"^{call.__name__}\\b.*{message}"):
            call(nothing_to_run, PROMPTS, **arguments)


BAD_PROMPTS = {
    "none": ([], "there is no prompt"),
    "an empty row": ([[1], []], "row 1 has no token"),
    "too many dimensions": (np.zeros((1, 2, 3), int), r"not \(1, 2, 3\)"),
    "a row too deep": ([[1], [[1, 2]]], "row of token ids has the shape"),
    "floats": (np.zeros((1, 3)), "must be integers, not float64"),
    "a text": ("abc", "must be integers"),
    "a negative id": ([[1, -1]], r"token id -1 at \[0, 1\] is outside \[0, 7\)"),
    "an id that wraps": ([[1], [0, 2**33 + 5]], r"token id 8589934597 at \[1, 1\]"),
}


@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_what_is_no_prompt_is_refused(what, without_shape_checks):
    prompts, message = BAD_PROMPTS[what]
    with pytest.raises(ValueError, match=f"^generate: .*{message}"):
        dsv4.generate(MODEL, prompts, max_new_tokens=2)


def test_a_second_turn_of_other_rows_is_refused():
    first = generate()
    with pytest.raises(ValueError, match="2 prompts cannot follow the 3 rows"):
        dsv4.generate(MODEL, PROMPTS[:2], max_new_tokens=2, after=first)
    with pytest.raises(ValueError, match="without speculative=True"):
        generate(after=first, speculative=True)
    with pytest.raises(ValueError, match=r"\(capacity=100\): must be .* \[128, 1024\]"):
        generate(after=first, capacity=100)


def test_what_is_no_model_is_refused(without_shape_checks):
    with pytest.raises(ValueError, match=r"generate\(model='NoneType'\): must be a"):
        dsv4.generate(None, PROMPTS, max_new_tokens=3)


def test_a_traced_model_or_prompt_is_refused():
    def of_both(model, tokens):
        return dsv4.generate(model, tokens, max_new_tokens=3).tokens

    tokens = jnp.array([[1, 2]])
    message = "generate: the model or the prompts are traced"
    with pytest.raises(ValueError, match=message):
        eqx.filter_jit(lambda tokens: of_both(MODEL, tokens))(tokens)
    with pytest.raises(ValueError, match=message):
        eqx.filter_jit(lambda model: of_both(model, tokens))(MODEL)


def test_speculation_needs_a_prediction_block():
    model = Recurrent(num_mtp=0)
    for call in (dsv4.generate, dsv4.generate_stream):
        with pytest.raises(ValueError, match="has 0 prediction blocks"):
            call(model, PROMPTS, max_new_tokens=3, speculative=True)
