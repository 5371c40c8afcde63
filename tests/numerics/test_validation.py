"""The checks of what modules are called with, where no type checker comes first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.moe.experts import validate_routing
from dsv4_eqx.numerics.validation import (
    is_int,
    is_number,
    validate_activations,
    validate_floating,
    validate_ids,
    validate_int,
    validate_number,
)

WEIGHT = jnp.ones((3, 7))
DIMS = ("batch", "seq", "dim")


def test_what_fits_passes_abstract_or_not():
    def check(x, ids):
        validate_activations("F", x, WEIGHT)
        validate_activations("F", x, WEIGHT, DIMS)
        validate_ids("F", "ids", ids, x.shape[:2])

    check(jnp.ones((2, 5, 7)), jnp.ones((2, 5), jnp.int8))
    validate_activations("F", jnp.ones(7), WEIGHT)
    jax.eval_shape(check, jnp.ones((2, 5, 7)), jnp.ones((2, 5), jnp.uint32))


@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 5, 6), (5, 7), (7,), ()])
def test_other_activations_are_refused(shape):
    with pytest.raises(ValueError, match=r"F was called.*\(batch, seq, dim\).* is 7"):
        validate_activations("F", jnp.ones(shape), WEIGHT, DIMS)


@pytest.mark.parametrize("shape", [(), (2, 1), (6,)])
def test_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"it must be \(..., dim\), where dim is 7"):
        validate_activations("F", jnp.ones(shape), WEIGHT)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "bool"])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"x of dtype {dtype}, .*float32: cast one"):
        validate_activations("F", jnp.ones((2, 5, 7), dtype), WEIGHT)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1), (2, 5, 1), (5, 2)])
def test_ids_of_another_shape_are_refused(shape):
    match = r"with ids of shape .*: they must be integers of shape \(2, 5\)"
    with pytest.raises(ValueError, match=match):
        validate_ids("F", "ids", jnp.ones(shape, jnp.int32), (2, 5))


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_ids_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype {dtype}: they must be integers"):
        validate_ids("F", "ids", jnp.ones((2, 5), dtype), (2, 5))


@pytest.mark.parametrize(
    "chosen, weights",
    [((5, 3), (5, 1)), ((5, 1), (5, 3)), ((4, 3), (4, 3)), ((5,), (5,))],
)
def test_a_routing_that_does_not_fit_is_refused(chosen, weights):
    with pytest.raises(ValueError, match="x has 5 tokens"):
        validate_routing(
            jnp.ones((5, 7)), jnp.ones(chosen, jnp.int32), jnp.ones(weights)
        )


SEVEN = [7, np.int64(7), np.uint8(7), np.array(7), jnp.array(7)]
# Not even of an array without dimensions is a boolean or a text a number.
NO_NUMBERS = ["7", None, True, 7j, np.bool_(True), np.array(True), np.str_("7")]
NO_NUMBERS += [[7], np.array([7]), jnp.array([7]), jax.random.key(7), float("nan")]


@pytest.mark.parametrize("value", SEVEN, ids=repr)
def test_integers_of_every_kind_become_pythons(value):
    for found in (validate_int("F", "n", value), validate_int("F", "n", value, most=7)):
        assert type(found) is int and found == 7
    assert type(validate_number("F", "x", value)) is float


@pytest.mark.parametrize(
    "value",
    [0.5, np.float64(0.5), np.float16(0.5), np.array(0.5), jnp.array(0.5, "bfloat16")],
    ids=repr,
)
def test_numbers_of_every_kind_become_pythons(value):
    found = validate_number("F", "x", value, above=0.25)
    assert type(found) is float and found == 0.5
    with pytest.raises(ValueError, match=r"F\(n=.*\): must be an integer, at least 1"):
        validate_int("F", "n", value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"(?s)F\(n=.*must be an integer in \[0, 9\]"):
        validate_int("F", "n", value, least=0, most=9)
    with pytest.raises(ValueError, match=r"(?s)F\(x=.*must be a number .*, at least 0"):
        validate_number("F", "x", value)
    assert not is_int(value) and not is_number(value)


def test_bounds_belong_to_what_is_allowed_but_above_does_not():
    assert validate_int("F", "n", 0, least=0) == 0 == validate_number("F", "x", 0)
    for value in (-1, np.int64(10), 10**400):
        with pytest.raises(ValueError, match=r"must be an integer in \[0, 9\]"):
            validate_int("F", "n", value, least=0, most=9)
    for value in (1, np.float32(1), -2.0, float("inf"), 1e39, 10**400):
        with pytest.raises(ValueError, match="must be .*, above 1"):
            validate_number("F", "x", value, above=1)


def test_traced_numbers_are_refused():
    with pytest.raises(ValueError, match="n=.*must be an integer"):
        jax.jit(lambda n: validate_int("F", "n", n))(7)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_arrays_that_are_not_floating_are_refused(dtype):
    validate_floating("F", jnp.ones(3, "bfloat16"))
    with pytest.raises(ValueError, match=f"F was called with y of dtype {dtype}: it"):
        validate_floating("F", jnp.ones(3, dtype), "y")
