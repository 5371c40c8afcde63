"""The checks of what modules are called with, where no type checker comes first."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_eqx.moe.experts import validate_routing
from dsv4_eqx.numerics.validation import validate_activations, validate_ids

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
