"""The whole model over several processes on this machine, against one process.

    python examples/multi_process.py [DIRECTORY] [--processes 2]
        [--mesh expert=2,tensor=2] [--fsdp] [--steps 3] [--layers 3]

Each process holds its part of the mesh's CPU devices and reads its part of the
checkpoint in DIRECTORY, or of a tiny one that is made first. Logits, gradients and the
losses of some training steps are compared with those of one process with one device.
On several machines, start the like of `work` on each, with the first one's address.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.sharding.mesh import mesh_sizes
from dsv4_eqx.sharding.processes import initialize

BATCH, SEQ, RATE, LIMIT = 8, 64, 0.02, 2e-5
# A layer of every kind.
CONFIG: Final = dataclasses.replace(
    dsv4.Config.tiny(),
    num_hidden_layers=3,
    layer_types=(SLIDING, HCA, CSA),
    compress_ratios=(0, 8, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
    num_nextn_predict_layers=0,
)


def options():
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path, nargs="?")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mesh", default="expert=2,tensor=2")
    parser.add_argument("--fsdp", action="store_true", help="split weights over data")
    parser.add_argument("--steps", type=int, default=3, help="of training")
    layers = CONFIG.num_hidden_layers
    parser.add_argument("--layers", type=int, default=layers, help="of the tiny one")
    parser.add_argument("--timeout", type=int, default=30, help="seconds")
    # What the processes themselves are given.
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_tokens():
    """The licence's first bytes as rows of tokens."""
    text = (pathlib.Path(__file__).parent.parent / "LICENSE").read_bytes()
    data = np.frombuffer(text[: BATCH * (SEQ + 1)], np.uint8)
    return data.reshape(BATCH, SEQ + 1).astype(np.int32)


@jax.jit
def train_step(model, tokens):
    """The model after a step of gradient descent, the loss, logits and gradients."""
    floats, others = eqx.partition(model, eqx.is_inexact_array)

    def mean_nats(floats):
        model = eqx.combine(floats, others)
        hidden = model.hidden(tokens[:, :-1])
        nats = model.cross_entropy(hidden, tokens[:, 1:])
        return jnp.mean(nats), model.unembed(hidden)

    (loss, logits), grads = jax.value_and_grad(mean_nats, has_aux=True)(floats)
    moved = jax.tree.map(lambda x, d: x - RATE * d, floats, grads)
    return eqx.combine(moved, others), loss, logits, grads


def train(model, steps, together, gather):
    """Losses of all steps; logits and gradients of the first, on the host."""
    tokens, losses, first = read_tokens(), [], []
    for step in range(steps):
        # The first one is compiled, which takes as long as it takes.
        with together("training step", timeout=600 if step == 0 else None):
            model, loss, *others = train_step(model, tokens)
            losses.append(float(loss))
        if step == 0:
            with together("gathering", timeout=600):
                first = [np.asarray(x) for x in jax.tree.leaves(gather(others))]
    return [np.asarray(losses), *first]


def bytes_read():
    """By this process so far, where the system tells."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    return 0


def end_with_parent():
    """Ends this process when the one that started it has gone, however it went."""
    os.read(0, 1)
    os._exit(1)


def work(asked):
    """One of the processes: what the first one found goes into a file."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    sizes, index = mesh_sizes(asked.mesh), asked.work["index"]
    jax.config.update("jax_num_cpu_devices", asked.work["devices"])
    settings = {"mesh": sizes, "fsdp": asked.fsdp, "steps": asked.steps}
    settings["config"] = dsv4.Config.from_hf(asked.directory)
    address, time_limit = asked.work["address"], asked.timeout
    with initialize(
        address, asked.processes, index, settings=settings, timeout=time_limit
    ) as processes:
        mesh = dsv4.make_mesh(**sizes, devices=None)
        before = bytes_read()
        with processes.together("loading", timeout=600):
            model = dsv4.from_pretrained(
                asked.directory, dtype=jnp.float32, mesh=mesh, fsdp=asked.fsdp
            )
            read = bytes_read() - before
        shards = [x.addressable_shards for x in jax.tree.leaves(model)]
        held = sum(shard.data.nbytes for part in shards for shard in part)
        print(
            f"process {index}: {len(jax.local_devices())} devices, read {read:,} bytes,"
            f" holds {held:,} bytes of weights",
            flush=True,
        )
        gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
        found = train(model, asked.steps, processes.together, gather)
        if index == 0:
            np.savez(asked.work["result"], *found)


def free_port():
    """A port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(asked, directory, result):
    """Starts the processes and waits for them; none is left behind.

    **Raises:** ValueError if one of them fails.
    """
    devices = math.prod(mesh_sizes(asked.mesh).values())
    task = dict(
        address=f"127.0.0.1:{free_port()}",
        devices=devices // asked.processes,
        result=str(result),
    )
    running = []
    try:
        for index in range(asked.processes):
            given = ["--work", json.dumps(task | {"index": index})]
            if asked.directory is None:
                given.append(str(directory))
            command = [sys.executable, __file__, *sys.argv[1:], *given]
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            print(f"process {index} is pid {running[-1].pid}", flush=True)
        give_up = math.inf
        while None in (codes := [process.poll() for process in running]):
            time.sleep(0.1)
            if any(codes):  # the others end too, but for one that is stopped
                give_up = min(give_up, time.monotonic() + 60)
            if time.monotonic() > give_up:
                break
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(codes):
        raise ValueError(f"the processes ended with {codes}")


def compare(found, wanted):
    """Prints how far apart the two are, and says whether that is near enough."""
    far = [np.max(np.abs(x - y)) for x, y in zip(found, wanted, strict=True)]
    largest = [max(np.max(np.abs(y)), 1e-30) for y in wanted]
    off = {
        "losses, largest difference": far[0],
        "logits, largest difference": far[1],
        "gradients, largest difference over an array's largest": max(
            x / y for x, y in zip(far[2:], largest[2:])
        ),
    }
    for name, value in off.items():
        print(f"  {name:55} {value:.1e} (limit {LIMIT:.0e})")
    return max(off.values()) <= LIMIT


def main():
    """Makes a checkpoint if there is none, and runs it both ways."""
    asked = options()
    if asked.work is not None:
        return work(asked)
    devices = math.prod(mesh_sizes(asked.mesh).values())
    if asked.processes < 1 or devices % asked.processes != 0 or asked.steps < 1:
        raise ValueError(
            f"{devices} devices over {asked.processes} processes, {asked.steps} steps: "
            "give a number of processes that divides the mesh, and a step or more."
        )
    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as scratch:
        directory = asked.directory
        if directory is None:
            directory = pathlib.Path(scratch) / "tiny"
            raw, key = CONFIG.to_hf(), jax.random.key(0)
            config = dsv4.Config.from_hf(raw, num_hidden_layers=asked.layers)
            make = functools.partial(dsv4.DeepSeekV4, config, key=key)
            dsv4.save_pretrained(jax.jit(make)(), directory)
        result = pathlib.Path(scratch) / "result.npz"
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        print(f"mesh {asked.mesh}, {size:,} bytes in {directory.name}", flush=True)
        run_processes(asked, directory, result)
        with np.load(result) as file:
            found = list(file.values())
        model = dsv4.from_pretrained(directory, dtype=jnp.float32)
    together = lambda name, timeout: contextlib.nullcontext()  # noqa: E731
    wanted = train(model, asked.steps, together, lambda tree: tree)
    print(f"{asked.processes} processes against one with one device")
    if not compare(found, wanted):
        sys.exit("they differ")
    print("they agree")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"multi_process.py: {error}")
    except KeyboardInterrupt:
        sys.exit("multi_process.py: interrupted")
