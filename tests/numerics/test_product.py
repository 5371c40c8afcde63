"""`project` against numpy's sums."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.numerics.product import project


def random(*shape):
    generator = np.random.default_rng(sum(shape))
    return generator.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "x, weight, over, equation",
    [
        ((2, 3, 5), (7, 5), 1, "bsi,oi->bso"),
        ((2, 3, 5), (7, 4, 5), 1, "bsi,hci->bshc"),
        ((3, 4, 5), (7, 4, 5), 2, "bji,oji->bo"),
        ((5,), (2, 3, 5), 1, "i,hci->hc"),
        ((0, 5), (2, 3, 5), 1, "bi,hci->bhc"),
    ],
)
def test_sums_over_the_last_dimensions(x, weight, over, equation):
    x, weight = random(*x), random(*weight)
    expected = np.einsum(equation, x, weight)
    out = project(jnp.asarray(x), jnp.asarray(weight), over=over)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_wide_products_of_bfloat16_are_float32():
    x, weight = jnp.ones((2, 300), jnp.bfloat16), jnp.ones((3, 300), jnp.bfloat16)
    assert project(x, weight).dtype == jnp.bfloat16
    out = project(x, weight, wide=True)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 300)


def test_dimensions_that_would_be_joined_wrongly_are_refused():
    with pytest.raises(ValueError, match=r"does not end in \(2, 6\)"):
        project(jnp.ones((5, 3, 4)), jnp.ones((7, 2, 6)), over=2)
