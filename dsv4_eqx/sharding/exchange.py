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

What device 0 gets in round 0 has two places for each sender, `0.0 0.1 1.0 ---`, of its
own experts 0 0 0 and, in the place that stays empty, none.
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
    num_rounds: Int[Array, ""]  # that are needed; the same on all devices
    capacity: int  # rows from one device to another, a round
    axis: str  # of the mesh
    is_ragged: bool

    def sent(self, number: Int[Array, ""]) -> Int[Array, " devices"]:
        """Rows that this device sends to each.

        **Arguments:**

        - `number`: of the round.
        """
        return self._sizes(self.outgoing, number)

    def received(self, number: Int[Array, ""]) -> Int[Array, " devices"]:
        """Rows that this device gets from each.

        **Arguments:**

        - `number`: of the round.
        """
        return self._sizes(self.incoming, number)

    def rows(self, number: Int[Array, ""]) -> Int[Array, " places"]:
        """The sorted row in each place of what is sent; past the last where none is.

        **Arguments:**

        - `number`: of the round.
        """
        totals = jnp.sum(self.outgoing, axis=1)
        first = jnp.cumsum(totals) - totals
        place = self._places(number)
        index = first[:, None] + place
        is_row = place < totals[:, None]
        return jnp.where(is_row, index, jnp.sum(totals)).reshape(-1)

    def experts(self, number: Int[Array, ""]) -> Int[Array, " places"]:
        """This device's expert of each place received; past the last where none is.

        **Arguments:**

        - `number`: of the round.
        """
        ends = jnp.cumsum(self.incoming, axis=1)
        place = self._places(number)
        find = jax.vmap(lambda ends: jnp.searchsorted(ends, place, side="right"))
        return find(ends).reshape(-1).astype(self.incoming.dtype)

    def _places(self, number: Int[Array, ""]) -> Int[Array, " capacity"]:
        """Which of a pair's rows a round carries."""
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
    """Tells all devices what each has for the others.

    **Arguments:**

    - `counts`: this device's rows for each expert of each device.
    - `capacity`: rows that a round carries from one device to another.
    - `axis`: of the mesh.
    - `is_ragged`: whether rows are sent without filling up to the capacity.
    """
    everyones = lax.all_gather(counts, axis)
    # Rounds until the fullest pair of devices is done.
    num_rounds = -(-jnp.max(jnp.sum(everyones, axis=2)) // capacity)
    # Other axes' devices take part in each other's collectives: as many for all.
    others = jax.typeof(num_rounds).manual_axis_type.varying - {axis}
    num_rounds = lax.pmax(num_rounds, tuple(sorted(others))) if others else num_rounds
    incoming = everyones[:, lax.axis_index(axis)]
    return ExchangePlan(counts, incoming, num_rounds, capacity, axis, is_ragged)


def exchange(
    plan: ExchangePlan,
    values: Float[Array, "places ..."],
    number: Int[Array, ""],
    *,
    back: bool = False,
) -> Float[Array, "places ..."]:
    """Sends a round's rows to their experts, or the experts' outputs back.

    **Arguments:**

    - `plan`: from `plan_exchange`.
    - `values`: in `plan.capacity` places for each device.
    - `number`: of the round.
    - `back`: whether they return to where the rows came from.

    **Returns:** what the devices have for this one, in the same places.
    """
    if not plan.is_ragged:
        return lax.all_to_all(values, plan.axis, 0, 0, tiled=True)
    sizes = plan.sent(number), plan.received(number)
    sent, received = reversed(sizes) if back else sizes
    starts = jnp.arange(len(sent), dtype=sent.dtype) * plan.capacity
    there = jnp.full_like(starts, plan.capacity) * lax.axis_index(plan.axis)
    return lax.ragged_all_to_all(
        values,
        jnp.zeros_like(values),
        *(starts, sent, there, received),
        axis_name=plan.axis,
    )
