"""Initial weights are those of `jax.random.normal`, however they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.numerics import initial
from dsv4_eqx.numerics.initial import normal, stack
from tests.models import compilations

SHAPES = [(), (1,), (7, 3), (65, 127), (5, 3, 1000), (8192,), (8193,)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_numbers_are_those_of_jax_to_the_bit(dtype):
    for seed, shape in enumerate(SHAPES):
        key = jax.random.key(seed)
        wanted = 0.3 * jax.random.normal(key, shape, dtype)
        found = normal(key, shape, dtype, std=0.3)
        assert found.dtype == dtype and isinstance(found, jax.Array)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "key", [jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=["raw", "rbg"]
)
def test_numbers_of_other_keys_are_those_of_jax(key):
    found = normal(key, (7, 3), jnp.float32, std=0.3)
    np.testing.assert_array_equal(found, 0.3 * jax.random.normal(key, (7, 3)))


def test_numbers_inside_of_jit_are_those_of_jax_there():
    ours = jax.jit(lambda key: normal(key, (7, 3), jnp.float32, std=0.3))
    theirs = jax.jit(lambda key: 0.3 * jax.random.normal(key, (7, 3)))
    key = jax.random.key(3)
    np.testing.assert_array_equal(ours(key), theirs(key))


def test_arrays_longer_than_all_lengths_are_drawn_as_they_are(monkeypatch):
    monkeypatch.setattr(initial, "_LENGTHS", (4, 8))
    key = jax.random.key(1)
    found = normal(key, (3, 3), jnp.float32, std=2.0)
    np.testing.assert_array_equal(found, 2.0 * jax.random.normal(key, (3, 3)))


@pytest.mark.parametrize("most", [4, 100])
def test_stacked_modules_are_those_of_their_keys(most, monkeypatch):
    monkeypatch.setattr(initial, "_LENGTHS", (2, most))
    make = lambda key: {"a": normal(key, (3, 2), jnp.float32, std=1.0)}  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    found = stack(make, keys)["a"]
    np.testing.assert_array_equal(found, jnp.stack([make(key)["a"] for key in keys]))
    in_jit = jax.jit(lambda keys: stack(make, keys))(keys)["a"]
    np.testing.assert_array_equal(in_jit, found)


def test_few_programs_draw_many_shapes():
    key = jax.random.key(0)
    normal(key, (8000,), jnp.float32, std=1.0)
    with compilations() as found:
        for size in range(1, 40):
            normal(key, (size, 2), jnp.float32, std=1.0)
    assert len(found) == 0


def test_a_key_from_outside_of_a_traced_function_is_drawn_from():
    key = jax.random.key(7)

    def make():
        return normal(key, (3, 5), jnp.float32, std=0.3)

    np.testing.assert_allclose(jax.jit(make)(), make(), rtol=1e-6)
    assert jax.eval_shape(make).shape == (3, 5)
    keys = jax.random.split(key, 2)
    stacked = jax.eval_shape(lambda: stack(lambda key: make(), keys))
    assert stacked.shape == (2, 3, 5)
