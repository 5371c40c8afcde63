"""The whole model against transformers', and what must hold of it whatever it says."""

import functools
import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from dsv4_eqx import DeepSeekV4
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from dsv4_eqx.model.cross_entropy import cross_entropy_from_logits
from dsv4_eqx.model.inputs import validate_targets, validate_token_ids
from dsv4_eqx.model.model import abstract_model
from tests.checkpoint.saving import one_layer
from tests.models import (
    LENGTH,
    QUICKLY,
    T,
    forward,
    forward_once,
    pair,
    random_model,
    random_tokens,
    small_config,
    streams_by_layer,
)
from tests.reference import ours, reference_config, reference_model
from tests.tiers import tiers
from tests.tiny import tiny_config


@pytest.mark.parametrize("seed", tiers(range(5), quick=[0], in_ci=[1, 2]))
def test_logits_equal_those_of_transformers(seed):
    reference, model = pair(seed)
    tokens = random_tokens(seed)
    gaps = []
    handles = [
        layer.self_attn.compressor.indexer.scorer.register_forward_hook(
            lambda module, inputs, scores: gaps.append(selection_gap(scores))
        )
        for layer, kind in zip(reference.model.layers, T.layer_types)
        if kind == CSA
    ]
    with torch.no_grad():
        expected = reference(torch.tensor(tokens).long()).logits.numpy()
    for handle in handles:
        handle.remove()
    # Otherwise noise decides what is attended to, and equality says nothing.
    assert len(gaps) == 3 and min(gaps) > 1e-6
    logits = np.asarray(forward(model, tokens))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)


def selection_gap(scores):
    """Smallest difference between the last selected score and the next one."""
    entries, smallest = scores.shape[-1], np.inf
    for query in range(scores.shape[1]):
        seen = min((query + 1) // 4, entries)
        if seen > T.index_topk:
            best = scores[:, query, :seen].sort(descending=True).values
            gap = best[:, T.index_topk - 1] - best[:, T.index_topk]
            smallest = min(smallest, float(gap.min()))
    return smallest


@pytest.mark.parametrize("seed", tiers(range(5), in_ci=[0, 1]))
def test_logits_equal_those_of_transformers_where_entries_are_gathered(seed):
    # Ten entries, two selected: too few to be worth a mask.
    config = small_config(index_topk=2)
    reference = reference_model(config, seed)
    tokens = random_tokens(seed)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens).long()).logits.numpy()
    logits = np.asarray(forward_once(ours(config, reference), tokens))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)


@pytest.mark.exhaustive  # each layer and the logits are compared in any case
def test_every_layers_output_equals_that_of_transformers():
    reference, model = pair(0)
    tokens = random_tokens(10)
    expected = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, out: expected.append(out))
        for layer in reference.model.layers
    ]
    with torch.no_grad():
        reference(torch.tensor(tokens).long())
    for handle in handles:
        handle.remove()
    found = jax.jit(streams_by_layer, compiler_options=QUICKLY)(model, tokens)
    assert len(found) == len(expected) == 6
    for layer, (streams, wanted) in enumerate(zip(found, expected)):
        error = np.abs(np.asarray(streams) - wanted.numpy()).max()
        assert error <= 2e-5, f"layer {layer}: {error}"


# 24: the first with more entries than index_topk.
@pytest.mark.parametrize("length", tiers(range(1, LENGTH), in_ci=[1, 24]))
def test_truncating_the_tokens_truncates_the_logits(length):
    _, model = pair(0)
    tokens = random_tokens(4)
    whole = np.asarray(forward(model, tokens))
    part = np.asarray(forward_once(model, tokens[:, :length]))
    np.testing.assert_allclose(part, whole[:, :length], rtol=0, atol=5e-5)


@pytest.mark.parametrize("changed", [1, 3, 4, 7, 8, 9, 15, 16, 17, 24, 32, 40])
def test_logits_before_a_changed_token_keep_every_bit(changed):
    _, model = pair(1)
    tokens = random_tokens(5)
    other = tokens.copy()
    other[:, changed] = (other[:, changed] + 1) % T.vocab_size
    before, after = (
        np.asarray(forward(model, tokens)),
        np.asarray(forward(model, other)),
    )
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(axis=-1).all()


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours():
    _, model = pair(3)
    tokens = random_tokens(6)
    other = np.stack([tokens[0], random_tokens(7)[1]])
    rows = [np.asarray(forward(model, x))[0] for x in (tokens, other)]
    np.testing.assert_array_equal(*rows)
    alone = np.asarray(forward_once(model, tokens[:1]))[0]
    np.testing.assert_allclose(alone, rows[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros((1, 3), np.float32),
        np.zeros((1, 3), bool),
        np.zeros(3, np.int32),
        np.zeros((1, 3, 1), np.int32),
        np.zeros((1, 0), np.int32),
        np.zeros((0, 3), np.int32),
        jnp.zeros((1, 3)),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_tokens_of_another_kind_or_shape_are_refused(tokens):
    _, model = pair(0)
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        model(tokens)


@pytest.mark.parametrize("tokens", [[[1, 2]], None, torch.zeros(1, 2).long()])
def test_tokens_that_are_no_array_are_refused(tokens):
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        pair(0)[1](tokens)
    with pytest.raises(ValueError, match="must be an array of JAX or numpy"):
        inspect.unwrap(validate_token_ids)("call", tokens, 97)


def test_a_tree_of_labels_given_as_a_function_is_told_apart(without_shape_checks):
    labels = jax.tree.map(lambda _: "adam", abstract_model(T, jnp.float32))
    with pytest.raises(ValueError, match="give lambda _: tree"):
        labels(labels)


def test_tokens_beyond_the_last_position_are_refused():
    abstract = abstract_model(tiny_config(max_position_embeddings=16), jnp.float32)
    for call in (DeepSeekV4.__call__, DeepSeekV4.multi_token_logits):
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        eqx.filter_eval_shape(call, abstract, tokens)
        tokens = jax.ShapeDtypeStruct((1, 17), jnp.int32)
        message = "17 tokens a row are beyond max_position_embeddings=16"
        with pytest.raises(ValueError, match=message):
            eqx.filter_eval_shape(call, abstract, tokens)


@pytest.mark.slow
def test_a_float32_model_stays_float32_with_x64():
    tokens = jax.ShapeDtypeStruct((1, 100), jnp.int32)

    def gradients(key, tokens, dtype):
        model = DeepSeekV4(small_config(), key=key, dtype=dtype)
        floats, rest = eqx.partition(model, eqx.is_inexact_array)
        loss = lambda floats: jnp.mean(eqx.combine(floats, rest)(tokens))  # noqa: E731
        return floats, jax.grad(loss)(floats)

    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.enable_x64(True):
            call = functools.partial(gradients, dtype=dtype)
            floats, grads = eqx.filter_eval_shape(call, jax.random.key(0), tokens)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((floats, grads))}
        assert dtypes == {jnp.dtype(jnp.float32), jnp.dtype(dtype)}


@pytest.mark.parametrize("bad", [-1, 97, 2**33 + 5, -(2**40)])
def test_token_ids_outside_the_vocabulary_are_refused(bad):
    _, model = pair(0)
    tokens = np.zeros((2, 20), np.int64)
    tokens[0, 17] = bad
    message = re.escape(f"token id {bad} at [0, 17] is outside [0, 97)")
    for call in (model, model.hidden, model.streams):
        with pytest.raises(ValueError, match=message):
            call(tokens)


def test_token_id_message_names_the_first_of_the_release():
    tokens = jnp.zeros((1, 20), jnp.int32).at[0, 17].set(129280)
    with pytest.raises(ValueError, match=re.escape("outside [0, 129280)")) as error:
        validate_token_ids("call", tokens, 129280)
    assert "token id 129280 at [0, 17]" in str(error.value)
    assert validate_token_ids("call", tokens, 129281).dtype == jnp.int32


def test_multi_token_logits_has_one_position_less_for_the_token_after_next():
    abstract = abstract_model(T, jnp.float32)
    tokens = jax.ShapeDtypeStruct((3, 11), jnp.int32)
    call = DeepSeekV4.multi_token_logits
    following, ahead = eqx.filter_eval_shape(call, abstract, tokens)
    assert following.shape == (3, 11, 97) and ahead.shape == (3, 10, 97)
    assert following.dtype == ahead.dtype == jnp.float32


def test_multi_token_logits_refuses_a_single_token_and_a_model_without_the_block():
    _, without = pair(0)
    with pytest.raises(ValueError, match="0 prediction blocks"):
        without.multi_token_logits(random_tokens(0))
    model = random_model(small_config())
    with pytest.raises(ValueError, match="at least two tokens"):
        model.multi_token_logits(random_tokens(0, length=1))
    with pytest.raises(ValueError, match="token id 97 at"):
        model.multi_token_logits(np.full((1, 3), 97))


@pytest.mark.parametrize(
    "targets, message",
    [
        (np.array([[1, -100, 2]]), r"cross_entropy: target -100 at \[0, 1\]"),
        (np.array([[1, 2, 97]]), r"target 97 at \[0, 2\] is outside \[0, 97\)"),
        (np.array([[1]]), r"targets of shape \(1, 1\).*\(1, 3\)"),
        (np.array([[1.0, 2.0, 3.0]]), "integers, not float64"),
        ([[1, 2, 3]], "integers, not list"),
    ],
)
def test_targets_that_are_none_are_refused(targets, message, without_shape_checks):
    model = random_model(small_config())
    with pytest.raises(ValueError, match=message):
        model.cross_entropy(jnp.ones((1, 3, 60)), targets)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64])
def test_targets_of_any_bits_are_the_same_tokens(dtype, without_shape_checks):
    targets, vocab = np.array([7, 0, 93], dtype), 2**16
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, vocab)), "f4")

    def nats(logits, targets):
        targets = validate_targets("cross_entropy", targets, (3,), vocab)
        return cross_entropy_from_logits(logits, targets)

    expected = jax.nn.logsumexp(logits, axis=1) - logits[np.arange(3), [7, 0, 93]]
    for run in (nats, jax.jit(nats)):
        np.testing.assert_allclose(run(logits, targets), expected, rtol=1e-6)


def test_a_masked_target_costs_nothing_and_is_never_read():
    model = random_model(small_config())
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(2, 3, 60)), jnp.float32)
    targets = np.array([[1, -100, 96], [2**31 - 1, 0, 5]], np.int32)
    mask = np.array([[True, False, True], [False, True, False]])

    def loss(hidden, mask):
        return jnp.sum(model.cross_entropy(hidden, targets, mask))

    nats = model.cross_entropy(hidden, targets, mask)
    plain = model.cross_entropy(hidden, np.where(mask, targets, 7))
    np.testing.assert_array_equal(nats, np.where(mask, plain, 0))
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
        found = np.asarray(gradient(hidden, mask))
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found.any(axis=-1), mask)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.array([[True, True, False]]), r"target -100 at \[0, 1\]"),
        (np.array([[True, False]]), r"shape \(1, 3\).*not bool\[1, 2\]"),
        (np.array([[1, 0, 1]]), "array of booleans.*not int64"),
        ([[True, False, True]], "array of booleans.*not list"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message, without_shape_checks):
    model = random_model(small_config())
    with pytest.raises(ValueError, match=message):
        model.cross_entropy(jnp.ones((1, 3, 60)), np.array([[1, -100, 2]]), mask)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(config="flash"), r"DeepSeekV4\(config='flash'\): must be a Config"),
        (dict(key=0), r"DeepSeekV4\(key=0\): must be one key"),
        (dict(key=jax.random.split(jax.random.key(0))), "must be one key"),
        (dict(dtype="complex64"), r"DeepSeekV4\(dtype='complex64'\): must be one of"),
        (dict(dtype="float64"), "DeepSeekV4: the weights would be float64"),
    ],
)
def test_a_model_of_something_else_is_refused(changes, message, without_shape_checks):
    given = dict(config=small_config(), key=jax.random.key(0)) | changes
    with pytest.raises(ValueError, match=message):
        DeepSeekV4(given.pop("config"), **given)


def test_gradients_are_finite_without_an_epsilon():
    config = one_layer(mlp_layer_types=(TOPK_MOE,), rms_norm_eps=0.0)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradient(model):
        floats, rest = eqx.partition(model, eqx.is_inexact_array)
        tokens = jnp.asarray(random_tokens(0, length=65))
        loss = lambda floats: jnp.sum(eqx.combine(floats, rest)(tokens))  # noqa: E731
        return jax.grad(loss)(floats)

    for leaf in jax.tree.leaves(gradient(random_model(config))):
        assert np.isfinite(leaf).all()


def test_num_params_counts_what_transformers_counts():
    reference, model = pair(0)
    biases = 4 * T.n_routed_experts  # buffers there
    expected = sum(p.numel() for p in reference.parameters()) + biases
    assert model.num_params() == expected
    abstract = abstract_model(T, jnp.bfloat16)
    assert abstract.num_params() == expected


@pytest.mark.slow  # every array's random numbers are a program of their own
def test_initial_weights_are_distributed_as_in_transformers():
    config = small_config(vocab_size=501, hidden_size=96, initializer_range=0.03)
    torch.manual_seed(0)
    reference = DeepseekV4ForCausalLM(reference_config(config))
    theirs = ours(config, reference)
    model = jax.jit(lambda key: DeepSeekV4(config, key=key), compiler_options=QUICKLY)
    model = eqx.tree_at(lambda m: m.mtp, model(jax.random.key(0)), ())
    found = jax.tree_util.tree_leaves_with_path(model)
    for (path, leaf), wanted in zip(found, jax.tree.leaves(theirs), strict=True):
        name = jax.tree_util.keystr(path)
        if name.endswith("table"):  # zeros there, which would send all to one expert
            continue
        leaf, wanted = np.asarray(leaf, "f8"), np.asarray(wanted, "f8")
        if wanted.std() == 0:
            np.testing.assert_array_equal(leaf, wanted, name)
            continue
        # Six standard errors of a sample's mean and deviation.
        size = min(leaf.size, wanted.size)
        assert abs(leaf.mean()) <= 6 * wanted.std() / size**0.5, name
        assert abs(leaf.std() / wanted.std() - 1) <= 6 / size**0.5, name
