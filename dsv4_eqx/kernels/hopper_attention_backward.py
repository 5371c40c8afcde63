"""Gradients of attention over lists of keys, on Hopper GPUs.

The tile of `hopper_attention` again: 64 heads of one query, and the keys that its list
names, which are the values too. With S the scores and P the weights of the softmax,

    P  = exp(scale S - log_sum_exp)           S  = Q K^T
    dS = scale P (dP - mean)                  dP = d_out K^T
                                              mean = sum(out d_out) - d_log_sum_exp
    d_queries += dS K                         d_keys = dS^T Q + P^T d_out

Gradients of keys are added up in global memory, in float32 and in no fixed order: two
runs may differ in the last bits.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from dsv4_eqx.kernels.batching import one_by_one
from dsv4_eqx.kernels.hopper_attention import padded
from dsv4_eqx.kernels.hopper_attention_backward_kernel import (
    Memory,
    Sizes,
    differentiate_tile,
    memory_and_barriers,
)
from dsv4_eqx.kernels.hopper_attention_kernel import HEADS, LOG2_E
from dsv4_eqx.kernels.hopper_gather import BLOCK
from dsv4_eqx.numerics.varying import match_varying, shape_varying_like


def attend_lists_backward(
    queries: Float[Array, "queries heads head_dim"],
    window: Float[Array, "window_rows head_dim"],
    entries: Float[Array, "entry_rows head_dim"],
    lists: Int[Array, "queries keys"],
    num_keys: Int[Array, " queries"],
    out: Float[Array, "queries heads head_dim"],
    log_sum_exp: Float32[Array, "queries heads"],
    d_out: Float[Array, "queries heads head_dim"],
    d_log_sum_exp: Float32[Array, "queries heads"],
    *,
    scale: float,
    interpret: Any = None,  # parameters of Pallas's interpreter, for tests
) -> tuple[
    Float[Array, "queries heads head_dim"],
    Float32[Array, "window_rows head_dim"],
    Float32[Array, "entry_rows head_dim"],
]:
    """Gradients of `attend_lists` by queries, window keys and entries. `log_sum_exp` is
    of all that took part in the softmax, a sink included.
    """
    if 0 in (len(queries), len(window) + len(entries)):
        return _nothing(queries, window, entries, lists)
    if len(window) == 0:  # then entries are the rows that a list counts from 0
        rest = lists, num_keys, out, log_sum_exp, d_out, d_log_sum_exp
        d_queries, d_entries, d_window = attend_lists_backward(
            queries, entries, window, *rest, scale=scale, interpret=interpret
        )
        return d_queries, d_window, d_entries
    heads, head_dim = queries.shape[1:]
    num_rows = window.shape[0], entries.shape[0]
    mean, log2_sum = _of_heads(out, log_sum_exp, d_out, d_log_sum_exp)
    # Two warpgroups have half of the channels each, in whole tiles of memory.
    queries, d_out = (padded(padded(x, 1, HEADS), 2, 128) for x in (queries, d_out))
    window, entries = padded(window, 1, 128), padded(padded(entries, 1, 128), 0, 1)
    lists, num_blocks = _whole_blocks(lists, num_keys)
    operands = queries, window, entries, lists, num_blocks, log2_sum, mean, d_out
    sizes = Sizes(
        num_queries=queries.shape[0],
        tiles=queries.shape[1] // HEADS,
        head_dim=queries.shape[2],
        num_keys=lists.shape[1],
        dtype=queries.dtype,
        scale=scale,
        interprets=bool(interpret),
    )
    run = _run_interpreted if sizes.interprets else _run
    kernel = one_by_one(lambda *operands: run(sizes, operands, interpret))
    d_queries, *d_rows = kernel(*operands)
    # Sums and what an interpreter did are as if they were equal all over a mesh.
    d_queries, *d_rows = match_varying(d_queries, *d_rows, *operands)[:3]
    d_window, d_entries = (x[:n, :head_dim] for x, n in zip(d_rows, num_rows))
    return d_queries[:, :heads, :head_dim], d_window, d_entries


def _nothing(queries, window, entries, *others):
    """Gradients where there are no queries, or no keys."""
    operands = queries, window, entries, *others
    d_rows = (jnp.zeros(x.shape, jnp.float32) for x in (window, entries))
    d_queries, d_window, d_entries, *_ = match_varying(
        jnp.zeros_like(queries), *d_rows, *operands
    )
    return d_queries, d_window, d_entries


def _of_heads(out, log_sum_exp, d_out, d_log_sum_exp):
    """What dS takes off dP, and the logarithm to base 2, of whole tiles of heads."""
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    mean -= d_log_sum_exp
    # exp2 of -inf is 0, where nothing took part as where heads are none.
    log2_sum = jnp.where(log_sum_exp == -jnp.inf, jnp.inf, log_sum_exp * LOG2_E)
    return padded(mean, 1, HEADS), padded(log2_sum, 1, HEADS, jnp.inf)


def _whole_blocks(lists, num_keys):
    """The lists with -1 after their ends, and the number of their blocks with keys."""
    place = jnp.arange(lists.shape[1], dtype=jnp.int32)
    lists = jnp.where(place[None] < num_keys[:, None], lists.astype(jnp.int32), -1)
    lists = padded(lists, 1, BLOCK, -1)
    num_blocks = lax.div(num_keys.astype(jnp.int32) + (BLOCK - 1), BLOCK)
    return lists, jnp.clip(num_blocks, 0, lists.shape[1] // BLOCK)


def _run(sizes, operands, _):
    """On a GPU. What the kernel writes and adds to are references, in a `run_state`
    which jax 0.10 can also map.
    """
    queries, window, entries, *_ = operands

    def body(*refs, **kept):
        *inputs, d_queries, d_window, d_entries = refs
        kept |= {"d_queries": d_queries, "d_keys": (d_window, d_entries)}
        differentiate_tile(sizes, Memory(*inputs, **kept))

    kernel = _kernel(sizes, body, [], None)
    sums = (jnp.zeros(x.shape, jnp.float32) for x in (window, entries))
    start = lax.empty(queries.shape, sizes.dtype), *sums
    return pl.run_state(lambda refs: kernel(*operands, *refs))(start)


def _run_interpreted(sizes, operands, interpret):
    """By the interpreter, which cannot add: it keeps the gradients of all keys."""
    queries, window, entries, lists, num_blocks, *_ = operands
    shape = sizes.num_queries, sizes.tiles, sizes.num_keys, sizes.head_dim

    def body(*refs, **kept):
        *inputs, d_queries, d_keys = refs
        kept |= {"d_queries": d_queries, "d_keys": (d_keys,)}
        differentiate_tile(sizes, Memory(*inputs, **kept))

    types = [
        shape_varying_like(queries.shape, sizes.dtype, *operands),
        shape_varying_like(shape, jnp.float32, *operands),
    ]
    d_queries, d_keys = _kernel(sizes, body, types, interpret)(*operands)
    # Blocks past a list's last were never written.
    place = jnp.arange(sizes.num_keys)[None] < num_blocks[:, None] * BLOCK
    valid = place & (lists >= 0)
    d_keys = jnp.where(valid[..., None], jnp.sum(d_keys, axis=1), 0)
    sums = jnp.zeros((len(window) + len(entries), sizes.head_dim), jnp.float32)
    sums = sums.at[jnp.where(valid, lists, 0)].add(d_keys)
    return d_queries, sums[: len(window)], sums[len(window) :]


def _kernel(sizes, body, out_type, interpret) -> Any:
    """Not `plgpu.kernel`, through which jax 0.10 cannot pass references."""
    mesh = plgpu.Mesh(
        grid=(sizes.num_queries * sizes.tiles,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attend_lists_backward",
    )

    def scoped(*refs):
        inner = functools.partial(body, *refs)
        pl.run_scoped(inner, collective_axes="warpgroup", **memory_and_barriers(sizes))

    return pl.kernel(
        scoped,
        out_type=out_type,
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        name="attend_lists_backward",
    )
