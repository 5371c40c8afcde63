"""The whole mixture against transformers' sparse block, hashed and top-k."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx import HashRouter, TopKRouter
from dsv4_eqx.config.kinds import HASH_MOE, TOPK_MOE
from dsv4_eqx.kernels.form import use_kernels
from dsv4_eqx.model.parts import make_moe
from tests.models import QUICKLY, relative
from tests.reference import reference_config
from tests.tiny import tiny_config

CONFIG = tiny_config(hidden_size=15, moe_intermediate_size=9)
SHAPE = (2, 7, 15)
KINDS = [HASH_MOE, TOPK_MOE]


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


@functools.cache
def make(kind, dtype=jnp.float32):
    made = functools.partial(make_moe, CONFIG, kind, dtype=dtype)
    compiled = jax.jit(lambda key: made(key=key), compiler_options=QUICKLY)
    return compiled(jax.random.key(0))


def pair(kind, seed=0):
    """Ours and transformers', with the same weights."""
    layer = CONFIG.mlp_layer_types.index(kind)
    theirs = hf.DeepseekV4SparseMoeBlock(reference_config(CONFIG), layer)
    ours = make(kind)
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 7, (CONFIG.vocab_size, 3)).astype(np.int32)

    def copy(path, *tensors):
        nonlocal ours
        leaf = path(ours)
        is_table = leaf.dtype == jnp.int32
        value = table if is_table else normal(leaf.shape, rng.integers(99), 0.4)
        parts = [value] if len(tensors) == 1 else list(value)
        with torch.no_grad():
            for tensor, part in zip(tensors, parts):
                tensor.copy_(torch.tensor(part.reshape(tensor.shape)))
        ours = eqx.tree_at(path, ours, jnp.asarray(value))

    copy(lambda m: m.router.weight, theirs.gate.weight)
    if kind == HASH_MOE:
        copy(lambda m: m.router.table, theirs.gate.tid2eid)
    else:
        copy(lambda m: m.router.bias, theirs.gate.e_score_correction_bias)
    copy(lambda m: m.experts.gate_up, theirs.experts.gate_up_proj)
    copy(lambda m: m.experts.down, theirs.experts.down_proj)
    shared = theirs.shared_experts
    gate, up = shared.gate_proj.weight, shared.up_proj.weight
    copy(lambda m: m.shared.gate_up, gate, up)
    copy(lambda m: m.shared.down, shared.down_proj.weight)
    return ours, theirs


def token_ids(seed=0):
    ids = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, SHAPE[:2])
    return ids.astype(np.int32)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def run(module, *args):
    return module(*args)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def run_with_gradients(moe, x, ids, cotangent):
    """The output, and the gradients of its product with `cotangent`."""

    def loss(moe, x):
        out = moe(x, ids)
        return jnp.sum(out * cotangent), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    (_, out), grads = grad(moe, x)
    return out, *grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_mixture_and_gradients_equal_transformers(kind, seed):
    ours, theirs = pair(kind, seed)
    x, ids, cotangent = normal(SHAPE, seed + 5), token_ids(seed), normal(SHAPE, 9)
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor, torch.tensor(ids))
    (expected * torch.tensor(cotangent)).sum().backward()
    out, grads, d_x = run_with_gradients(ours, x, ids, cotangent)
    np.testing.assert_allclose(out, expected.detach(), 1e-5, 1e-5)
    shared = theirs.shared_experts
    assert relative(d_x, tensor.grad) < 5e-4
    assert relative(grads.router.weight, theirs.gate.weight.grad) < 5e-4
    assert relative(grads.experts.gate_up, theirs.experts.gate_up_proj.grad) < 5e-4
    assert relative(grads.experts.down, theirs.experts.down_proj.grad) < 5e-4
    assert relative(grads.shared.gate_up[0], shared.gate_proj.weight.grad) < 5e-4
    assert relative(grads.shared.gate_up[1], shared.up_proj.weight.grad) < 5e-4
    assert relative(grads.shared.down, shared.down_proj.weight.grad) < 5e-4


def test_mixture_equals_transformers_with_all_tokens_on_few_experts():
    ours, theirs = pair(TOPK_MOE)
    bias = np.array([0, 50, 0, 0, 60, 0, 70], np.float32)
    ours = eqx.tree_at(lambda m: m.router.bias, ours, jnp.asarray(bias))
    theirs.gate.e_score_correction_bias.copy_(torch.tensor(bias))
    x, ids = normal(SHAPE, 5), token_ids()
    routing = ours.router(jnp.asarray(x.reshape(-1, 15)), jnp.zeros(14, jnp.int32))
    np.testing.assert_array_equal(routing.experts, np.tile([6, 4, 1], (14, 1)))
    with torch.no_grad():
        expected = theirs(torch.tensor(x), torch.tensor(ids))
    out = run(ours, jnp.asarray(x), jnp.asarray(ids))
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


def test_mixture_equals_transformers_with_one_expert_for_all_slots():
    ours, theirs = pair(HASH_MOE)
    ours = eqx.tree_at(lambda m: m.router.table, ours, jnp.full((97, 3), 5, jnp.int32))
    theirs.gate.tid2eid.fill_(5)
    x, ids = normal(SHAPE, 5), token_ids()
    with torch.no_grad():
        expected = theirs(torch.tensor(x), torch.tensor(ids))
    out = run(ours, jnp.asarray(x), jnp.asarray(ids))
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


def test_each_kind_has_its_router():
    assert isinstance(pair(HASH_MOE)[0].router, HashRouter)
    assert isinstance(pair(TOPK_MOE)[0].router, TopKRouter)


def test_only_hash_routing_reads_the_token_ids():
    x, ids = jnp.asarray(normal(SHAPE)), jnp.asarray(token_ids())
    for kind, differs in zip(KINDS, (True, False)):
        ours, _ = pair(kind)
        changed = run(ours, x, ids) != run(ours, x, (ids + 1) % 97)
        assert bool(changed.any()) is differs


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_mixture_keeps_the_dtype_and_float32_parts(kind):
    moe = make(kind, jnp.bfloat16)
    assert moe.experts.gate_up.dtype == moe.router.weight.dtype == jnp.bfloat16
    if kind == TOPK_MOE:
        assert moe.router.bias.dtype == jnp.float32
    x = jnp.asarray(normal(SHAPE)).astype(jnp.bfloat16)
    out = run(moe, x, jnp.asarray(token_ids()))
    assert out.dtype == jnp.bfloat16
    assert jnp.isfinite(out.astype(jnp.float32)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_shares_are_added_up_before_they_are_rounded(kind):
    moe = make(kind, jnp.bfloat16)
    # Larger weights than a new model's, or the shared expert outweighs the others.
    larger = jax.tree.map(lambda a: 20 * a, (moe.experts, moe.shared))
    moe = eqx.tree_at(lambda m: (m.experts, m.shared), moe, larger)
    x = jnp.asarray(normal((2, 200, 15))).astype(jnp.bfloat16)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 200))
    ids = ids.astype(np.int32)
    rows = x.reshape(-1, 15)
    routing = run(moe.router, rows, ids.reshape(-1))
    routed = run(moe.experts, rows, routing.experts, routing.weights)
    expected = (routed + run(moe.shared, rows)).astype(jnp.bfloat16)
    assert routed.dtype == jnp.float32
    same = run(moe, x, ids).reshape(-1, 15) == expected
    assert same.mean() > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_router_logits_of_two_hundred_stay_finite(kind):
    ours, _ = pair(kind)
    x, ids = jnp.asarray(normal(SHAPE)), jnp.asarray(token_ids())
    largest = jnp.abs(jnp.einsum("bsd,ed->bse", x, ours.router.weight)).max()
    scaled = ours.router.weight * (200 / largest)
    ours = eqx.tree_at(lambda m: m.router.weight, ours, scaled)
    out = run_with_gradients(ours, x, ids, normal(SHAPE, 9))
    leaves = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert len(leaves) >= 7 and all(jnp.isfinite(leaf).all() for leaf in leaves)


REFUSED = (ValueError, jaxtyping.TypeCheckError)  # the latter under the type checker


def test_what_does_not_fit_the_mixture_is_refused():
    moe, x, ids = make(TOPK_MOE), jnp.asarray(normal(SHAPE)), jnp.asarray(token_ids())
    for args, text in [
        ((x[..., :14], ids), r"MoE .*\(batch, seq, dim\), where dim is 15"),
        ((x[0], ids), r"MoE .*\(batch, seq, dim\)|Array"),
        ((x.astype(jnp.bfloat16), ids), "x of dtype bfloat16, .* float32: cast one"),
        ((x, ids[:1]), r"token_ids of shape \(1, 7\).* of shape \(2, 7\)|Array"),
        ((x, ids[..., None]), r"token_ids of shape \(2, 7, 1\)|Array"),
        ((x, ids.astype(jnp.float32)), "token_ids .*float32: they must be int|Array"),
    ]:
        with pytest.raises(REFUSED, match=text):
            moe(*args)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_a_mixture_of_no_tokens_is_empty(shape):
    out = make(TOPK_MOE)(jnp.ones((*shape, 15)), jnp.zeros(shape, jnp.int32))
    assert out.shape == (*shape, 15)


@pytest.mark.parametrize("form", ["cpu", "tpu"])
def test_vmap_over_rows_and_over_models_is_the_batch(form):
    """Outputs and gradients for each row; the rows' experts differ."""
    moe, _ = pair(TOPK_MOE)
    x, ids = jnp.asarray(normal(SHAPE)), jnp.asarray(token_ids())

    def square(moe, x, ids):
        return jnp.sum(moe(x[None], ids[None]) ** 2)

    def total(moe, x, ids):
        return jnp.sum(moe(x, ids) ** 2)

    def both(moe, x, ids):
        rows = jax.vmap(jax.value_and_grad(square), (None, 0, 0))(moe, x, ids)
        models = jax.tree.map(lambda x: jnp.stack([2 * x, x]), moe)
        together = jax.value_and_grad(total)(moe, x, ids)
        return rows, together, jax.vmap(total, (0, None, None))(models, x, ids)[1]

    with use_kernels(form):
        (nats, gradients), (expected, summed), last = jax.jit(
            both, compiler_options=QUICKLY
        )(moe, x, ids)
    np.testing.assert_allclose(nats.sum(), expected, rtol=1e-5)
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    for own, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(summed)):
        bound = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(own.sum(axis=0), theirs, atol=bound)
