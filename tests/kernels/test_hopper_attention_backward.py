"""The gradients of Hopper's attention, interpreted, against those of plain products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dsv4_eqx.kernels.hopper_attention_backward import attend_lists_backward
from tests.models import QUICKLY

pytestmark = pytest.mark.slow  # the interpreter, or whole models

# Queries, heads, head_dim, keys in a list, rows of window and entries. A tile of 64
# heads takes the interpreter some seconds, whatever its size.
SHAPES = {
    "two tiles, few channels, no entries": (1, 128, 64, 9, 5, 0),
    "one whole tile and block": (1, 64, 512, 64, 20, 31),
}


def operands(shape, dtype=jnp.float32):
    """Queries, keys, lists and a sink; some keys are repeated, some lists shorter."""
    num_queries, heads, dim, num_keys, *rows = shape
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    floats = normal(num_queries, heads, dim), *(normal(n, dim) for n in rows)
    lists = rng.integers(0, sum(rows), (num_queries, num_keys))
    lists[rng.random(lists.shape) < 0.3] = -1
    lists[:, 1:4] = 0
    used = np.full(num_queries, num_keys)
    used[1:] = num_keys // 2
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    others = (jnp.asarray(x, jnp.int32) for x in (lists, used))
    return floats, *others, sinks, normal(num_queries, heads, dim)


def attend(queries, window, entries, lists, used, sinks, scale):
    """By plain products; also the logarithm of the softmax's sum."""
    valid = (lists >= 0) & (jnp.arange(lists.shape[1])[None] < used[:, None])
    keys = jnp.concatenate([window, entries])[jnp.where(valid, lists, 0)]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("qhc,qkc->qhk", queries, keys) * scale
    scores = jnp.where(valid[:, None], scores, -jnp.inf)
    column = jnp.broadcast_to(sinks[:, None], (*scores.shape[:2], 1))
    with_sink = jnp.concatenate([scores, column], axis=2)
    total = jax.nn.logsumexp(with_sink, axis=2)
    weights = jnp.exp(scores - jnp.maximum(total, -1e30)[..., None])
    weights = weights.astype(queries.dtype)
    out = product("qhk,qkc->qhc", weights, keys)
    return out.astype(queries.dtype), total


@functools.partial(jax.jit, static_argnames="scale", compiler_options=QUICKLY)
def reference(floats, lists, used, sinks, cotangent, scale):
    """Output, the logarithm of the sum, the gradients, and that of the sum."""

    def run(*floats):
        return attend(*floats, lists, used, sinks, scale)

    (out, total), pull = jax.vjp(run, *floats)
    d_total = jnp.where(total == -jnp.inf, 0, cotangent[..., 0].astype(total.dtype))
    return out, total, pull((cotangent, d_total)), d_total


def ours(floats, lists, used, sinks, cotangent, scale, **options):
    """The kernel's gradients, of the reference's output."""
    out, total, _, d_total = reference(floats, lists, used, sinks, cotangent, scale)
    given = *floats, lists, used, out, total, cotangent, d_total
    params = InterpretGPUParams(**options)
    return attend_lists_backward(*given, scale=scale, interpret=params)


def check(got, expected, floats):
    for x, wanted, array in zip(got, expected, floats, strict=True):
        assert x.shape == array.shape and x.dtype == jnp.float32
        limit = 1e-5 * max(1, np.abs(wanted).max(initial=0))
        np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=limit)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_equal_those_of_plain_products(shape):
    given = operands(shape)
    *_, expected, _ = reference(*given, scale=0.2)
    check(ours(*given, scale=0.2), expected, given[0])


def test_lists_may_be_empty_and_warpgroups_do_not_race():
    floats, lists, used, sinks, cotangent = operands((2, 5, 128, 150, 4, 3))
    # Of the first query nothing takes part in the softmax of the first head.
    lists, sinks = lists.at[0].set(-1), sinks.at[0].set(-jnp.inf)
    given = floats, lists, used, sinks, cotangent
    *_, expected, _ = reference(*given, scale=0.2)
    got = ours(*given, scale=0.2, detect_races=True)
    check(got, expected, floats)
    np.testing.assert_array_equal(got[0][0], 0)


def test_bfloat16_is_as_near_as_plain_products_are():
    given = operands((1, 5, 128, 70, 40, 30), jnp.bfloat16)
    floats, lists, used, sinks, cotangent = given
    exact = [x.astype(jnp.float32) for x in floats]
    exact = exact, lists, used, sinks, cotangent.astype(jnp.float32)
    *_, exact, _ = reference(*exact, scale=0.1)
    *_, plain, _ = reference(*given, scale=0.1)
    got = ours(*given, scale=0.1)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for own, other, wanted in zip(got, plain, exact, strict=True):
        own, other = (jnp.abs(x.astype(jnp.float32) - wanted) for x in (own, other))
        assert jnp.max(own) <= 2 * jnp.max(other)
        assert jnp.mean(own) <= 1.5 * jnp.mean(other)
