"""The model's gradients, extremes and bfloat16."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsv4_eqx import from_state_dict, trainable
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
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
)
from tests.reference import reference_model
from tests.tiers import tiers


def loss_of(floats, rest, tokens, weights, remat=False):
    """Cross-entropy of the next tokens, with a weight for each position."""
    logits = eqx.combine(floats, rest)(tokens, remat=remat)
    scores = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(chosen * weights)


_loss_and_grad = jax.jit(
    jax.value_and_grad(loss_of), static_argnames="remat", compiler_options=QUICKLY
)


def loss_and_grad(model, tokens, weights=None, remat=False):
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    if weights is None:
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        weights = np.full((tokens.shape[0], tokens.shape[1] - 1), 1 / max(count, 1))
    weights = weights.astype(np.float32)
    return _loss_and_grad(floats, rest, tokens, weights, remat)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_gradients_equal_those_of_autograd(seed):
    reference, model = pair(seed)
    tokens = random_tokens(seed + 20)
    reference.zero_grad(set_to_none=True)
    logits = reference(torch.tensor(tokens).long()).logits
    labels = torch.tensor(tokens)[:, 1:].long().reshape(-1)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, T.vocab_size), labels)
    expected.backward()
    loss, grads = loss_and_grad(model, tokens)
    np.testing.assert_allclose(float(loss), expected.item(), rtol=1e-5)
    parameters = dict(reference.named_parameters())

    def is_right(is_reached, grad):
        return is_reached == (grad is not None and bool(grad.any()))

    assert all(jax.tree.leaves(jax.tree.map(is_right, trainable(model), grads)))
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


REPEATING = [(CSA, CSA), (HCA, CSA, CSA), (SLIDING, CSA, CSA, HCA)]


@pytest.mark.parametrize("number", tiers(range(3), in_ci=[0]))
def test_gradients_do_not_depend_on_remat(number):
    kinds = REPEATING[number]
    config = small_config(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        compress_ratios=tuple({SLIDING: 0, CSA: 4, HCA: 16}[kind] for kind in kinds),
        mlp_layer_types=(TOPK_MOE,) * len(kinds),
        num_nextn_predict_layers=0,
    )
    model = random_model(config)
    assert len(model.layers.repeated) == 1
    tokens = random_tokens(3)
    loss, grads = loss_and_grad(model, tokens)
    again, rematerialised = loss_and_grad(model, tokens, remat=True)
    np.testing.assert_allclose(float(loss), float(again), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(rematerialised)):
        # Another program rounds otherwise, most of all in the mixing's gradients.
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)


@pytest.mark.slow
def test_later_tokens_embeddings_get_no_gradient_from_earlier_positions():
    _, model = pair(2)
    tokens = np.stack([np.arange(LENGTH), np.arange(LENGTH)]).astype(np.int32)
    weights = np.zeros((2, LENGTH - 1), np.float32)
    weights[:, 18] = 1.0
    _, grads = loss_and_grad(model, tokens, weights)
    reached = np.asarray(grads.embedding).any(axis=-1)
    np.testing.assert_array_equal(reached, np.arange(T.vocab_size) <= 18)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("length", tiers([1, 2, 5, 17, 27, 65], in_ci=[1, 65]))
def test_gradients_stay_finite_at_odd_lengths(length):
    config = small_config(
        num_hidden_layers=2,
        layer_types=(HCA, CSA),
        compress_ratios=(16, 4),
        mlp_layer_types=(HASH_MOE, TOPK_MOE),
        num_nextn_predict_layers=0,
    )
    model = random_model(config)
    loss, grads = loss_and_grad(model, random_tokens(9, length=length))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def _in_bfloat16(reference):
    """transformers' model as it loads in bfloat16: some modules stay float32."""
    kept = reference._keep_in_fp32_modules_strict
    for name, parameter in reference.named_parameters():
        if not any(k in name for k in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    return reference


def forced_config():
    """Every expert and entry is chosen: no choice can flip."""
    return small_config(
        num_experts_per_tok=7,
        index_topk=64,
        # Multiples of 8, or torch has no grouped product.
        hidden_size=64,
        moe_intermediate_size=32,
        hc_sinkhorn_iters=20,
    )


def narrow_model(config, reference):
    """Ours in bfloat16, with the reference's weights."""
    tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
    return from_state_dict(config, tensors, dtype=jnp.bfloat16)


def divergence(exact, found):
    """Kullback-Leibler, nats a token."""
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(found)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.mark.slow
def test_bfloat16_errs_no_more_than_transformers_does():
    config = forced_config()
    own_errors, reference_errors, divergences = [], [], []
    for seed in range(3):
        reference = reference_model(config, seed)
        narrow = narrow_model(config, reference)
        tokens = random_tokens(seed, config=config)
        own = np.asarray(forward_once(narrow, tokens))
        assert own.dtype == np.float32
        with torch.no_grad():
            exact = reference(torch.tensor(tokens).long()).logits.numpy()
            theirs = (
                _in_bfloat16(reference)(torch.tensor(tokens).long())
                .logits.float()
                .numpy()
            )
        own_errors.append(np.linalg.norm(own - exact) / np.linalg.norm(exact))
        reference_errors.append(np.linalg.norm(theirs - exact) / np.linalg.norm(exact))
        divergences.append(divergence(exact, own))
    assert np.median(own_errors) <= 1.5 * np.median(reference_errors)
    assert np.median(divergences) <= 2e-3


@pytest.mark.slow
def test_bfloat16_prompts_and_single_tokens_stay_near_the_whole_in_float32():
    config, prompt, divergences = forced_config(), 22, []

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def extend(model, tokens, cache):
        hidden, cache = model.extend(tokens, cache)
        return model.unembed(hidden), cache

    for seed in range(3):
        reference = reference_model(config, seed)
        model, tokens = narrow_model(config, reference), random_tokens(seed)
        cache, found = model.init_cache(*tokens.shape), []
        for part in np.split(tokens, range(prompt, LENGTH), axis=1):
            logits, cache = extend(model, part, cache)
            found.append(logits)
        assert cache.layers[0].window_keys.dtype == jnp.bfloat16
        with torch.no_grad():
            exact = reference(torch.tensor(tokens).long()).logits.numpy()
        found = np.concatenate(found, axis=1)
        whole = np.asarray(forward_once(model, tokens))
        divergences.append([divergence(exact, x) for x in (found, whole)])
    in_parts, at_once = np.median(divergences, axis=0)
    assert in_parts <= min(2e-3, 1.5 * at_once), divergences


@pytest.mark.slow
def test_gradients_equal_finite_differences_in_float64():
    config = small_config(
        num_experts_per_tok=7, index_topk=64, num_nextn_predict_layers=0
    )
    floats, rest = eqx.partition(random_model(config), eqx.is_inexact_array)
    tokens, generator = random_tokens(0, length=21), np.random.default_rng(0)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def loss_and_gradient(floats):
        return jax.value_and_grad(loss_of)(floats, rest, tokens, 0.05)

    with jax.enable_x64(True):
        floats = jax.tree.map(lambda x: np.asarray(x, np.float64), floats)
        _, gradient = loss_and_gradient(floats)
        for _ in range(4):
            step = jax.tree.map(
                lambda x: (x.std() + 0.1) * generator.normal(size=x.shape), floats
            )
            pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(step))
            exact = sum(np.vdot(g, s) for g, s in pairs)
            ahead, behind = (
                loss_and_gradient(jax.tree.map(lambda x, s: x + h * s, floats, step))[0]
                for h in (1e-6, -1e-6)
            )
            assert ahead.dtype == np.float64
            estimate = (ahead - behind) / 2e-6
            assert abs(estimate - exact) <= 1e-5 * abs(exact), (estimate, exact)
