"""One part of `gpu.py`, in a process of its own: prints a line of JSON for each row."""

import argparse
import concurrent.futures
import importlib
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import gpu_layers
import gpu_operations
import jax
import jax.numpy as jnp
from gpu_cases import Case, Sizes, name_of, num_bytes, random

# Where the cases of a part come from.
PARTS: Final = dict(
    layers=gpu_layers.layers,
    attention=gpu_operations.attention,
    experts=gpu_operations.experts,
    indexer=gpu_operations.indexer,
    decoding=gpu_layers.decoding,
)
# How many cases compile side by side before they are timed, and the seconds they have.
# Whole layers autotune many products, each waiting for the GPU.
_COMPILING: Final = dict(layers=(4, 200))
_COMPILING_OTHERS: Final = (1000, 100)
_SIGN_OF_LIFE: Final = 30  # seconds after which a process that compiles says so
_ENOUGH: Final = 2.0  # seconds of timed calls
_TOO_MUCH: Final = 8.0  # after which fewer calls must do
_SHORT: Final = 2e-3  # below, the time of one call among many counts
_FATAL: Final = ("CUDA_ERROR", "illegal", "misaligned", "INTERNAL: ")


def emit(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def error_text(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def seconds_of(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Median of calls that wait, the time of one among many, and the last result."""
    for _ in range(2):  # also fetches what a first call fetches
        jax.block_until_ready(run())
    taken: list[float] = []
    out = None
    while len(taken) < 5 or (sum(taken) < _ENOUGH and len(taken) < 30):
        start = time.perf_counter()
        out = jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
        if len(taken) >= 2 and sum(taken) > _TOO_MUCH:
            break
    median = statistics.median(taken)
    if median > _SHORT:
        return median, median, out
    start, count = time.perf_counter(), 100
    for _ in range(count):
        out = run()
    jax.block_until_ready(out)
    return median, (time.perf_counter() - start) / count, out


def begin_compiling(cases: list[Case]) -> dict[str, concurrent.futures.Future]:
    """The programs of cases, each with its seconds, as they will be compiled."""
    workers = min(8, len(os.sched_getaffinity(0)))
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    return {case.name: pool.submit(_compile, case) for case in cases}


def compiled(cases: list[Case], limit: float) -> dict[str, Any]:
    """The programs, or what came instead, of cases compiled side by side."""
    deadline = time.monotonic() + limit
    begun = begin_compiling(cases)
    waiting = set(begun.values())
    while waiting and (left := deadline - time.monotonic()) > 0:
        emit(begin="compiling")
        seconds = min(left, _SIGN_OF_LIFE)
        _, waiting = concurrent.futures.wait(waiting, timeout=seconds)
    late = TimeoutError(f"not compiled after {limit} s")
    for future in begun.values():
        future.cancel()
    return {
        name: (future.exception() or future.result())
        if future.done() and not future.cancelled()
        else late
        for name, future in begun.items()
    }


def _compile(case: Case) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    return case.compile(), time.perf_counter() - start


def ceilings(args: argparse.Namespace) -> tuple[float, float]:
    """Bytes and operations a second, as the part `device` found them."""
    path = pathlib.Path(args.folder) / "gpu.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    found: dict[str, float] = {}
    for row in rows:
        if rate := row.get("rate"):
            found[row["what"]] = max(rate, found.get(row["what"], 0))
    return found.get("copy", 4.0e12), found.get("product", 790e12)


def run_cases(cases: Iterable[Case], args: argparse.Namespace) -> None:
    """Compiles and times cases, so many at once as their part allows.

    No case is timed while others compile: they would autotune on the same GPU.
    """
    cases = [case for case in cases if wanted(case.columns, args)]
    at_once, limit = _COMPILING.get(args.part, _COMPILING_OTHERS)
    rates = ceilings(args)
    programs: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for index, case in enumerate(cases):
        if index % at_once == 0:
            programs = compiled(cases[index : index + at_once], limit)
        if index and case.group != cases[index - 1].group:
            kept.clear()
            results.clear()
        emit(begin=case.name)
        row: dict[str, Any] = dict(case=case.name) | case.columns
        program = programs.pop(case.name)
        if isinstance(program, Exception):
            emit(**row, error=error_text(program))
            continue
        try:
            row |= measured(case, *program, kept, results, rates)
        except Exception as error:
            row["error"] = error_text(error)
        emit(**row)
        end_if_fatal(row.get("error", ""))


def end_if_fatal(error: str) -> None:
    """Ends a process to which the device may be of no more use."""
    if any(word in error for word in _FATAL) and "RESOURCE" not in error:
        os._exit(3)


def wanted(columns: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the command asks for a case that is not done yet."""
    sizes = {columns.get(name) for name in ("tokens", "context")}
    fits = not args.sizes or sizes & set(args.sizes)
    name = name_of(columns)
    words = all(word in name for word in args.match.split())
    return bool(fits and words and name not in args.skip)


def measured(
    case: Case,
    program: jax.stages.Compiled,
    compile_seconds: float,
    kept: dict,
    results: dict,
    rates: tuple[float, float],
) -> dict[str, Any]:
    memory = program.memory_analysis()
    assert memory is not None  # CPUs, GPUs and TPUs have one
    temporaries = memory.temp_size_in_bytes
    total = temporaries + memory.argument_size_in_bytes + memory.output_size_in_bytes
    row: dict[str, Any] = dict(temp_GB=temporaries / 1e9, total_GB=total / 1e9)
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if room and total > room:
        raise MemoryError(f"needs {total / 1e9:.0f} GB of {room / 1e9:.0f}")
    state = case.make(kept)

    def run() -> Any:
        nonlocal state
        out = program(*state)
        if case.donated:
            (index,) = case.donated
            state = (*state[:index], out[1], *state[index + 1 :])
        return out

    out = run()
    moved = case.bytes(out) if callable(case.bytes) else case.bytes
    if case.compare:
        row |= compared(case, out, results)
    del out
    waiting, among, _ = seconds_of(run)
    seconds = min(waiting, among) / case.divide
    row = dict(ms=1e3 * seconds, ms_waiting=1e3 * waiting / case.divide) | row
    if case.flops:
        row["TFLOPs"] = case.flops / seconds / 1e12
    floor = max(moved / rates[0], case.flops / rates[1])
    row |= dict(floor_ms=1e3 * floor, share=floor / seconds)
    return row | dict(compile_s=compile_seconds)


@jax.jit
def _distance(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((x - y) ** 2)), jnp.sqrt(jnp.sum(y**2))


def compared(case: Case, out: Any, results: dict) -> dict[str, Any]:
    """How far the first result is from that of the first form that ran."""
    first = jax.tree.leaves(out)[0]
    before = results.setdefault(case.compare, first)
    distance, size = map(float, _distance(first, before))
    if not jnp.isfinite(size + distance):
        return dict(difference="not finite")
    return dict(difference=distance / size if size else distance)


def _copies(numbers: int) -> None:
    """A large copy in several forms, of which the fastest counts.

    Fewer than 2^31 numbers: beyond, XLA's kernels calculate 64-bit places for each.
    """
    x = random(0, (numbers,), jnp.float32)
    forms = {
        "jnp.copy": jax.jit(jnp.copy),
        "x + 1": jax.jit(lambda x: x + 1),
        "x + 1 in place": jax.jit(lambda x: x + 1, donate_argnums=0),
    }
    for form, copy in forms.items():
        in_place = form.endswith("in place")

        def run() -> jax.Array:
            nonlocal x
            out = copy(x)
            x = out if in_place else x
            return out

        seconds = min(seconds_of(run)[:2])
        rate = 2 * num_bytes(x) / seconds
        emit(case=f"copy {form}", what="copy", form=form, ms=1e3 * seconds, rate=rate)


def device(args: argparse.Namespace) -> None:
    """What the device is, and what a large copy and a large product reach."""
    found = jax.devices()[0]
    emit(case="name", what=found.device_kind, jax=jax.__version__)
    numbers, size = (2**24, 512) if args.tiny else (2**30, 8192)
    _copies(numbers)
    a, b = (random(i, (size, size), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    seconds = min(seconds_of(lambda: multiply(a, b))[:2])
    rate = 2 * size**3 / seconds
    emit(case="product", what="product", ms=1e3 * seconds, rate=rate)


def arguments() -> argparse.Namespace:
    """What `gpu.py` says to the process of a part."""
    parser = argparse.ArgumentParser()
    for name in ("--part", "--device", "--forms", "--folder", "--match", "--sizes"):
        parser.add_argument(name, default="")
    parser.add_argument("--skip", type=json.loads, default=[])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.forms = tuple(args.forms.split(","))
    args.sizes = [int(size) for size in args.sizes.split(",") if size]
    return args


def main() -> None:
    args = arguments()
    if args.part == "device":
        return device(args)
    if args.part == "correctness":
        importlib.import_module("gpu_checks").correctness(args)
        return finish()
    if args.part == "agreement":
        importlib.import_module("gpu_agreement").agreement(args)
        return finish()
    sizes = Sizes.tiny() if args.tiny else Sizes.flash()
    run_cases(PARTS[args.part](sizes, args.forms), args)
    finish()


def finish() -> None:
    """Ends the process without waiting for programs that still compile."""
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
