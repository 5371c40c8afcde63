"""The hyper-connections' small products: Sinkhorn's iterations and mixtures of streams.

Paper section 2.2. Both are cheap, and slow where a compiler is left alone with sums
over a few elements in the middle of an array.
"""

import functools
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv4_eqx.kernels.form import current_form, is_reference
from dsv4_eqx.numerics.precision import at_least_float32, wide_einsum
from dsv4_eqx.numerics.validation import invalid_argument, is_int
from dsv4_eqx.numerics.varying import match_varying

# Of Sinkhorn's 39, on machines that want large steps.
_ROUNDS_IN_A_STEP: Final = 13


def sinkhorn(
    logits: Float[Array, "rows columns *batch"], *, iterations: int, eps: float
) -> Float[Array, "rows columns *batch"]:
    """Nearly doubly stochastic matrices: columns sum to 1, rows approach it.

    Softmax over the columns' index, then columns, `iterations` times, and rows are
    divided by their sums in turn, ending with the columns (paper section 2.2, released
    kernel). `eps` is added to the softmax and to every sum.
    """
    if not is_int(iterations) or iterations < 0:
        raise invalid_argument(
            "sinkhorn", "iterations", iterations, "an integer of at least 0"
        )
    matrix = jax.nn.softmax(logits, axis=1) + eps
    if iterations == 0:
        return matrix

    rounds = 2 * iterations - 1
    if current_form().untried:
        from dsv4_eqx.kernels.hopper_sinkhorn import divide_and_turn, fits_sinkhorn

        if fits_sinkhorn(matrix, rounds):
            return jnp.swapaxes(divide_and_turn(matrix, rounds, eps), 0, 1)
    by_sums = _by_column_sums_reference if is_reference() else _by_column_sums

    def divide_by_sums(matrix, _):
        return jnp.swapaxes(by_sums(matrix, eps), 0, 1), None

    # On a GPU some rounds are one step; all in one would take minutes to compile.
    unroll = 1 if current_form().stops_early else _ROUNDS_IN_A_STEP
    matrix, _ = lax.scan(divide_by_sums, matrix, length=rounds, unroll=unroll)
    return jnp.swapaxes(matrix, 0, 1)


def _by_column_sums_reference(matrix, eps):
    return matrix / (jnp.sum(matrix, axis=0, keepdims=True) + eps)


# Sums of slices: XLA on CPU is many times as slow at the derivative of a sum over a
# leading dimension.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_column_sums(matrix, eps):
    return matrix / (sum(matrix[1:, None], matrix[:1]) + eps)


def _by_column_sums_forward(matrix, eps):
    divided = _by_column_sums(matrix, eps)
    return divided, (matrix, divided)


def _by_column_sums_backward(eps, residuals, cotangent):
    matrix, divided = residuals
    weighted = cotangent * divided
    # With a first dimension of 1: ranks may be kept from promotion.
    total = sum(matrix[1:, None], matrix[:1]) + eps
    return ((cotangent - sum(weighted[1:, None], weighted[:1])) / total,)


_by_column_sums.defvjp(_by_column_sums_forward, _by_column_sums_backward)


def mix(
    weights: Float[Array, "*batch sources targets"],
    streams: Float[Array, "*batch sources dim"],
) -> Float[Array, "*batch targets dim"]:
    r"""$Y_k = \sum_j w_{jk} X_j$ for each token, at least float32."""
    if is_reference():
        wide = at_least_float32(streams)
        return wide_einsum("...jk,...jd->...kd", weights.astype(wide.dtype), wide)
    return _mix(*match_varying(weights, streams))


# XLA on CPU is slow to reduce a dimension in the middle and slower to differentiate it:
# sums of slices here, and one product for the weights' gradient.
@jax.custom_vjp
def _mix(weights, streams):
    wide = at_least_float32(streams)
    terms = [
        weights[..., j, :, None] * wide[..., j, None, :] for j in range(wide.shape[-2])
    ]
    return sum(terms[1:], terms[0])


def _mix_forward(weights, streams):
    return _mix(weights, streams), (weights, streams)


def _mix_backward(residuals, cotangent):
    weights, streams = residuals
    d_weights = wide_einsum("...jd,...kd->...jk", at_least_float32(streams), cotangent)
    d_streams = _mix(jnp.swapaxes(weights, -1, -2), cotangent)
    return d_weights, d_streams.astype(streams.dtype)


_mix.defvjp(_mix_forward, _mix_backward)
