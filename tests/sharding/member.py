"""One of several processes, of which one may fail: run by `test_processes.py`.

    python tests/sharding/member.py INDEX NUM_PROCESSES PORT FAULT VICTIM

The victim does what FAULT says when it has computed with the others.
"""

import ctypes
import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv4_eqx.primitives.rotary import YarnScaling
from dsv4_eqx.sharding import processes as module


def fail(fault):
    """What the victim does, and never comes back from."""
    print(f"fails at {time.time()}", flush=True)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hang":
        time.sleep(1000)
    if fault == "hang in C":
        ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock
    raise KeyError("no such batch")


def summed_by_all(num_processes):
    """A function that sums a one of each process."""
    mesh = jax.make_mesh((num_processes,), ("data",))
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
    )
    sharding = jax.NamedSharding(mesh, P("data"))
    ones = np.ones(num_processes, np.float32)
    x = jax.make_array_from_callback(ones.shape, sharding, lambda at: ones[at])
    return lambda: float(total(x)[0])


def main():
    """Joins the others, sums over all devices, fails or not, and sums again."""
    index, num_processes, port = map(int, sys.argv[1:4])
    fault, is_victim = sys.argv[4], sys.argv[5] == sys.argv[1]
    jax.config.update("jax_num_cpu_devices", 1)
    settings = {"yarn": YarnScaling(4.0, 512), "mesh": {"data": 2}, "name": None}
    if fault == "differ" and is_victim:
        settings = {"yarn": YarnScaling(2.0, 512), "mesh": {"data": 1}}
    if fault == "none":
        module._GRACE = 0  # timers that are left over show at once
    with module.initialize(
        f"127.0.0.1:{port}",
        num_processes,
        index,
        settings=settings,
        timeout=5,
        heartbeat_timeout=4,
    ) as processes:
        with processes.together("first step", timeout=60):
            step = summed_by_all(num_processes)
            step()
        if fault == "none":
            with processes.together("short", timeout=2):
                step()
            time.sleep(2.5)
        elif is_victim and num_processes > 1:
            fail(fault)
        with processes.together("step"):
            if is_victim and num_processes == 1:
                fail(fault)
            print(f"process {index} has {step():g}", flush=True)


if __name__ == "__main__":
    main()
