"""The experts' products: each row through the matrices of its own group.

Rows lie sorted by group. A CPU runs a loop over groups and blocks of their rows
(`grouped_blocked`); other machines multiply all rows at once by grouped products
(`grouped_products`), which read the matrices as they lie.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from dsv4_eqx.kernels.activation import activate
from dsv4_eqx.kernels.form import Form, current_form, is_reference
from dsv4_eqx.kernels.grouped_blocked import blocked_backward, blocked_forward
from dsv4_eqx.kernels.grouped_products import outer_product, product
from dsv4_eqx.numerics.lora_weight import (
    LoRAWeight,
    as_arrays,
    pull_back,
    stands_for_array,
)
from dsv4_eqx.numerics.quantized_weight import AbstractWeight, is_quantized
from dsv4_eqx.numerics.varying import match_varying

_Index = Int[Array, ""] | int


def grouped_swiglu_reference(
    rows: Array,
    weights: Array,
    gate_up: Array | AbstractWeight | LoRAWeight,
    down: Array | AbstractWeight | LoRAWeight,
    group_sizes: Array,
    limit: float,
    first: _Index = 0,
) -> Array:
    """What `grouped_swiglu` computes: every row gathers its own matrices."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0], dtype=ends.dtype)
    is_past = index[:, None] >= ends[None]
    group = jnp.sum(is_past, axis=1, dtype=jnp.int32)
    own = first + jnp.minimum(group, len(group_sizes) - 1)
    matrices = as_arrays((gate_up, down))
    gate_up, down = (x[own] for x in matrices)
    before = jnp.einsum("ri,roi->ro", rows, gate_up)
    hidden = activate(before, weights, limit).astype(rows.dtype)
    return jnp.einsum("rh,roh->ro", hidden, down)


def grouped_swiglu(
    rows: Float[Array, "rows dim"],
    weights: Float[Array, " rows"],
    gate_up: Float[Array, "matrices both_hidden dim"] | AbstractWeight | LoRAWeight,
    down: Float[Array, "matrices dim hidden"] | AbstractWeight | LoRAWeight,
    group_sizes: Int[Array, " groups"],
    limit: float,
    *,
    first: _Index = 0,
) -> Float[Array, "rows dim"]:
    """A clamped SwiGLU of each row with its group's matrices, times the row's weight.

    Rows are sorted by group; what lies past the last group gives finite values. The
    first group's matrix is number `first`; others are not read. Quantised matrices get
    no gradient; of those with adapters, whose arrays are formed, only the adapters do.
    The weight is applied in float32, before `down`. Flatten rows instead of `vmap`.
    """
    if rows.shape[0] == 0:
        return rows
    if is_reference():
        return grouped_swiglu_reference(
            rows, weights, gate_up, down, group_sizes, limit, first
        )
    operands = rows, weights, gate_up, down, group_sizes, jnp.asarray(first)
    leaves, structure = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(structure, match_varying(*leaves))
    return _grouped_swiglu(*operands, limit, current_form())


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _grouped_swiglu(rows, weights, gate_up, down, group_sizes, first, limit, form):
    operands = rows, weights, gate_up, down, group_sizes, first
    if _runs_in_blocks(form):
        return blocked_forward(*operands, limit=limit, keep=False)[0]
    return _at_once(*operands, limit=limit, form=form)[0]


def _forward(rows, weights, gate_up, down, group_sizes, first, limit, form):
    operands = rows, weights, gate_up, down, group_sizes, first
    if _runs_in_blocks(form):
        out, before = blocked_forward(*operands, limit=limit)
    else:
        out, before = _at_once(*operands, limit=limit, form=form)
    return out, (*operands, before)


def _backward(limit, form, residuals, cotangent):
    rows, weights, gate_up, down, group_sizes, first, before = residuals
    own_gate_up, own_down = _of_groups((gate_up, down), first, len(group_sizes))
    operands = rows, weights, own_gate_up, own_down, group_sizes, before, cotangent
    if _runs_in_blocks(form):
        d_rows, d_weights, *d_own = blocked_backward(*operands, limit=limit)
    else:
        d_rows, d_weights, *d_own = _at_once_backward(*operands, limit, form)
    d_gate_up, d_down = _among_all(tuple(d_own), first, (gate_up, down))
    return d_rows, d_weights, d_gate_up, d_down, None, None


_grouped_swiglu.defvjp(_forward, _backward)


def _runs_in_blocks(form: Form) -> bool:
    """XLA's grouped products are dense on CPU, and on GPU as JAX lowers them."""
    return form.name in ("cpu", "gpu")


def _of_groups(matrices: PyTree, first: _Index, num_groups: int) -> PyTree:
    """The matrices that are some group's."""

    def take(x: Array) -> Array:
        if len(x) == num_groups:
            return x
        return lax.dynamic_slice_in_dim(x, first, num_groups)

    return jax.tree.map(take, matrices)


def _among_all(d_own: PyTree, first: _Index, matrices: PyTree) -> PyTree:
    """The gradient of all matrices, from that of those which are some group's."""

    def put(d_own: Array | None, matrices: PyTree) -> Array | None:
        if d_own is None or d_own.shape == matrices.shape:
            return d_own
        zeros = jnp.zeros_like(matrices)
        return lax.dynamic_update_slice_in_dim(zeros, d_own, first, 0)

    return jax.tree.map(put, d_own, matrices, is_leaf=lambda d: d is None)


def _at_once(rows, weights, gate_up, down, group_sizes, first, limit, form):
    """The output, and what the activation is given."""
    if stands_for_array(gate_up) or stands_for_array(down):
        own = _of_groups((gate_up, down), first, len(group_sizes))
        (gate_up, down), first = as_arrays(own), 0
    before = product(rows, gate_up, group_sizes, first, form=form)
    hidden = activate(before, weights, limit).astype(rows.dtype)
    return product(hidden, down, group_sizes, first, form=form), before


def _at_once_backward(
    rows, weights, gate_up, down, sizes, before, cotangent, limit, form
):
    own = gate_up, down
    gate_up, down = as_arrays(own)
    past_end = jnp.arange(rows.shape[0]) >= jnp.sum(sizes)
    cotangent = jnp.where(past_end[:, None], 0, cotangent)
    hidden, pullback = jax.vjp(
        functools.partial(activate, limit=limit), before, weights
    )
    d_hidden = product(cotangent, down, sizes, transposed=True, form=form)
    d_before, d_weights = pullback(d_hidden.astype(hidden.dtype))
    d_rows = product(d_before, gate_up, sizes, transposed=True, form=form)
    hidden = hidden.astype(rows.dtype)
    d_own = [
        None
        if is_quantized(matrices)
        else pull_back(matrices, outer_product(*pair, sizes, form=form))
        for matrices, pair in zip(own, ((d_before, rows), (cotangent, hidden)))
    ]
    return d_rows, d_weights, *d_own
