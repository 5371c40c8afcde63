"""The experts: many small clamped SwiGLUs, of which each token runs a few.

Paper section 2.1 and the released code: the gate is clamped from above, the other
branch on both sides, before the activation; the routing weight is applied in float32,
before the down projection; the experts' outputs are added up in float32.
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.kernels.activation import clamped_swiglu
from dsv4_eqx.kernels.dispatch import combine, dispatch
from dsv4_eqx.kernels.grouped_swiglu import grouped_swiglu
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.lora_weight import LoRAWeight
from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.quantize import FakeQuantizedWeight
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.numerics.slice import as_slice
from dsv4_eqx.numerics.validation import (
    validate_activations,
    validate_number,
    validate_sizes,
)
from dsv4_eqx.numerics.varying import match_varying


class Experts(eqx.Module):
    r"""The chosen experts' weighted sum, $\sum_i w_i E_i(x)$.

    $E(x) = W_d(\mathrm{silu}(g) \odot u)$ where $g = \min(W_g x, c)$,
    $u = \mathrm{clip}(W_u x, -c, c)$ and $c$ is the SwiGLU limit. Rows are sorted by
    expert and multiplied group by group: no token is dropped, whatever the routing.

    The derivatives are custom and reverse-mode only, except inside of
    `use_kernels("reference")`.
    """

    # With some of the inner channels, the output is a partial sum.
    partial_over: ClassVar = ("expert_hidden",)

    gate_up: Float[Array, "experts 2 expert_hidden dim"]
    down: Float[Array, "experts dim expert_hidden"]
    dim: int = eqx.field(static=True)
    hidden_dim: int = eqx.field(static=True)
    num_experts: int = eqx.field(static=True)
    limit: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        limit: float = 10.0,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `dim`: channels of a token.
        - `hidden_dim`: inner channels of an expert.
        - `num_experts`: how many experts there are.
        - `limit`: the value $c$ at which the SwiGLU is clamped.
        - `std`: deviation of the initial weights, which are normal.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights.

        **Raises:** ValueError if a size is not a positive integer, or a number is
        negative or not finite.
        """
        self.dim, self.hidden_dim, self.num_experts = validate_sizes(
            "Experts", dim=dim, hidden_dim=hidden_dim, num_experts=num_experts
        )
        self.limit = validate_number("Experts", "limit", limit)
        std = validate_number("Experts", "std", std)
        gate_up_key, down_key = jax.random.split(key)
        gate_up_shape = (self.num_experts, 2, self.hidden_dim, self.dim)
        self.gate_up = normal(gate_up_key, gate_up_shape, dtype, std=std)
        down_shape = (self.num_experts, self.dim, self.hidden_dim)
        self.down = normal(down_key, down_shape, dtype, std=std)

    @compiled_once
    @jax.named_scope("Experts")
    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        chosen: Int[Array, "tokens slots"],
        weights: Float[Array, "tokens slots"],
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the tokens' activations.
        - `chosen`: the experts of each token, from 0; the number of experts itself
            stands for no expert, and its weight must be 0.
        - `weights`: their weights.

        **Returns:** the weighted sum, at least float32.

        **Raises:** ValueError if `x` has other channels or another dtype than the
        experts' weights, or `chosen` and `weights` do not fit it.
        """
        validate_activations("Experts", x, self.gate_up, ("tokens", "dim"))
        validate_routing(x, chosen, weights)
        hidden, dim = self.gate_up.shape[2:]
        slots = chosen.shape[1]
        x, chosen = match_varying(x, chosen)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        inverse = jnp.argsort(order)
        group_sizes = jnp.bincount(chosen.reshape(-1), length=self.num_local)
        out = grouped_swiglu(
            dispatch(x, order, inverse, slots),
            weights.reshape(-1)[order],
            _all_matrices(self.gate_up, 2 * hidden),  # gate and up in one matrix
            _all_matrices(self.down, dim),
            group_sizes.astype(jnp.int32),
            self.limit,
            first=as_slice(self.down).index * self.num_local,
        )
        return combine(out, order, inverse, slots)

    @property
    def num_local(self) -> int:
        """Experts on this device: fewer than `num_experts` where a mesh splits them."""
        return self.down.shape[0]


def _all_matrices(weight: Any, size: int) -> Any:
    """The experts' matrices of `size` rows, of all layers where layers are stacked."""
    stack = as_slice(weight).stack
    if isinstance(stack, LoRAWeight | FakeQuantizedWeight):
        return stack.reshaped(size)
    return jax.tree.map(lambda x: x.reshape(-1, size, x.shape[-1]), stack)


def validate_routing(x: Array, chosen: Array, weights: Array) -> None:
    """Refuses chosen experts and weights that are not given for each token."""
    # Indexing would clamp silently, and broadcasting would repeat.
    if chosen.ndim != 2 or chosen.shape != weights.shape or len(chosen) != len(x):
        raise ValueError(
            f"Experts was called with chosen of shape {chosen.shape} and weights of "
            f"shape {weights.shape}: both must be (tokens, slots), and x has {len(x)} "
            "tokens."
        )


class SharedExpert(eqx.Module):
    """The expert that every token runs, clamped like the others."""

    # With some of the inner channels, the output is a partial sum.
    partial_over: ClassVar = ("shared_hidden",)

    gate_up: Float[Array, "2 shared_hidden dim"]
    down: Float[Array, "dim shared_hidden"]
    dim: int = eqx.field(static=True)
    hidden_dim: int = eqx.field(static=True)
    limit: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        limit: float = 10.0,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:** as for `Experts`, without `num_experts`.

        **Raises:** ValueError as `Experts` does.
        """
        self.dim, self.hidden_dim = validate_sizes(
            "SharedExpert", dim=dim, hidden_dim=hidden_dim
        )
        self.limit = validate_number("SharedExpert", "limit", limit)
        std = validate_number("SharedExpert", "std", std)
        gate_up_key, down_key = jax.random.split(key)
        gate_up_shape = (2, self.hidden_dim, self.dim)
        self.gate_up = normal(gate_up_key, gate_up_shape, dtype, std=std)
        down_shape = (self.dim, self.hidden_dim)
        self.down = normal(down_key, down_shape, dtype, std=std)

    @jax.named_scope("SharedExpert")
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """**Arguments:**

        - `x`: the tokens' activations.

        **Returns:** the expert's output, at least float32.

        **Raises:** ValueError if `x` has other channels or another dtype than the
        expert's weights.
        """
        validate_activations("SharedExpert", x, self.gate_up)
        gate_up, down = dequantize((self.gate_up, self.down))
        halves = project(x, gate_up)
        before = halves.reshape(*x.shape[:-1], math.prod(halves.shape[-2:]))
        activated = clamped_swiglu(before, self.limit).astype(x.dtype)
        return at_least_float32(project(activated, down))
