"""Rows that travel between devices: the example of the module's own text."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv4_eqx.sharding.exchange import exchange, plan_exchange
from tests.sharded import make_mesh

# Rows of device 0 for the experts 0 0 1 3, of device 1 for 0 2 2 2; two experts each.
COUNTS = np.array([[[2, 1], [0, 1]], [[1, 0], [3, 0]]], np.int32)
SENT = [["0.0 0.1 0.3 -", "1.0 - 1.1 1.2"], ["0.2 - - -", "- - 1.3 -"]]
RECEIVED = [["0.0 0.1 1.0 -", "0.3 - 1.1 1.2"], ["0.2 - - -", "- - 1.3 -"]]
EXPERTS = [[[0, 0, 0, 2], [1, 2, 0, 0]], [[1, 2, 2, 2], [2, 2, 0, 2]]]


def test_rows_travel_in_rounds_and_back():
    mesh = make_mesh(expert=2)

    def run(counts):
        plan = plan_exchange(counts[0], 2, "expert")
        device = jax.lax.axis_index("expert")
        rows = 10 * (device + 1) + jnp.arange(4)  # 10 to 13, and 20 to 23

        def one_round(number):
            number = jnp.int32(number)
            sent = rows.at[plan.rows(number)].get(mode="fill", fill_value=0)
            sent = sent.astype(jnp.float32)
            received = exchange(plan, sent, number)
            back = exchange(plan, received, number, back=True)
            sizes = plan.sent(number), plan.received(number)
            return sent, received, back, plan.experts(number), *sizes

        return jax.tree.map(
            lambda x: x[None], (plan.num_rounds[None], one_round(0), one_round(1))
        )

    spec = P("expert")
    over = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    num_rounds, *rounds = jax.jit(over)(COUNTS)
    np.testing.assert_array_equal(num_rounds, 2)

    def read(text):
        """Rows as they are written above, `device.row`, or nothing."""
        return [
            0 if x == "-" else 10 * (1 + int(x[0])) + int(x[2]) for x in text.split()
        ]

    for number, (sent, received, back, experts, *sizes) in enumerate(rounds):
        np.testing.assert_array_equal(sent, list(map(read, SENT[number])))
        np.testing.assert_array_equal(received, list(map(read, RECEIVED[number])))
        np.testing.assert_array_equal(back, sent)
        np.testing.assert_array_equal(experts, EXPERTS[number])
        for size, there in zip(sizes, (sent, received)):
            per_device = np.sum(np.asarray(there).reshape(2, 2, 2) != 0, axis=2)
            np.testing.assert_array_equal(size, per_device)
