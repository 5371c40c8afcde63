"""Rows that travel between the devices of a mesh axis, in rounds of bounded size.

Every device has rows for experts on every device. Sorted by expert, the rows for one
device follow each other. An example: two devices with two experts each, 0 and 1 on
device 0, 2 and 3 on device 1. Device 0 has four rows, for the experts 0 0 1 3; device
1 has four, for 0 2 2 2. What `plan_exchange` is given and what it gathers:

                 counts on device 0    counts on device 1
    to device 0        2 1                   1 0           <- incoming on device 0
    to device 1        0 1                   3 0           <- incoming on device 1

With a capacity of two rows from one device to another in a round, there are two rounds:

                 round 0                      round 1
    0 sends      rows 0 1 to 0, row 3 to 1    row 2 to 0
    1 sends      row 0 to 0, rows 1 2 to 1    row 3 to 1

In round 0, device 0 receives two places from each sender: rows 0 and 1 of device 0, row
0 of device 1, and an empty place. The three rows are all for its expert 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """Which rows travel in which round, as one device sees it."""

    outgoing: Int[Array, "devices experts"]  # of this device's rows, to each device's
    incoming: Int[Array, "devices experts"]  # of each device's rows, to this device's
    num_rounds: Int[Array, ""]  # needed for all rows; the same on all devices
    capacity: int  # rows from one device to another, a round
    axis: str  # of the mesh
    is_ragged: bool

    def sent(self, number: Int[Array, ""]) -> Int[Array, " devices"]:
        """How many rows this device sends to each device in a round."""
        return self._sizes(self.outgoing, number)

    def received(self, number: Int[Array, ""]) -> Int[Array, " devices"]:
        """How many rows this device receives from each device in a round."""
        return self._sizes(self.incoming, number)

    def rows(self, number: Int[Array, ""]) -> Int[Array, " places"]:
        """The sorted row in each place that is sent; the number of rows if empty."""
        totals = jnp.sum(self.outgoing, axis=1)
        first = jnp.cumsum(totals) - totals
        place = self._places(number)[None]
        index = first[:, None] + place
        is_row = place < totals[:, None]
        return jnp.where(is_row, index, jnp.sum(totals)).reshape(-1)

    def experts(self, number: Int[Array, ""]) -> Int[Array, " places"]:
        """The local expert of each place received; the number of experts if empty."""
        ends = jnp.cumsum(self.incoming, axis=1)
        place = self._places(number)
        find = jax.vmap(lambda ends: jnp.searchsorted(ends, place, side="right"))
        return find(ends).reshape(-1).astype(self.incoming.dtype)

    def _places(self, number: Int[Array, ""]) -> Int[Array, " capacity"]:
        """Which of the rows from one device to another a round carries."""
        return number * self.capacity + jnp.arange(self.capacity, dtype=jnp.int32)

    def _sizes(
        self, counts: Int[Array, "devices experts"], number: Int[Array, ""]
    ) -> Int[Array, " devices"]:
        rest = jnp.sum(counts, axis=1) - number * self.capacity
        return jnp.clip(rest, 0, self.capacity)


def plan_exchange(
    counts: Int[Array, "devices experts"],
    capacity: int,
    axis: str,
    *,
    is_ragged: bool = False,
) -> ExchangePlan:
    """Gathers how many rows every device has for every expert.

    A round carries `capacity` rows from one device to another, padded unless ragged.
    """
    all_counts = lax.all_gather(counts, axis)
    # As many as the pair of devices with the most rows needs.
    num_rounds = -(-jnp.max(jnp.sum(all_counts, axis=2)) // capacity)
    # The number must be equal on other axes too: their collectives are in the rounds.
    others = jax.typeof(num_rounds).manual_axis_type.varying - {axis}
    num_rounds = lax.pmax(num_rounds, tuple(sorted(others))) if others else num_rounds
    incoming = all_counts[:, lax.axis_index(axis)]
    return ExchangePlan(counts, incoming, num_rounds, capacity, axis, is_ragged)


def exchange(
    plan: ExchangePlan,
    values: Float[Array, "places ..."],
    number: Int[Array, ""],
    *,
    back: bool = False,
) -> Float[Array, "places ..."]:
    """Sends a round's rows to their experts, or the experts' outputs back.

    There are `plan.capacity` places for each device, before and after.
    """
    if not plan.is_ragged:
        return lax.all_to_all(values, plan.axis, 0, 0, tiled=True)
    sizes = plan.sent(number), plan.received(number)
    sent, received = reversed(sizes) if back else sizes
    starts = jnp.arange(len(sent), dtype=sent.dtype) * plan.capacity
    output_starts = jnp.full_like(starts, plan.capacity) * lax.axis_index(plan.axis)
    return lax.ragged_all_to_all(
        values,
        jnp.zeros_like(values),
        *(starts, sent, output_starts, received),
        axis_name=plan.axis,
    )
