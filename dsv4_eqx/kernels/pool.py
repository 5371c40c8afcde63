"""The compressor's pooling: a softmax over a window's tokens, channel by channel.

Paper section 2.3.1, eq. 9 to 12 and 20 to 23. With two series of channels, the first
one of a window's tokens is pooled in the next window's entry, with the second one of
that window's own tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv4_eqx.kernels.form import current_form, is_reference
from dsv4_eqx.numerics.varying import match_varying


def pool_windows_reference(
    values: Float[Array, "batch windows ratio series head_dim"],
    gates: Float[Array, "batch windows ratio series head_dim"],
) -> Float[Array, "batch windows head_dim"]:
    """What `pool_windows` computes, in a few lines."""
    if gates.shape[3] == 1:
        weights = jax.nn.softmax(gates[:, :, :, 0], axis=2)
        return jnp.sum(weights * values[:, :, :, 0], axis=2)

    def both(x, fill):  # the tokens of the window before, then the window's own
        before = jnp.pad(
            x[:, :-1, :, 0], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=fill
        )
        return jnp.concatenate([before, x[:, :, :, 1]], axis=2)

    weights = jax.nn.softmax(both(gates, -jnp.inf), axis=2)
    return jnp.sum(weights * both(values, 0), axis=2)


def pool_windows(
    values: Float[Array, "batch windows ratio series head_dim"],
    gates: Float[Array, "batch windows ratio series head_dim"],
) -> Float[Array, "batch windows head_dim"]:
    """One entry of each of consecutive windows; before the first there is nothing."""
    if is_reference():
        return pool_windows_reference(values, gates)
    return _pool(*match_varying(values, gates), current_form())


class _Softmax(NamedTuple):
    """A softmax-weighted sum over some tokens, relative to the exponential of `top`."""

    weighted: Float[Array, "*shape"]
    total: Float[Array, "*shape"]
    top: Float[Array, "*shape"]

    def join(self, other: "_Softmax") -> "_Softmax":
        top = jnp.maximum(self.top, other.top)
        own, others = jnp.exp(self.top - top), jnp.exp(other.top - top)
        return _Softmax(
            self.weighted * own + other.weighted * others,
            self.total * own + other.total * others,
            top,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pool(values, gates, form):
    return _pool_forward(values, gates, form)[0]


def _pool_forward(values, gates, form):
    if form.stops_early:
        softmax = _softmax_by_token(values, gates)
    else:
        top = jnp.max(gates, axis=2)
        weights = jnp.exp(gates - top[:, :, None])
        weighted, total = jnp.sum(weights * values, axis=2), jnp.sum(weights, axis=2)
        softmax = _Softmax(weighted, total, top)
    *first, softmax = [
        jax.tree.map(lambda x, n=n: x[:, :, n], softmax) for n in range(gates.shape[3])
    ]
    for others in first:  # of two series, the first belongs to the next window
        before = map(_shifted, others, (1, 1, 1), (0, 0, -jnp.inf))
        softmax = softmax.join(_Softmax(*before))
    pooled = softmax.weighted / softmax.total
    return pooled, (values, gates, pooled, softmax.top + jnp.log(softmax.total))


def _softmax_by_token(values, gates):
    """Token by token: XLA on CPU is slow to reduce a dimension in the middle."""
    ratio = gates.shape[2]

    def token(i):
        gate = gates[:, :, i]
        return _Softmax(values[:, :, i], jnp.ones_like(gate), gate)

    return lax.fori_loop(
        1, ratio, lambda i, softmax: softmax.join(token(i)), token(0), unroll=ratio <= 8
    )


def _pool_backward(form, residuals, d_pooled):
    """From the pooled entry and the softmax's total: there is nothing to reduce."""
    values, gates, pooled, log_total = residuals

    def for_tokens(x, past_end):
        """For each window's tokens and series, of the window it was pooled in."""
        if gates.shape[3] == 1:
            return x[:, :, None, None]
        return jnp.stack([_shifted(x, -1, past_end), x], axis=2)[:, :, None]

    weights = jnp.exp(gates - for_tokens(log_total, jnp.inf))
    d_values = weights * for_tokens(d_pooled, 0)
    return d_values, d_values * (values - for_tokens(pooled, 0))


_pool.defvjp(_pool_forward, _pool_backward)


def _shifted(
    x: Float[Array, "batch windows head_dim"], by: int, fill: float
) -> Float[Array, "batch windows head_dim"]:
    """Each window's predecessor, or for `by = -1` its successor; `fill` for none."""
    end = jnp.full_like(x[:, :1], fill)
    if by == 1:
        return jnp.concatenate([end, x], axis=1)[:, :-1]
    return jnp.concatenate([x, end], axis=1)[:, 1:]
