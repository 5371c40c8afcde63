"""What a long context costs: a step after few and many tokens, and reading them.

    python benchmarks/contexts.py --contexts 1024 32768 --prompts 8192 65536

- The time of a greedy step at batch 1 after contexts of these lengths, with the model
  of `against_transformers.py` in float32. Each has a cache with room for its own
  length, filled at random. The median of several, in turn; the processor time beside it
  tells less about what else the machine does.
- The time that reading prompts takes at tiny widths, part by part as `generate` reads
  them, and the memory that it takes beside the model: what is predicted, the cache and
  the temporaries of the compiled program, and what the process takes at its peak. Each
  prompt has a process of its own, in which glibc gives back what is freed.

It needs Linux, which tells a process its peak, and glibc.
"""

import argparse
import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from against_transformers import CONFIG
from jax import lax

from dsv4_eqx import Cache, Config, DeepSeekV4
from dsv4_eqx.generation.prompt import parts, read_first, read_next, read_prompt

_ROUNDS: Final = 5


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def decode(model: DeepSeekV4, cache: Cache, steps: int) -> tuple[jax.Array, Cache]:
    """The likeliest token, again and again."""

    def step(_: Any, state: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        token, cache = state
        hidden, cache = model.extend(token, cache)
        return jnp.argmax(model.unembed(hidden), axis=-1).astype(jnp.int32), cache

    return lax.fori_loop(0, steps, step, (jnp.zeros((1, 1), jnp.int32), cache))


def filled(model: DeepSeekV4, length: int, steps: int) -> Cache:
    """A cache after a random context, with room for some steps more."""
    generator = np.random.default_rng(length)
    cache = model.init_cache(1, length + steps)
    layers = jax.tree.map(
        lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), cache.layers
    )
    return Cache(jnp.full(1, length, jnp.int32), layers, cache.capacity)


def steps_after(contexts: list[int], steps: int) -> None:
    """Prints the time of a step after each context."""
    most = max(contexts) + steps
    model = DeepSeekV4(
        dataclasses.replace(CONFIG, max_position_embeddings=most), key=jax.random.key(0)
    )
    taken = {length: [] for length in contexts}
    for round_ in range(_ROUNDS + 1):
        for length in contexts:
            cache = jax.block_until_ready(filled(model, length, steps))
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(decode(model, cache, steps))
            end = time.perf_counter(), time.process_time()
            if round_ > 0:  # the first one compiles
                taken[length].append([(y - x) / steps for x, y in zip(start, end)])
    medians = {
        length: [statistics.median(x) for x in zip(*rounds)]
        for length, rounds in taken.items()
    }
    print("context  ms a step  times the first  ms of processors  times the first")
    for length, (wall, cpu) in medians.items():
        first = medians[contexts[0]]
        print(
            f"{length:7,} {1e3 * wall:10.2f} {wall / first[0]:16.2f} "
            f"{1e3 * cpu:17.2f} {cpu / first[1]:16.2f}",
            flush=True,
        )


def resident(what: str) -> int:
    """Bytes of memory that the process holds (VmRSS), or has at most (VmHWM)."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def predicted(model: DeepSeekV4, length: int) -> tuple[int, int]:
    """Bytes of the cache, and of the temporaries of reading a part of a prompt."""
    size = parts(length)[0]
    part = jax.ShapeDtypeStruct((1, size + 1), jnp.int32)
    counts = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    read = functools.partial(read_first, capacity=length, drafts=False)
    caches, last = jax.eval_shape(read, model, part, counts)
    compiled = read_next.lower(model, caches, last, part, counts).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    return cache_bytes, analysis.temp_size_in_bytes


def prompt_of(length: int) -> None:
    """Prints time and memory of a prompt, in a process of its own."""
    config = dataclasses.replace(Config.tiny(), max_position_embeddings=length)
    model = DeepSeekV4(config, key=jax.random.key(0))
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, (1, length), np.int32)

    def read(count: int) -> None:
        lengths = np.array([count], np.int32)
        part = tokens[:, :count]
        jax.block_until_ready(read_prompt(model, part, lengths, length, drafts=False))

    cache_bytes, temporaries = predicted(model, length)
    read(2 * parts(length)[0])  # compiles
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # a new peak
    before, start = resident("VmRSS"), time.perf_counter()
    read(length)
    seconds, more = time.perf_counter() - start, resident("VmHWM") - before
    print(
        f"{length:6,} {seconds:8.1f} {1e6 * seconds / length:9.0f} "
        f"{cache_bytes / 1e6:9.1f} {(cache_bytes + temporaries) / 1e6:13.1f} "
        f"{more / 1e6:8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 32768])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompts", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--one-prompt", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if any(length < 1024 or length % 512 for length in asked.prompts):
        parser.error("--prompts must be multiples of 512 from 1024 on")
    if asked.one_prompt:
        return prompt_of(asked.one_prompt)
    if asked.contexts:
        steps_after(asked.contexts, asked.steps)
    if asked.prompts:
        print("prompt  seconds  us/token cache, MB predicted, MB peak, MB", flush=True)
    # Large blocks of memory go back to the system as soon as they are free.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for length in asked.prompts:
        command = [sys.executable, __file__, "--one-prompt", str(length)]
        subprocess.run(command, check=True, env=env)


if __name__ == "__main__":
    main()
