"""Experts and the shared expert against transformers, with the clamp at work."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx.kernels.activation import clamped_swiglu
from dsv4_eqx.model.parts import make_experts, make_shared_expert
from tests.models import QUICKLY, relative
from tests.reference import reference_config
from tests.tiny import tiny_config

CONFIG = tiny_config(hidden_size=15, moe_intermediate_size=9)  # 7 experts, limit 1
TOKENS, SLOTS = 11, 3


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def experts(seed=0):
    """Ours and transformers', with weights that drive the SwiGLU beyond its limit."""
    theirs = hf.DeepseekV4Experts(reference_config(CONFIG))
    ours = make_experts(CONFIG, key=jax.random.key(0))
    gate_up = normal(ours.gate_up.shape, seed, 0.5)
    down = normal(ours.down.shape, seed + 1, 0.3)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.tensor(gate_up.reshape(7, 18, 15)))
        theirs.down_proj.copy_(torch.tensor(down))
    arrays = jnp.asarray(gate_up), jnp.asarray(down)
    return eqx.tree_at(lambda m: (m.gate_up, m.down), ours, arrays), theirs


def shared_experts(seed=0):
    theirs = hf.DeepseekV4MLP(reference_config(CONFIG))
    ours = make_shared_expert(CONFIG, key=jax.random.key(0))
    gate_up = normal(ours.gate_up.shape, seed, 0.5)
    down = normal(ours.down.shape, seed + 1, 0.3)
    with torch.no_grad():
        theirs.gate_proj.weight.copy_(torch.tensor(gate_up[0]))
        theirs.up_proj.weight.copy_(torch.tensor(gate_up[1]))
        theirs.down_proj.weight.copy_(torch.tensor(down))
    arrays = jnp.asarray(gate_up), jnp.asarray(down)
    return eqx.tree_at(lambda m: (m.gate_up, m.down), ours, arrays), theirs


def routing(kind, seed=5):
    """The experts of each token and their weights."""
    rng = np.random.default_rng(seed)
    if kind == "distinct":
        chosen = np.stack([rng.permutation(7)[:SLOTS] for _ in range(TOKENS)])
    elif kind == "repeated":
        chosen = rng.integers(0, 7, (TOKENS, SLOTS))
        chosen[3] = 2
    else:
        chosen = np.full((TOKENS, SLOTS), dict(first=0, last=6)[kind])
    weights = rng.uniform(0.1, 1, (TOKENS, SLOTS)).astype(np.float32)
    return chosen.astype(np.int32), weights


@functools.partial(jax.jit, compiler_options=QUICKLY)
def run(module, *args):
    return module(*args)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def run_with_gradients(module, args, chosen, cotangent):
    """The output, and the gradients of its product with `cotangent`."""

    def loss(module, args):
        x, *weights = args
        out = module(x) if chosen is None else module(x, chosen, *weights)
        return jnp.sum(out * cotangent), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), grads = grad(module, args)
    return out, *grads


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["distinct", "repeated", "first", "last"])
def test_experts_and_their_gradients_equal_transformers(kind):
    ours, theirs = experts()
    (chosen, weights), x = routing(kind), normal((TOKENS, 15), 3)
    cotangent = normal((TOKENS, 15), 4)
    out, grads, d_args = run_with_gradients(ours, (x, weights), chosen, cotangent)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, weights)]
    expected = theirs(tensors[0], torch.tensor(chosen).long(), tensors[1])
    (expected * torch.tensor(cotangent)).sum().backward()
    close(out, expected.detach(), 1e-5)
    assert relative(grads.gate_up, theirs.gate_up_proj.grad) < 5e-4
    assert relative(grads.down, theirs.down_proj.grad) < 5e-4
    assert relative(d_args[0], tensors[0].grad) < 5e-4
    assert relative(d_args[1], tensors[1].grad) < 5e-4


def test_the_clamp_is_at_work_in_these_tests():
    ours, x = experts()[0], jnp.asarray(normal((TOKENS, 15), 3))
    inner = np.asarray(jnp.einsum("td,eahd->teah", x, ours.gate_up))
    for part in (inner[:, :, 0] > 1, inner[:, :, 1] > 1, inner[:, :, 1] < -1):
        assert 0.1 < part.mean() < 0.9


@pytest.mark.parametrize("leading", [(TOKENS,), (2, 5), (2, 1, 3)])
def test_shared_expert_and_its_gradients_equal_transformers(leading):
    ours, theirs = shared_experts()
    x, cotangent = normal((*leading, 15), 3), normal((*leading, 15), 4)
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor)
    (expected * torch.tensor(cotangent)).sum().backward()
    out, grads, (d_x,) = run_with_gradients(ours, (x,), None, cotangent)
    close(out, expected.detach(), 1e-5)
    assert relative(grads.gate_up[0], theirs.gate_proj.weight.grad) < 5e-4
    assert relative(grads.gate_up[1], theirs.up_proj.weight.grad) < 5e-4
    assert relative(grads.down, theirs.down_proj.weight.grad) < 5e-4
    assert relative(d_x, tensor.grad) < 5e-4


def test_clamped_swiglu_clamps_the_gate_from_above_only():
    gate = np.array([-30, -3, -1, 0, 0.5, 2, 30], np.float32)
    up = np.array([-30, -2, 0.5, 1, 2, 30, -2], np.float32)
    out = clamped_swiglu(jnp.asarray(np.concatenate([gate, up])), 1.5)
    gate, up = np.minimum(gate, 1.5).astype(np.float64), np.clip(up, -1.5, 1.5)
    close(out, gate / (1 + np.exp(-gate)) * up, 1e-6)


def test_clamped_swiglu_has_no_gradient_beyond_the_limit():
    x = jnp.array([-3.0, 2.0, 0.5, 0.5, 0.5, 0.5, 2.0, -2.0])
    grad = jax.grad(lambda x: jnp.sum(clamped_swiglu(x, 1.0)))(x)
    np.testing.assert_array_equal(grad != 0, [1, 0, 1, 1, 1, 1, 0, 0])


def test_clamped_swiglu_is_finite_at_extremes():
    x = jnp.array([-3e38, 3e38, 0.0, -200.0, 3e38, -3e38, 0.0, 200.0])
    value, grad = jax.value_and_grad(lambda x: jnp.sum(clamped_swiglu(x, 1.0)))(x)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_clamped_swiglu_of_bfloat16_is_float32():
    x = jnp.asarray(normal((5, 14))).astype(jnp.bfloat16)
    out = clamped_swiglu(x, 1.0)
    assert out.dtype == jnp.float32
    assert (out == clamped_swiglu(x.astype(jnp.float32), 1.0)).all()


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def one_expert(x, gate_up, down, weight, stored):
    """One expert in float32, of which `stored` changes what the products leave."""
    before = stored(jnp.einsum("td,ahd->tah", x, gate_up).reshape(len(x), -1))
    return stored(stored(clamped_swiglu(before, 1.0) * weight) @ down.T)


def all_experts(wide, x, chosen, weights, stored):
    total = jnp.zeros_like(x)
    for expert in range(len(wide.down)):
        weight = jnp.where(chosen == expert, weights, 0).sum(-1, keepdims=True)
        matrices = wide.gate_up[expert], wide.down[expert]
        total += one_expert(x, *matrices, weight, stored)
    return total


def test_bfloat16_experts_round_no_more_than_their_products_do():
    x = rounded(jnp.asarray(normal((200, 15), 3)))
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(7)[:SLOTS] for _ in x])
    weights = jnp.asarray(rng.uniform(0.1, 1, chosen.shape), jnp.float32)
    ours = jax.tree.map(lambda a: a.astype(jnp.bfloat16), experts()[0])
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), ours)
    out = run(ours, x.astype(jnp.bfloat16), jnp.asarray(chosen), weights)
    exact = all_experts(wide, x, chosen, weights, lambda a: a)
    allowed = relative(all_experts(wide, x, chosen, weights, rounded), exact)
    assert out.dtype == jnp.float32
    assert relative(out, exact) <= 1.02 * allowed
    ours = jax.tree.map(lambda a: a.astype(jnp.bfloat16), shared_experts()[0])
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), ours)
    out = run(ours, x.astype(jnp.bfloat16))
    exact = one_expert(x, wide.gate_up, wide.down, 1.0, lambda a: a)
    allowed = relative(one_expert(x, wide.gate_up, wide.down, 1.0, rounded), exact)
    assert out.dtype == jnp.float32
    assert relative(out, exact) <= 1.02 * allowed


def test_a_token_does_not_depend_on_its_neighbours():
    ours, _ = experts()
    chosen, weights = (jnp.asarray(a) for a in routing("distinct"))
    x = jnp.asarray(normal((TOKENS, 15), 3))
    changed = x.at[4].multiply(3.0)
    same = run(ours, x, chosen, weights) == run(ours, changed, chosen, weights)
    np.testing.assert_array_equal(same.all(axis=-1), np.arange(TOKENS) != 4)


def test_order_of_the_slots_does_not_matter():
    ours, _ = experts()
    chosen, weights = (jnp.asarray(a) for a in routing("distinct"))
    x = jnp.asarray(normal((TOKENS, 15), 3))
    turned = run(ours, x, chosen[:, ::-1], weights[:, ::-1])
    close(turned, run(ours, x, chosen, weights), 1e-6)


REFUSED = (ValueError, jaxtyping.TypeCheckError)  # the latter under the type checker


@pytest.mark.parametrize(
    "chosen, weights", [((11, 3), (11, 1)), ((11, 1), (11, 3)), ((5, 3), (5, 3))]
)
def test_experts_refuse_a_routing_that_does_not_fit(chosen, weights):
    x = jnp.ones((TOKENS, 15))
    with pytest.raises(REFUSED, match="x has 11 tokens|Array"):
        experts()[0](x, jnp.zeros(chosen, jnp.int32), jnp.ones(weights))


@pytest.mark.parametrize("shape", [(TOKENS, 14), (TOKENS, 1), (15,)])
def test_experts_refuse_other_channels(shape):
    x, (chosen, weights) = jnp.ones(shape), map(jnp.asarray, routing("distinct"))
    with pytest.raises(REFUSED, match=r"\(tokens, dim\), where dim is 15|Array"):
        experts()[0](x, chosen, weights)
    if shape != (15,):
        with pytest.raises(ValueError, match=r"SharedExpert.* dim\), where dim is 15"):
            shared_experts()[0](x)


@pytest.mark.parametrize("names", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_experts_refuse_another_dtype(names):
    x = jnp.ones((TOKENS, 15), names[0])
    args = (x, *map(jnp.asarray, routing("distinct")))
    for module, args in ((experts()[0], args), (shared_experts()[0], (x,))):
        module = jax.tree.map(lambda leaf: leaf.astype(names[1]), module)
        with pytest.raises(ValueError, match="x of dtype {}.*{}: cast".format(*names)):
            module(*args)
