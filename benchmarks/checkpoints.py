"""Loading and saving: speed against reading the file alone, and peak memory.

    python benchmarks/checkpoints.py [--directory DIRECTORY] [--gigabytes 2]

Writes two synthetic checkpoints, in bfloat16 and with FP4 experts, and measures each in
processes of their own, with the files in the page cache: bfloat16 into bfloat16 against
`cat`; FP4 into bfloat16 on one core; peak memory over eight devices, and in each of two
processes with four; the bytes that each of them read.
"""

import argparse
import functools
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.checkpoint.quantized import SCALE
from dsv4_eqx.checkpoint.write import NewTensor, validate_target, write_checkpoint
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model

MEGABYTE = 1e6


def config(gigabytes: float) -> dsv4.Config:
    """About so many bytes in bfloat16, nine tenths of them in experts."""
    return dsv4.Config(
        vocab_size=8192,
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=512,
        o_groups=8,
        o_lora_rank=128,
        n_routed_experts=8 * max(1, round(2.3 * gigabytes)),
        num_experts_per_tok=4,
        routed_scaling_factor=1.5,
        sliding_window=128,
        layer_types=(SLIDING, HCA, CSA, HCA),
        compress_ratios=(0, 128, 4, 128),
        mlp_layer_types=(HASH_MOE,) + (TOPK_MOE,) * 3,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=128,
    )


def random_part(dtype, num_experts, region):
    """Numbers of ordinary size, the same ones again and again."""
    shape = [part.stop - part.start for part in region]
    if np.issubdtype(dtype, np.integer) and dtype.itemsize > 1:
        return np.zeros(shape, dtype) + np.arange(shape[-1]) % num_experts
    generator = np.random.default_rng(0)
    size = int(np.prod(shape))
    some = generator.integers(0, 256, min(size, 1 << 20)).astype(np.uint8)
    if dtype == SCALE:
        return np.resize(some % 8 + 115, shape).astype(np.uint8).view(SCALE)
    if dtype.itemsize == 1:
        return np.resize(some, shape).view(dtype)
    some = (some.astype(np.float32) - 127.5) / 5000
    return np.resize(some.astype(dtype), shape)


def write(directory, model_config, packed):
    """A checkpoint under the official names."""

    def tensor(name, dtype, shape):
        dtype = np.dtype(dtype)
        read = functools.partial(random_part, dtype, model_config.n_routed_experts)
        return NewTensor(name, dtype, tuple(shape), tuple(shape), read)

    tensors = []
    for source, leaf in sources(
        abstract_model(model_config, jnp.bfloat16), official=True
    ):
        for name in source.names.flat:
            *rows, columns = source.tensor_shape
            if packed and ".ffn.experts." in name:
                tensors.append(tensor(name, np.int8, (*rows, columns // 2)))
                scales = name.removesuffix("weight") + "scale"
                tensors.append(tensor(scales, SCALE, (*rows, columns // 32)))
            elif np.issubdtype(leaf.dtype, np.integer):
                tensors.append(tensor(name, np.int64, source.tensor_shape))
            else:
                tensors.append(tensor(name, leaf.dtype, source.tensor_shape))
    target = validate_target("write", "directory", directory, overwrite=False)
    write_checkpoint(
        target, model_config, tensors, overwrite=False, most_file_bytes=10**12
    )


def peak_memory():
    """Bytes of this process's highest resident size so far."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say")


def measure(directory, devices, keep_quantized, processes, rank, port):
    """What one process that loads a checkpoint sees; printed as JSON."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    options: dict[str, Any] = {"keep_quantized": bool(keep_quantized)}
    if devices * processes > 1:
        options["mesh"] = dsv4.make_mesh(expert=devices * processes)
    counts = []
    preadv = os.preadv
    os.preadv = lambda *args: (counts.append(preadv(*args)), counts[-1])[1]
    jax.block_until_ready(jnp.zeros(8) + 1)
    load = functools.partial(dsv4.from_pretrained, directory, **options)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    start = time.perf_counter()
    model = load()
    seconds = [time.perf_counter() - start]
    peak = peak_memory() - before
    held = [shard for x in jax.tree.leaves(model) for shard in x.addressable_shards]
    num_bytes = sum(shard.data.nbytes for shard in held)
    different = sum(share_of(x) for x in jax.tree.leaves(model))
    num_read = sum(counts)
    del model, held
    for _ in range(0 if "mesh" in options else 4):
        start = time.perf_counter()
        load()
        seconds.append(time.perf_counter() - start)
    found = dict(
        seconds=statistics.median(seconds),
        peak=peak,
        held=num_bytes,
        share=different,
        read=num_read,
    )
    print(json.dumps(found))


def share_of(array):
    """Bytes of an array's different shards on this process's devices."""
    shards = {str(shard.index): shard.data for shard in array.addressable_shards}
    return sum(data.nbytes for data in shards.values())


def run(directory, *, devices=1, keep=False, processes=1, cores=None):
    """What every process of a measurement sees."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        arguments = [devices, int(keep), processes, rank, port]
        command = [sys.executable, __file__, "--measure", str(directory)]
        command += [str(argument) for argument in arguments]
        if cores is not None:
            command = ["taskset", "-c", cores, *command]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    results = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return [json.loads(result.splitlines()[-1]) for result in results]


def seconds_to_cat(path):
    """Median of five."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run(f"cat '{path}' > /dev/null", shell=True, check=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def copy_rate():
    """Bytes a second that one core writes to fresh memory, while it reads as many."""
    source = np.ones(1 << 28, np.uint8)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        source.copy()
        seconds.append(time.perf_counter() - start)
    return source.nbytes / statistics.median(seconds)


def main():
    """Writes, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--directory", help="where to write; a temporary one else")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        plain, packed = pathlib.Path(name) / "plain", pathlib.Path(name) / "packed"
        for directory, is_quantized in ((plain, False), (packed, True)):
            write(directory, config(arguments.gigabytes), is_quantized)
        report(plain, packed)


def report(plain, packed):
    """Prints one line for each figure."""
    size = os.path.getsize(plain / "model.safetensors")
    cat = seconds_to_cat(plain / "model.safetensors")
    (loaded,) = run(plain)
    print(f"file of {size / MEGABYTE:,.0f} MB, cat {size / cat / MEGABYTE:,.0f} MB/s")
    rate = size / loaded["seconds"]
    print(f"BF16 -> BF16: {rate / MEGABYTE:,.0f} MB/s, {cat / loaded['seconds']:.0%}")
    small = os.path.getsize(packed / "model.safetensors")
    (one_core,) = run(packed, cores="0")
    rate = small / one_core["seconds"] / MEGABYTE
    print(f"FP4 -> BF16 on one core: {rate:,.0f} MB/s of the file, {small:,} bytes")
    print(f"one core copies {copy_rate() / MEGABYTE:,.0f} MB/s")
    cases: list[tuple[str, pathlib.Path, dict[str, Any]]] = [
        ("BF16, 1 device", plain, {}),
        ("BF16, 8 devices", plain, dict(devices=8)),
        ("BF16, 2 processes x 4", plain, dict(devices=4, processes=2)),
        ("FP4, 8 devices", packed, dict(devices=8)),
        ("FP4 kept packed, 8 devices", packed, dict(devices=8, keep=True)),
    ]
    for what, directory, options in cases:
        for seen in run(directory, **options):
            over = (seen["peak"] - seen["share"]) / MEGABYTE
            print(
                f"{what}: {seen['seconds']:.2f} s, share {seen['share']:,} bytes, peak "
                f"{over:+,.0f} MB, read {seen['read'] / seen['share']:.3f} of it"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
