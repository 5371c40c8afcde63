"""Tokens to the experts' rows, and the rows back to sums of tokens.

The two are each other's transpose. Left alone, JAX would differentiate the first one by
scattering rows, which is slow on a CPU and adds in no fixed order on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv4_eqx.kernels.form import is_reference
from dsv4_eqx.numerics.precision import at_least_float32


def dispatch(
    x: Float[Array, "tokens dim"],
    order: Int[Array, " rows"],
    inverse: Int[Array, " rows"],
    slots: int,
) -> Float[Array, "rows dim"]:
    """A row for each token and slot, in the experts' order.

    `order` says which slot, counted through all tokens, each row is; `inverse` the row
    of each slot.
    """
    if is_reference():
        return x[order // slots]
    return _dispatch(x, order, inverse, slots)


def combine(
    rows: Float[Array, "rows dim"],
    order: Int[Array, " rows"],
    inverse: Int[Array, " rows"],
    slots: int,
) -> Float[Array, "tokens dim"]:
    """Each token's sum over its slots, at least float32."""
    if is_reference():
        slotted = at_least_float32(rows[inverse]).reshape(-1, slots, rows.shape[1])
        return jnp.sum(slotted, axis=1)
    return _combine(rows, order, inverse, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x, order, inverse, slots):
    return x[order // slots]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(rows, order, inverse, slots):
    rows = at_least_float32(rows[inverse]).reshape(-1, slots, rows.shape[1])
    # Slices, not a sum over a dimension in the middle, which XLA on CPU is slow at.
    return sum((rows[:, slot] for slot in range(1, slots)), rows[:, 0])


def _dispatch_forward(x, order, inverse, slots):
    return _dispatch(x, order, inverse, slots), (order, inverse)


def _dispatch_backward(slots, places, d_rows):
    d_x: Array = _combine(d_rows, *places, slots)
    return d_x.astype(d_rows.dtype), None, None


def _combine_forward(rows, order, inverse, slots):
    return _combine(rows, order, inverse, slots), (order, inverse, rows[:0])


def _combine_backward(slots, residuals, d_out):
    *places, no_rows = residuals
    return _dispatch(d_out.astype(no_rows.dtype), *places, slots), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_combine.defvjp(_combine_forward, _combine_backward)
