"""Expert parallelism: experts stay where they are, tokens travel to them and back.

Each device sorts its tokens' slots by expert, sends them to the experts' devices, and
receives the outputs (`exchange.py` has a picture). A round carries 1.5 times the rows
of perfectly balanced routing. There are as many rounds as the pair of devices with the
most rows needs: no token is dropped, whatever the routing, and balanced routing needs
one round.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_eqx.moe.experts import validate_routing
from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.varying import match_varying
from dsv4_eqx.sharding.exchange import ExchangePlan, exchange, plan_exchange

# A round's capacity, relative to what perfectly balanced routing needs.
_SLACK: Final = 1.5


class ExpertParallel(eqx.Module):
    """Experts split over a mesh axis, called like `Experts` itself.

    Each device of the axis calls it with its own tokens.
    """

    experts: Any  # `Experts`, or a module called like them that has `num_local`
    axis: str = eqx.field(static=True)
    # Whether rows are sent without padding, where the platform can.
    is_ragged: bool = eqx.field(static=True, default=False)
    # Whether the experts' outputs are whole on the devices of other axes although
    # their weights are split over these axes.
    are_whole: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        chosen: Int[Array, "tokens slots"],
        weights: Float[Array, "tokens slots"],
    ) -> Float[Array, "tokens dim"]:
        """The weighted sum, at least float32; `chosen` are ids among all experts."""
        validate_routing(x, chosen, weights)
        experts = self.experts
        if not self.are_whole:
            # So that gradients are summed over other axes once, not in every round.
            leaves, structure = jax.tree.flatten((experts, x, weights))
            experts, x, weights = jax.tree.unflatten(structure, match_varying(*leaves))
        num_tokens, slots = chosen.shape
        num_rows, num_devices = chosen.size, lax.axis_size(self.axis)
        # 1. A row is a slot of a token. Sorting makes each device's rows consecutive.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sorted_weights = weights.reshape(-1)[order]
        # 2. All devices learn how many rows each has for each expert.
        num_experts = num_devices * experts.num_local
        counts = jnp.bincount(chosen.reshape(-1), length=num_experts)
        plan = plan_exchange(
            counts.astype(jnp.int32).reshape(num_devices, -1),
            math.ceil(_SLACK * num_rows / num_devices),
            self.axis,
            is_ragged=self.is_ragged,
        )

        # 3. In each round, rows and weights are sent out, and outputs come back.
        def run(number: Array) -> Array:
            row = plan.rows(number)
            slot = order.at[row].get(mode="fill", fill_value=0)
            weight = sorted_weights.at[row].get(mode="fill", fill_value=0)
            rows, weight = (
                exchange(plan, values, number) for values in (x[slot // slots], weight)
            )
            expert = plan.experts(number)
            out = experts(rows, expert[:, None], weight[:, None])
            return exchange(plan, out.astype(x.dtype), number, back=True)

        nothing = jnp.zeros_like(x, shape=(num_rows, x.shape[1]))
        out = _run_rounds(plan, run, nothing)
        # 4. Back in the order of the slots, the outputs of a token are added up.
        out = at_least_float32(out)[jnp.argsort(order)].reshape(num_tokens, slots, -1)
        return sum((out[:, slot] for slot in range(1, slots)), out[:, 0])


def _run_rounds(
    plan: ExchangePlan,
    run: Callable[[Array], Array],
    out: Float[Array, "rows dim"],
) -> Float[Array, "rows dim"]:
    """The sorted rows' outputs, filled in round by round.

    The first round always runs, and its residuals are kept for the backward pass. The
    program has as many further rounds as the worst routing needs. They run only where
    they are needed, and the backward pass runs them again.
    """

    def put(out: Array, number: Array, outputs: Array) -> Array:
        return out.at[plan.rows(number)].add(outputs, mode="drop")

    first = jnp.zeros((), jnp.int32)
    outputs = run(first)
    num_rows, out = len(out), put(out, first, outputs)
    max_rounds = -(-num_rows // plan.capacity)
    if max_rounds == 1:
        return out
    nothing, _ = match_varying(jnp.zeros_like(outputs), outputs)

    # The checkpoint is around the condition. Inside of it, the residuals of a branch,
    # the experts' weights among them, would be kept for every round.
    @jax.checkpoint
    def run_if_needed(number: Array) -> Array:
        return lax.cond(number < plan.num_rounds, run, lambda _: nothing, number)

    def one_round(out: Array, number: Array) -> tuple[Array, None]:
        operands = out, number, run_if_needed(number)
        is_needed = number < plan.num_rounds
        return lax.cond(is_needed, put, lambda out, *_: out, *operands), None

    out, _ = lax.scan(one_round, out, jnp.arange(1, max_rounds))
    return out
