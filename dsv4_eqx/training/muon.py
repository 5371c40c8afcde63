"""Muon's step: momentum with all its singular values made 1. Paper section 2.4.

Optax's Muon corrects the momentum's bias, which Algorithm 1 does not. It also merges
all dimensions that count matrices into one, for which a mesh has to gather experts;
here they stay as they are, and each device works on its own matrices.
"""

import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dsv4_eqx.training.roles import LeafRole, leaf_roles

# (a, b, c) of each step: eight that bring singular values near 1, two that settle them.
COEFFICIENTS: Final = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def orthogonalize(
    x: Float[Array, "*matrices rows columns"],
) -> Float[Array, "*matrices rows columns"]:
    """Each matrix with its singular values brought to 1, by hybrid Newton-Schulz.

    Those that are at least 1e-3 of the matrix's norm come within 6e-4 of 1. A matrix of
    zeros stays so. Products have the platform's default precision: bfloat16 will do.
    """
    if x.shape[-2] > x.shape[-1]:  # the smaller product; the step commutes with it
        return orthogonalize(x.mT).mT
    # Divided by the largest entry first: squares of tiny gradients would underflow.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)

    def step(x: Array, coefficients: Array) -> tuple[Array, None]:
        a, b, c = coefficients
        square = x @ x.mT
        return a * x + (b * square + c * square @ square) @ x, None

    x, _ = lax.scan(step, x, jnp.asarray(np.array(COEFFICIENTS), x.dtype))
    return x


def muon_updates(momentum: Any, gamma: float) -> Any:
    """Every matrix made orthogonal, and of an RMS like that of AdamW's updates.

    O = NewtonSchulz(mu M + G) * sqrt(max(n, p)) * gamma        Algorithm 1

    **Arguments:**

    - `momentum`: a tree of mu M + G, with what Muon does not train left out.
    - `gamma`: the RMS of the result.
    """
    leaves, structure = jax.tree.flatten(momentum)
    roles = leaf_roles("optimizer", momentum)
    pairs = zip(leaves, roles, strict=True)
    return jax.tree.unflatten(
        structure, [_muon_update(x, role, gamma) for x, role in pairs]
    )


def _muon_update(x: Array, role: LeafRole, gamma: float) -> Array:
    _, rows, columns = role.matrices
    matrices = x.reshape(*x.shape[: role.num_separate], rows, columns)
    # One layer of a stack after another, so that one is at work in memory, not all.
    each = orthogonalize if role.num_stacked == 0 else _one_after_another
    return gamma * math.sqrt(max(rows, columns)) * each(matrices).reshape(x.shape)


def _one_after_another(stack: Array) -> Array:
    return lax.map(orthogonalize, stack)
