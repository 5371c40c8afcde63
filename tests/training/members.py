"""One of two processes that save a state together, and restore it.

    python -m tests.training.members INDEX PORT DIRECTORY

Prints a line of JSON: the part of the rows that it gives, the tokens of its rows, and
whether what it holds of the state came back.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_eqx as dsv4
from dsv4_eqx.sharding.processes import initialize
from tests.checkpoint.saving import one_layer

CONFIG = one_layer(vocab_size=96, n_routed_experts=6)
LENGTH, NUM_ROWS = 5, 7


def rows():
    """As many rows as documents, each of its own token."""
    documents = [
        (np.full(LENGTH, i), np.ones(LENGTH, bool)) for i in range(1, NUM_ROWS + 1)
    ]
    return dsv4.pack_documents(documents, LENGTH)


def local(tree):
    """What this process holds."""
    return [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(tree)]


def main():
    """Saves, restores, compares."""
    index, port, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_num_cpu_devices", 1)
    with initialize(f"127.0.0.1:{port}", 2, index):
        mesh = dsv4.make_mesh(data=2)
        part, num_parts = dsv4.row_part(mesh)
        batches = dsv4.PackedBatches(rows(), 4, process=part, num_processes=num_parts)
        batch = next(batches)
        placed = dsv4.rows_over(batch, mesh)
        assert placed.tokens.shape == (4, LENGTH)
        np.testing.assert_array_equal(local(placed.tokens)[0], batch.tokens)

        def make():
            return dsv4.DeepSeekV4(CONFIG, key=jax.random.key(0))

        model = dsv4.shard(make, mesh, fsdp=True)
        # What is not over the mesh is the same on all.
        state = model, jnp.asarray(3), np.arange(3), 0.5
        with dsv4.TrainingCheckpoints(directory) as checkpoints:
            assert checkpoints.restore(state) is None
            checkpoints.save(2, state, batches.get_state())
            found = checkpoints.restore(jax.tree.map(lambda x: x * 0, state))
        pairs = zip(*map(local, (found.state[0], model)), strict=True)
        is_equal = all(np.array_equal(x, y) for x, y in pairs)
        is_equal &= found.state[1] == 3 and found.state[2].tolist() == [0, 1, 2]
        batches.set_state(found.data)
        said = dict(part=part, equal=bool(is_equal and found.state[3] == 0.5))
        print(json.dumps(said | dict(tokens=batch.tokens[:, 0].tolist())), flush=True)


if __name__ == "__main__":
    main()
