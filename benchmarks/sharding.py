"""What a mesh costs: the work of all of its devices over that of one.

    python benchmarks/sharding.py --meshes data=8 expert=8 context=8 data=2,tensor=4

A training step, forward and backward, of the model of `against_transformers.py` in
float32, on devices that XLA makes of the processors. The first column is what the
compiler counts in one device's program, times the devices: floating-point operations,
those of a loop once. The second is the processor time of the whole process, the median
of several steps, on the mesh and on one device in turn: it has every loop, the
collectives, and waiting for them where that is busy.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from against_transformers import CONFIG

import dsv4_eqx as dsv4
from dsv4_eqx.plan.programs import training_step
from dsv4_eqx.sharding.mesh import mesh_sizes

_REPEATS: Final = 3


def processor_seconds(run: Callable[[], Any]) -> float:
    """Of all threads, while it runs once."""
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def compiled(model: Any, tokens: jax.Array) -> tuple[Callable[[], Any], float]:
    """The step, and the operations that the compiler counts on one device."""
    program = jax.jit(training_step).lower(model, tokens, tokens).compile()
    operations = (program.cost_analysis() or {})["flops"]
    return lambda: program(model, tokens, tokens), operations


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ["data=8", "expert=8", "context=8", "data=2,tensor=4"]
    parser.add_argument("--meshes", nargs="+", default=default)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a row")
    args = parser.parse_args()
    meshes = [mesh_sizes(text) for text in args.meshes]
    needed = max(math.prod(sizes.values()) for sizes in meshes)
    jax.config.update("jax_num_cpu_devices", needed)
    model = dsv4.DeepSeekV4(CONFIG, key=jax.random.key(0))
    generator = np.random.default_rng(0)
    ids = generator.integers(0, CONFIG.vocab_size, (args.batch, args.seq))
    tokens = jnp.asarray(ids, jnp.int32)
    plain, plain_operations = compiled(model, tokens)
    print(f"{args.batch} x {args.seq} tokens, {len(os.sched_getaffinity(0))} threads")
    print("mesh                      operations  processor time", flush=True)
    for text, sizes in zip(args.meshes, meshes):
        devices = jax.devices()[: math.prod(sizes.values())]
        mesh = dsv4.make_mesh(**sizes, devices=devices)
        sharded, operations = compiled(dsv4.shard(model, mesh), tokens)
        rounds = []
        for _ in range(_REPEATS + 1):  # the first does not count
            rounds.append(processor_seconds(sharded) / processor_seconds(plain))
        ratio = operations * mesh.size / plain_operations
        print(
            f"{text:25} {ratio:10.3f} {statistics.median(rounds[1:]):15.3f}", flush=True
        )


if __name__ == "__main__":
    main()
