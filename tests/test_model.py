"""The whole model against transformers', and what must hold of it whatever it says."""

import functools
import os
import re
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsv4_eqx import DeepSeekV4, from_state_dict
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.checkpoint.state_dict import abstract_model
from dsv4_eqx.hf_config import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model import check_token_ids
from tests.reference import ours, reference_model
from tests.tiny import tiny_config

T = tiny_config()
LENGTH = 41  # ten CSA entries for an index_topk of 5, two HCA entries and a rest
# LLVM's dearest passes are half of the time here and change nothing that is tested.
CHEAP = {"xla_llvm_disable_expensive_passes": True}

CHEAPEST = CHEAP | {"xla_backend_optimization_level": 0}

forward = jax.jit(lambda model, tokens: model(tokens), compiler_options=CHEAP)
# For a shape that one test has alone: compiles in half of the time.
_forward_once = jax.jit(lambda model, tokens: model(tokens), compiler_options=CHEAPEST)


def loss_of(floats, rest, tokens, weights, remat=False):
    """Cross-entropy of the next tokens, with a weight for each position."""
    logits = eqx.combine(floats, rest)(tokens, remat=remat)
    scores = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(chosen * weights)


_loss_and_grad = jax.jit(
    jax.value_and_grad(loss_of), static_argnames="remat", compiler_options=CHEAP
)


def loss_and_grad(model, tokens, weights=None, remat=False):
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    if weights is None:
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        weights = np.full((tokens.shape[0], tokens.shape[1] - 1), 1 / max(count, 1))
    weights = weights.astype(np.float32)
    return _loss_and_grad(floats, rest, tokens, weights, remat)


@functools.cache
def pair(seed):
    """transformers' model and ours with the same weights."""
    reference = reference_model(T, seed)
    return reference, ours(T, reference)


def small_config(**changes):
    """Three layers, one of each kind: compiles in half of T's time."""
    fields = dict(
        num_hidden_layers=3,
        layer_types=(SLIDING, HCA, CSA),
        compress_ratios=(0, 16, 4),
        mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
    )
    return tiny_config(**(fields | changes))


def random_tokens(seed, length=LENGTH, batch=2, config=T):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, config.vocab_size, (batch, length))
    return tokens.astype(np.int32)


def random_model(config, seed=0):
    """A model, prediction block included, without waiting for JAX to make one."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for source, leaf in sources(abstract_model(config, jnp.float32), official=True):
        for name in source.names.flat:
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                high = config.n_routed_experts
                tensors[name] = generator.integers(0, high, source.tensor_shape)
                continue
            value = generator.normal(size=source.tensor_shape)
            value = value / np.sqrt(source.tensor_shape[-1])
            tensors[name] = value.astype(np.float32)
    return from_state_dict(config, tensors)


def as_torch(tokens):
    return torch.tensor(tokens, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(5))
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
        expected = reference(as_torch(tokens)).logits.numpy()
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


def test_every_layers_output_equals_that_of_transformers():
    reference, model = pair(0)
    tokens = random_tokens(10)
    expected = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, out: expected.append(out))
        for layer in reference.model.layers
    ]
    with torch.no_grad():
        reference(as_torch(tokens))
    for handle in handles:
        handle.remove()
    found = _run_one_by_one(model, tokens)
    assert len(found) == len(expected) == 6
    for layer, (streams, wanted) in enumerate(zip(found, expected)):
        error = np.abs(np.asarray(streams) - wanted.numpy()).max()
        assert error <= 2e-5, f"layer {layer}: {error}"


@functools.partial(jax.jit, compiler_options=CHEAP)
def _run_one_by_one(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    streams = jnp.repeat(model.embedding[tokens][:, :, None], T.hc_mult, axis=2)
    outputs = []
    for layer in range(len(model.layers)):
        streams = model.layers[layer](streams, tokens, positions)
        outputs.append(streams)
    return outputs


@pytest.mark.parametrize("seed", range(2))
def test_gradients_equal_those_of_autograd(seed):
    reference, model = pair(seed)
    tokens = random_tokens(seed + 20)
    reference.zero_grad(set_to_none=True)
    logits = reference(as_torch(tokens)).logits
    labels = as_torch(tokens)[:, 1:].reshape(-1)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, T.vocab_size), labels)
    expected.backward()
    loss, grads = loss_and_grad(model, tokens)
    np.testing.assert_allclose(float(loss), expected.item(), rtol=1e-5)
    parameters = dict(reference.named_parameters())
    errors, zeros = {}, set()
    for source, leaf in sources(grads, official=False):
        for index in np.ndindex(source.names.shape):
            name = source.names[index]
            grad = np.asarray(leaf[index]).reshape(source.tensor_shape)
            if not grad.any():
                zeros.add(name)
                continue
            wanted = parameters[name].grad.numpy()
            errors[name] = np.linalg.norm(grad - wanted) / np.linalg.norm(wanted)
    # The balancing bias is a buffer: it has no gradient in transformers either.
    bias = "e_score_correction_bias"
    assert all(".indexer." in name or name.endswith(bias) for name in zeros)
    without = {name for name, p in parameters.items() if p.grad is None}
    assert without <= zeros and all(".indexer." in name for name in without)
    assert errors.keys() | zeros >= parameters.keys()
    assert max(errors.values()) <= 5e-4, max(errors, key=errors.get)
    assert np.median(list(errors.values())) <= 5e-5


def test_gradients_do_not_depend_on_remat():
    # One layer before the scan and one that it repeats: T would take a minute.
    config = small_config(
        layer_types=(SLIDING, HCA, HCA),
        compress_ratios=(0, 16, 16),
        num_nextn_predict_layers=0,
    )
    model = random_model(config)
    assert [len(x) for x in (model.layers.first, model.layers.repeated)] == [1, 1]
    tokens = random_tokens(3)
    loss, grads = loss_and_grad(model, tokens)
    again, rematerialised = loss_and_grad(model, tokens, remat=True)
    np.testing.assert_allclose(float(loss), float(again), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(rematerialised)):
        # Another program rounds otherwise, most of all in the mixing's gradients.
        assert jnp.linalg.norm(a - b) <= 1e-4 * jnp.linalg.norm(a)


QUICK_LENGTHS = (3, 24)  # 24: the first with more entries than index_topk


def _length(n):
    return n if n in QUICK_LENGTHS else pytest.param(n, marks=pytest.mark.slow)


@pytest.mark.parametrize("length", [_length(n) for n in range(1, LENGTH)])
def test_truncating_the_tokens_truncates_the_logits(length):
    _, model = pair(0)
    tokens = random_tokens(4)
    whole = np.asarray(forward(model, tokens))
    part = np.asarray(_forward_once(model, tokens[:, :length]))
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


def test_later_tokens_embeddings_get_no_gradient_from_earlier_positions():
    _, model = pair(2)
    tokens = np.stack([np.arange(LENGTH), np.arange(LENGTH)]).astype(np.int32)
    weights = np.zeros((2, LENGTH - 1), np.float32)
    weights[:, 18] = 1.0
    _, grads = loss_and_grad(model, tokens, weights)
    reached = np.asarray(grads.embedding).any(axis=-1)
    np.testing.assert_array_equal(reached, np.arange(T.vocab_size) <= 18)


def test_a_row_does_not_depend_on_its_neighbours():
    _, model = pair(3)
    tokens = random_tokens(6)
    other = np.stack([tokens[0], random_tokens(7)[1]])
    rows = [np.asarray(forward(model, x))[0] for x in (tokens, other)]
    np.testing.assert_array_equal(*rows)
    alone = np.asarray(_forward_once(model, tokens[:1]))[0]
    np.testing.assert_allclose(alone, rows[0], rtol=0, atol=1e-5)


def with_leaf(model, ending, change):
    """The model with every leaf changed whose path ends like this."""

    def maybe(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return change(leaf) if name.endswith(ending) else leaf

    changed = jax.tree_util.tree_map_with_path(maybe, model)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, model)
    return changed


EXTREMES = {
    "equal tokens": (".none", lambda x: x),
    "sinks 80": (".sinks", lambda x: jnp.full_like(x, 80)),
    "sinks -80": (".sinks", lambda x: jnp.full_like(x, -80)),
    "mixing 1e3": ("connection.base", lambda x: jnp.full_like(x, 1e3)),
    "mixing -1e3": ("connection.base", lambda x: jnp.full_like(x, -1e3)),
    "mixing +-1e3": ("connection.base", lambda x: 1e3 * jnp.sign(x)),
    "router +-200": ("router.weight", lambda x: 50 * x),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_outputs_and_gradients_stay_finite(case):
    _, model = pair(0)
    tokens = random_tokens(8)
    if case == "equal tokens":
        tokens = np.full_like(tokens, 5)
    model = with_leaf(model, *EXTREMES[case])
    assert np.isfinite(forward(model, tokens)).all()
    loss, grads = loss_and_grad(model, tokens)
    assert np.isfinite(loss)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "length", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 17, 27, 65))]
)
def test_gradients_stay_finite_at_odd_lengths(length):
    model = random_model(small_config(num_nextn_predict_layers=0))
    loss, grads = loss_and_grad(model, random_tokens(9, length=length))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


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
        check_token_ids(tokens, 129280)
    assert "token id 129280 at [0, 17]" in str(error.value)
    assert check_token_ids(tokens, 129281).dtype == jnp.int32


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


def test_num_params_counts_what_transformers_counts():
    reference, model = pair(0)
    biases = 4 * T.n_routed_experts  # buffers there
    expected = sum(p.numel() for p in reference.parameters()) + biases
    assert model.num_params() == expected
    abstract = abstract_model(T, jnp.bfloat16)
    assert abstract.num_params() == expected


def _in_bfloat16(reference):
    """transformers' model as it loads in bfloat16: some modules stay float32."""
    kept = reference._keep_in_fp32_modules_strict
    for name, parameter in reference.named_parameters():
        if not any(k in name for k in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    return reference


def test_bfloat16_errs_no_more_than_transformers_does():
    # Every expert and entry is chosen: no choice can flip.
    config = small_config(num_experts_per_tok=7, index_topk=64)
    own_errors, reference_errors, divergences = [], [], []
    for seed in range(5):
        reference = reference_model(config, seed)
        model = ours(config, reference)
        tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
        narrow = from_state_dict(config, tensors, dtype=jnp.bfloat16)
        tokens = random_tokens(seed, config=config)
        exact = np.asarray(forward(model, tokens))
        own = np.asarray(forward(narrow, tokens))
        assert own.dtype == np.float32
        with torch.no_grad():
            theirs = _in_bfloat16(reference)(as_torch(tokens)).logits.float().numpy()
        own_errors.append(np.linalg.norm(own - exact) / np.linalg.norm(exact))
        reference_errors.append(np.linalg.norm(theirs - exact) / np.linalg.norm(exact))
        log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(own)
        divergences.append(float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()))
    assert np.median(own_errors) <= 1.5 * np.median(reference_errors)
    assert np.median(divergences) <= 2e-3


_FINITE_DIFFERENCES = """
    import jax, jax.numpy as jnp, numpy as np, equinox as eqx
    from tests.test_model import loss_of, random_model, random_tokens, small_config

    config = small_config(
        num_experts_per_tok=7, index_topk=64, num_nextn_predict_layers=0
    )
    model = random_model(config)
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    floats = jax.tree.map(lambda x: x.astype(jnp.float64), floats)
    tokens = random_tokens(0, length=21)
    loss = jax.jit(lambda floats: loss_of(floats, rest, tokens, 0.05))
    gradient = jax.jit(jax.grad(loss))(floats)
    generator = np.random.default_rng(0)
    for leaf_wise in range(4):
        scale = lambda x: float(jnp.std(x)) + 0.1
        step = jax.tree.map(
            lambda x: jnp.asarray(scale(x) * generator.normal(size=x.shape)), floats
        )
        exact = sum(
            float(jnp.vdot(g, s))
            for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(step))
        )
        h = 1e-6
        ahead, behind = (
            float(loss(jax.tree.map(lambda x, s: x + sign * h * s, floats, step)))
            for sign in (1, -1)
        )
        estimate = (ahead - behind) / (2 * h)
        assert abs(estimate - exact) <= 1e-5 * abs(exact), (estimate, exact)
"""


@pytest.mark.slow  # compiles everything once more, in another process
def test_gradients_equal_finite_differences_in_float64():
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FINITE_DIFFERENCES)],
        env=environment,
        check=True,
        timeout=300,
    )
