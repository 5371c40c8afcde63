"""Newton-Schulz: which singular values come to 1, and how near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.training.muon import COEFFICIENTS, orthogonalize
from tests.models import QUICKLY, relative

run = jax.jit(orthogonalize, compiler_options=QUICKLY)


def random_orthogonal(generator, *shape):
    """Matrices with orthonormal columns."""
    return np.linalg.qr(generator.standard_normal(shape))[0]


def matrices(generator, leading, rows, columns, smallest):
    """Matrices of norm 1 with singular values from `smallest`; their orthogonal parts.

    None is above 0.9: the others have to fit in beside it.
    """
    size = min(rows, columns)
    values = np.geomspace(smallest, 0.5, size)
    values[-1] = np.sqrt(1 - np.sum(values[:-1] ** 2))
    left = random_orthogonal(generator, *leading, rows, size)
    right = random_orthogonal(generator, *leading, columns, size)
    right = np.swapaxes(right, -1, -2)
    return (left * values) @ right, left @ right


def test_coefficients_bring_values_from_a_thousandth_to_one():
    values = np.geomspace(1e-3, 1, 100_001)
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    assert np.abs(values - 1).max() < 6e-4


@pytest.mark.parametrize(
    "shape", [(5, 9), (9, 5), (6, 6), (3, 2, 4, 7)], ids=lambda shape: str(shape)
)
def test_singular_values_of_matrices_come_to_one(shape):
    generator = np.random.default_rng(0)
    x, expected = matrices(generator, shape[:-2], *shape[-2:], smallest=1e-3)
    np.testing.assert_allclose(np.linalg.norm(x, axis=(-2, -1)), 1)
    found = np.asarray(run(jnp.asarray(x, jnp.float32)), "f8")
    values = np.linalg.svd(found, compute_uv=False)
    assert np.abs(values - 1).max() < 6e-4
    # The singular vectors stay; rounding moves those of the smallest value most.
    assert relative(found, expected) < 1e-3


def test_each_matrix_is_alone():
    x = np.random.default_rng(1).standard_normal((3, 2, 4, 7)).astype(np.float32)
    together = np.asarray(run(x))
    for index in np.ndindex(3, 2):
        assert relative(run(x[index]), together[index]) < 1e-5


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e30])
def test_size_of_gradients_does_not_matter(scale):
    x = np.random.default_rng(2).standard_normal((5, 8))
    found = run(jnp.asarray(x * scale, jnp.float32))
    assert relative(found, run(jnp.asarray(x, jnp.float32))) < 1e-4


def test_zeros_stay_zeros():
    x = jnp.zeros((2, 3, 5)).at[0].set(jax.random.normal(jax.random.key(0), (3, 5)))
    found = run(x)
    assert bool((found[1] == 0).all()) and bool(jnp.isfinite(found[0]).all())
