"""Expert parallelism: experts stay, tokens travel to them and back.

Each device sorts its tokens' slots by expert and sends them in rounds of bounded size;
rounds go on until the fullest pair of devices is done, so that no token is dropped
whatever the routing, and a balanced one needs the first alone.
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

# Room in a round for each pair of devices, relative to perfectly balanced routing.
_SLACK: Final = 1.5


class ExpertParallel(eqx.Module):
    """Experts split over a mesh axis, called like `Experts` itself.

    Each device of the axis calls it with its own tokens.
    """

    experts: Any  # `Experts`, or what is called like them and has `num_experts`
    axis: str = eqx.field(static=True)
    # Whether the platform sends rows as they are, without filling up.
    is_ragged: bool = eqx.field(static=True, default=False)
    # Whether the experts' outputs are whole on the devices of other axes, although
    # their weights are split over those.
    are_whole: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        chosen: Int[Array, "tokens slots"],
        weights: Float[Array, "tokens slots"],
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:** as for `Experts`, with `chosen` among all devices' experts.

        **Returns:** the weighted sum, at least float32.

        **Raises:** ValueError as `Experts` does.
        """
        validate_routing(x, chosen, weights)
        experts = self.experts
        if not self.are_whole:
            # Gradients are summed over other axes here, once for all rounds.
            leaves, structure = jax.tree.flatten((experts, x, weights))
            experts, x, weights = jax.tree.unflatten(structure, match_varying(*leaves))
        num_tokens, slots = chosen.shape
        own = experts.num_local
        devices = lax.axis_size(self.axis)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        counts = jnp.bincount(chosen.reshape(-1), length=devices * own)
        counts = counts.astype(jnp.int32).reshape(devices, own)
        everyones = lax.all_gather(counts, self.axis)
        incoming = everyones[:, lax.axis_index(self.axis)]
        room = math.ceil(_SLACK * order.size / devices)
        sorted_weights = weights.reshape(-1)[order]

        def exchange(number: Array) -> Array:
            index = _outgoing(counts, number, room)
            slot = order.at[index].get(mode="fill", fill_value=0)
            weight = sorted_weights.at[index].get(mode="fill", fill_value=0)
            sent = _sizes(counts, number, room)
            received = _sizes(incoming, number, room)
            rows, weight = (
                self._exchanged(values, sent, received, room)
                for values in (x[slot // slots], weight)
            )
            expert = _experts_of(incoming, number, room)
            out = experts(rows, expert[:, None], weight[:, None])
            return self._exchanged(out.astype(x.dtype), received, sent, room)

        def add(out: Array, number: Array, brought: Array) -> Array:
            return out.at[_outgoing(counts, number, room)].add(brought, mode="drop")

        # The first round is needed always, and kept for the backward pass.
        first = jnp.zeros((), counts.dtype)
        brought = exchange(first)
        out = add(jnp.zeros_like(x, shape=(order.size, x.shape[1])), first, brought)
        most = -(-order.size // room)
        if most > 1:
            needed = _rounds_needed(everyones, room, self.axis)
            out = _further_rounds(out, exchange, add, brought, needed, most)
        out = at_least_float32(out)[jnp.argsort(order)].reshape(num_tokens, slots, -1)
        return sum((out[:, slot] for slot in range(1, slots)), out[:, 0])

    def _exchanged(
        self,
        values: Float[Array, "rows ..."],
        sent: Int[Array, " devices"],
        received: Int[Array, " devices"],
        room: int,
    ) -> Float[Array, "rows ..."]:
        """What each device has for this one, in its `room` among the rows.

        **Arguments:**

        - `values`: for each device, in its room.
        - `sent`, `received`: rows that mean something, to and from each device.
        - `room`: rows for each device.
        """
        if not self.is_ragged:
            return lax.all_to_all(values, self.axis, 0, 0, tiled=True)
        starts = jnp.arange(len(sent), dtype=sent.dtype) * room
        there = jnp.full_like(starts, room) * lax.axis_index(self.axis)
        sizes = starts, sent, there, received
        nothing = jnp.zeros_like(values)
        return lax.ragged_all_to_all(values, nothing, *sizes, axis_name=self.axis)


def _further_rounds(
    out: Float[Array, "slots dim"],
    exchange: Callable[[Array], Array],
    add: Callable[[Array, Array, Array], Array],
    brought: Float[Array, "rows dim"],
    needed: Int[Array, ""],
    most: int,
) -> Float[Array, "slots dim"]:
    """The output with what rounds after the first bring, if they are needed.

    The backward pass runs each of them again.
    """
    nothing, _ = match_varying(jnp.zeros_like(brought), brought)

    # Around the condition: what a branch keeps for the backward pass would be kept for
    # each round, experts' weights included.
    @jax.checkpoint
    def bring(number: Array) -> Array:
        return lax.cond(number < needed, exchange, lambda _: nothing, number)

    def run_round(out: Array, number: Array) -> tuple[Array, None]:
        operands = out, number, bring(number)
        return lax.cond(number < needed, add, lambda out, *_: out, *operands), None

    out, _ = lax.scan(run_round, out, jnp.arange(1, most))
    return out


def _rounds_needed(
    everyones: Int[Array, "from to experts"], room: int, axis: str
) -> Int[Array, ""]:
    """Rounds until the fullest pair of devices is done, the same on every device."""
    needed = -(-jnp.max(jnp.sum(everyones, axis=2)) // room)
    others = jax.typeof(needed).manual_axis_type.varying - {axis}
    return lax.pmax(needed, tuple(sorted(others))) if others else needed


def _sizes(
    counts: Int[Array, "devices experts"], number: Array, room: int
) -> Int[Array, " devices"]:
    """Rows of each device in a round."""
    return jnp.clip(jnp.sum(counts, axis=1) - number * room, 0, room)


def _outgoing(
    counts: Int[Array, "devices experts"], number: Array, room: int
) -> Int[Array, " rows"]:
    """Places in the sorted slots that a round sends; past the end where it has room."""
    totals = jnp.sum(counts, axis=1)
    first = jnp.cumsum(totals) - totals
    place = number * room + jnp.arange(room, dtype=counts.dtype)
    index = first[:, None] + place
    return jnp.where(place < totals[:, None], index, jnp.sum(totals)).reshape(-1)


def _experts_of(
    counts: Int[Array, "devices experts"], number: Array, room: int
) -> Int[Array, " rows"]:
    """This device's expert of each row that a round brings; past the last for none."""
    place = number * room + jnp.arange(room, dtype=counts.dtype)
    ends = jnp.cumsum(counts, axis=1)
    find = jax.vmap(lambda ends: jnp.searchsorted(ends, place, side="right"))
    return find(ends).reshape(-1).astype(counts.dtype)
