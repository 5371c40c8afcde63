"""The cross-entropy in chunks of tokens, against all tokens at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.model.cross_entropy import cross_entropy_from_hidden, in_chunks
from tests.models import quick_jit, random_model, relative, small_config

VOCAB, DIM = 37, 12


def operands(*shape, dtype="float32"):
    """An unembedding, hidden activations and targets."""
    generator = np.random.default_rng(0)
    weight, hidden = (
        jnp.asarray(generator.standard_normal(size), dtype)
        for size in ((VOCAB, DIM), (*shape, DIM))
    )
    return weight, hidden, jnp.asarray(generator.integers(0, VOCAB, shape))


@pytest.mark.parametrize(
    "shape, chunk", [((3, 7), 4), ((3, 7), 20), ((3, 7), 1), ((5,), 2), ((), 1)]
)
def test_chunks_equal_all_tokens_at_once(shape, chunk):
    weight, hidden, targets = operands(*shape)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), "f4")

    @functools.partial(quick_jit, static_argnums=0)
    def step(chunk, weight, hidden):
        def nats(weight, hidden):
            return in_chunks(cross_entropy_from_hidden, chunk, weight, hidden, targets)

        out, pull = jax.vjp(nats, weight, hidden)
        return out, *pull(cotangent)

    found, expected = (step(size, weight, hidden) for size in (chunk, None))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and relative(one, other) <= 1e-6


def test_gradients_of_many_chunks_are_added_up_in_float32():
    weight, hidden, targets = operands(2, 300, dtype="bfloat16")

    def gradient(chunk, dtype):
        def loss(weight):
            operands = weight, hidden.astype(dtype), targets
            return in_chunks(cross_entropy_from_hidden, chunk, *operands).sum()

        found = quick_jit(jax.grad(loss))(weight.astype(dtype))
        assert found.dtype == dtype
        return found.astype(jnp.float32)

    exact = gradient(None, jnp.float32)
    assert relative(gradient(2, jnp.bfloat16), exact) <= 4e-3  # 300 chunks


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True])
def test_what_is_no_number_of_tokens_is_refused(chunk, without_shape_checks):
    model = random_model(small_config())
    targets = np.zeros((1, 3), np.int32)
    with pytest.raises(ValueError, match=rf"cross_entropy\(chunk={chunk}\)"):
        model.cross_entropy(jnp.ones((1, 3, 60)), targets, chunk=chunk)
