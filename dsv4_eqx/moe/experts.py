"""The experts: many small clamped SwiGLUs, of which each token runs a few.

Paper section 2.1 and the released code: the gate is clamped from above, the other
branch on both sides, before the activation; the routing weight is applied in float32,
before the down projection; the experts' outputs are added up in float32.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.config import Config
from dsv4_eqx.moe.grouped import grouped_matmul
from dsv4_eqx.primitives.precision import at_least_float32


class Experts(eqx.Module):
    r"""The chosen experts' weighted sum, $\sum_i w_i E_i(x)$.

    $E(x) = W_d(\mathrm{silu}(g) \odot u)$ where $g = \min(W_g x, c)$,
    $u = \mathrm{clip}(W_u x, -c, c)$ and $c$ is the SwiGLU limit. Rows are sorted by
    expert and multiplied group by group: none is dropped, whatever the routing.
    """

    gate_up: Float[Array, "experts 2 expert_hidden dim"]
    down: Float[Array, "experts dim expert_hidden"]
    limit: float = eqx.field(static=True)

    def __init__(
        self, config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ):
        """**Arguments:**

        - `config`: sizes and `swiglu_limit`.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights.
        """
        gate_up_key, down_key = jax.random.split(key)
        experts, hidden = config.n_routed_experts, config.moe_intermediate_size
        dim, std = config.hidden_size, config.initializer_range
        self.gate_up = std * jax.random.normal(
            gate_up_key, (experts, 2, hidden, dim), dtype
        )
        self.down = std * jax.random.normal(down_key, (experts, dim, hidden), dtype)
        self.limit = config.swiglu_limit

    @jax.named_scope("Experts")
    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        chosen: Int[Array, "tokens slots"],
        weights: Float[Array, "tokens slots"],
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the tokens' activations.
        - `chosen`: the experts of each token; `experts` itself stands for none, and
            then the weight must be 0.
        - `weights`: their weights.

        **Returns:** the weighted sum, at least float32.
        """
        num_experts = self.gate_up.shape[0]
        num_tokens, slots = chosen.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        group_sizes = jnp.bincount(chosen.reshape(-1), length=num_experts)
        rows = x[order // slots]
        sizes = group_sizes.astype(jnp.int32)
        gate_up = grouped_matmul(rows, _merge_gate_up(self.gate_up), sizes)
        hidden = clamped_swiglu(gate_up, self.limit)
        hidden = hidden * weights.reshape(-1)[order][:, None].astype(hidden.dtype)
        out = grouped_matmul(hidden.astype(x.dtype), self.down, sizes)
        out = at_least_float32(out)[jnp.argsort(order)].reshape(num_tokens, slots, -1)
        return sum((out[:, slot] for slot in range(1, slots)), out[:, 0])


class SharedExpert(eqx.Module):
    """The expert that every token runs, clamped like the others."""

    gate_up: Float[Array, "2 shared_hidden dim"]
    down: Float[Array, "dim shared_hidden"]
    limit: float = eqx.field(static=True)

    def __init__(
        self, config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ):
        """**Arguments:**

        - `config`: sizes and `swiglu_limit`.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights.
        """
        gate_up_key, down_key = jax.random.split(key)
        hidden, dim = config.moe_intermediate_size, config.hidden_size
        std = config.initializer_range
        self.gate_up = std * jax.random.normal(gate_up_key, (2, hidden, dim), dtype)
        self.down = std * jax.random.normal(down_key, (dim, hidden), dtype)
        self.limit = config.swiglu_limit

    @jax.named_scope("SharedExpert")
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """**Arguments:**

        - `x`: the tokens' activations.

        **Returns:** the expert's output, at least float32.
        """
        _, hidden, dim = self.gate_up.shape
        gate_up = jnp.einsum("...d,hd->...h", x, self.gate_up.reshape(2 * hidden, dim))
        activated = clamped_swiglu(gate_up, self.limit).astype(x.dtype)
        return at_least_float32(jnp.einsum("...h,dh->...d", activated, self.down))


def clamped_swiglu(
    gate_up: Float[Array, "*batch both_hidden"], limit: float
) -> Float[Array, "*batch hidden"]:
    """silu(min(gate, limit)) times the other half clipped to +-limit, float32.

    **Arguments:**

    - `gate_up`: the gate in the first half of the channels.
    - `limit`: `swiglu_limit`.
    """
    gate, up = jnp.split(at_least_float32(gate_up), 2, axis=-1)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def _merge_gate_up(
    gate_up: Float[Array, "experts 2 hidden dim"],
) -> Float[Array, "experts both_hidden dim"]:
    experts, _, hidden, dim = gate_up.shape
    return gate_up.reshape(experts, 2 * hidden, dim)
