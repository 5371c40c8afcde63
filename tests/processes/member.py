"""One of several processes, of which one may fail: run by `test_initialize.py`.

    python tests/processes/member.py INDEX NUM_PROCESSES PORT TIMEOUT FAULT VICTIM

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

from dsv4_eqx.processes.initialize import initialize


def fail(fault, processes):
    """What the victim does, and never comes back from; or the name of a region."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hang":
        time.sleep(1000)
    if fault == "hang in C":
        ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock
    if fault == "raise":
        raise KeyError("no such batch")
    if fault == "elsewhere":
        with processes.together("saving"):
            time.sleep(1000)
    assert fault == "hang inside"


def main():
    """Joins the others, sums over all devices, fails or not, and sums again."""
    index, num_processes, port = map(int, sys.argv[1:4])
    timeout, fault, victim = float(sys.argv[4]), sys.argv[5], int(sys.argv[6])
    jax.config.update("jax_num_cpu_devices", 1)
    is_victim = index == victim
    sizes = {"data": num_processes, "tensor": 1}
    if is_victim and fault == "other mesh":
        sizes = {"data": 1, "tensor": num_processes}
    if is_victim and fault == "absent":
        return
    with initialize(
        f"127.0.0.1:{port}",
        num_processes,
        index,
        settings={"mesh": sizes},
        timeout=timeout,
        initialization_timeout=30 if fault != "absent" else timeout,
    ) as processes:
        mesh = jax.make_mesh((num_processes,), ("data",))
        sharding = jax.NamedSharding(mesh, P("data"))
        total = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x, "data"),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P(),
            )
        )
        ones = np.ones(num_processes, np.float32)
        x = jax.make_array_from_callback(ones.shape, sharding, lambda at: ones[at])
        for step in range(3):
            if step == 2 and is_victim:
                print(f"fails at {time.time()}", flush=True)
                fail(fault, processes)
            with processes.together("step", timeout=30 if step == 0 else None):
                if step == 2 and is_victim:
                    time.sleep(1000)
                result = float(total(x)[0])
    print(f"process {index} has {result:g}")


if __name__ == "__main__":
    main()
