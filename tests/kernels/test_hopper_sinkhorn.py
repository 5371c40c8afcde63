"""Sinkhorn's rounds in Hopper's kernel, interpreted, against plain divisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dsv4_eqx.kernels import hopper_sinkhorn
from dsv4_eqx.kernels.form import use_kernels
from dsv4_eqx.kernels.hopper_sinkhorn import divide_and_turn, fits_sinkhorn
from dsv4_eqx.kernels.mix import sinkhorn
from tests.models import QUICKLY

pytestmark = pytest.mark.slow  # the interpreter

EPS = 1e-2  # large enough to be seen
CHECKED = InterpretGPUParams(detect_races=True)


def numbers(shape):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(0.01, 1, shape), jnp.float32)


def plain(matrix, rounds):
    for _ in range(rounds):
        matrix = jnp.swapaxes(matrix / (matrix.sum(0, keepdims=True) + EPS), 0, 1)
    return matrix


# Tokens that fill two blocks not quite, and the released model's rounds; an odd size.
@pytest.mark.parametrize("shape, rounds", [((4, 4, 3, 43), 39), ((3, 3, 5), 1)])
def test_rounds_and_their_gradient(shape, rounds):
    matrix, cotangent = numbers(shape), numbers(shape[::-1]).T - 0.5
    found, pull = jax.vjp(lambda m: divide_and_turn(m, rounds, EPS, CHECKED), matrix)
    wanted, pull_plain = jax.vjp(functools.partial(plain, rounds=rounds), matrix)
    np.testing.assert_allclose(found, wanted, 1e-5)
    gradient, exact = pull(cotangent)[0], pull_plain(cotangent)[0]
    np.testing.assert_allclose(gradient, exact, 0, 1e-6 * np.abs(exact).max())


def test_the_form_that_has_it_gives_sinkhorn(monkeypatch):
    called = []

    def interpreted(matrix, rounds, eps):
        called.append(rounds)
        return divide_and_turn(matrix, rounds, eps, InterpretGPUParams())

    monkeypatch.setattr(hopper_sinkhorn, "divide_and_turn", interpreted)
    logits = jnp.log(numbers((4, 4, 6)))
    run = functools.partial(sinkhorn, logits, iterations=3, eps=EPS)
    with use_kernels("hopper-next"):
        found = jax.jit(run, compiler_options=QUICKLY)()
    assert called == [5]
    with use_kernels("reference"):
        np.testing.assert_allclose(found, run(), 1e-6)


def test_what_does_not_fit_takes_the_other_way():
    matrix = numbers((4, 4, 1))
    assert fits_sinkhorn(matrix, 39)
    assert not fits_sinkhorn(matrix, 150)
    assert not fits_sinkhorn(matrix.astype(jnp.bfloat16), 39)
