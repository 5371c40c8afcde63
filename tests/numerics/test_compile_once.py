"""Calls outside of jit are compiled once; inside of jit nothing is added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_eqx.kernels.form import is_reference, use_kernels
from dsv4_eqx.numerics.compile_once import compiled_once
from tests.checkpoint.saving import one_layer
from tests.models import compilations, random_model, random_tokens


def sums(x, *, count=2, scale=1.0):
    """A loop whose body is a new function at every call."""
    return lax.fori_loop(0, count, lambda i, y: y + scale * x, jnp.zeros_like(x))


@pytest.mark.parametrize(
    "transform", [lambda f: f, lambda f: jax.grad(lambda x: f(x).sum())]
)
def test_nothing_is_compiled_the_second_time(transform):
    once, plain = transform(compiled_once(sums)), transform(sums)
    x, again = jnp.arange(3.0), jnp.arange(3.0)
    first = once(x)
    with compilations() as found:
        np.testing.assert_array_equal(once(again), first)
    assert len(found) == 0
    with compilations() as found:
        np.testing.assert_array_equal(plain(x), first)
    assert len(found) > 0  # what it is for


def test_other_values_shapes_and_forms_are_other_programs():
    @compiled_once
    def twice(x, *, is_negative=False):
        factor = -2 if is_negative else 2
        return factor * x + (100 if is_reference() else 0)

    x = jnp.arange(3)
    for _ in range(2):
        np.testing.assert_array_equal(twice(x), [0, 2, 4])
        np.testing.assert_array_equal(twice(x, is_negative=True), [0, -2, -4])
        np.testing.assert_array_equal(twice(np.arange(2)), [0, 2])
        with use_kernels("reference"):
            np.testing.assert_array_equal(twice(x), [100, 102, 104])


def test_a_traced_caller_gets_the_plain_function():
    x = jnp.arange(3.0)
    assert str(jax.make_jaxpr(compiled_once(sums))(x)) == str(jax.make_jaxpr(sums)(x))
    rows = jax.vmap(compiled_once(sums))(x[None])
    np.testing.assert_array_equal(rows, sums(x)[None])


def test_what_has_no_hash_is_not_compiled():
    assert compiled_once(lambda x, options: x + len(options))(1, {1, 2}) == 3


def test_errors_are_those_of_the_function():
    @compiled_once
    def refuse(x):
        raise ValueError(f"not {x.shape}")

    for _ in range(2):
        with pytest.raises(ValueError, match=r"not \(3,\)"):
            refuse(jnp.zeros(3))


def test_a_model_compiles_nothing_the_second_time():
    model, tokens = random_model(one_layer()), random_tokens(0, length=5)
    first = model(tokens)
    cache = model.init_cache(2, 9)
    hidden, _ = model.extend(tokens, cache)
    with compilations() as found:
        np.testing.assert_array_equal(model(tokens), first)
        np.testing.assert_array_equal(model.extend(tokens, cache)[0], hidden)
    assert len(found) == 0


def test_equal_values_of_other_types_are_other_programs():
    name = compiled_once(lambda x, static: x + len(type(static).__name__))
    x = jnp.zeros(())
    assert [float(name(x, one)) for one in (1, True, 1.0, np.True_)] == [3, 4, 5, 4]


def test_integers_of_64_bits_keep_their_digits():
    differ = compiled_once(lambda x: jnp.asarray(x[1:] != x[:-1]))
    assert differ(np.array([0, 2**32, 2**32])).tolist() == [True, False]
