"""Programs compiled for GPUs and TPUs that are not there, by XLA's own compilers.

A machine without an accelerator can compile for one, if its compiler is installed, and
read off the program what it would hold and how many kernels it would launch. Nothing
can be run.
"""

import os
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
from jax.experimental import topologies

from dsv4_eqx.plan.machines import machine


class Launches(NamedTuple):
    """What a GPU's program starts."""

    kernels: int  # those in a loop as often as it runs
    unknown_loops: tuple[str, ...]  # loops whose rounds only the device knows


def absent_devices(target: str, count: int = 1) -> list[Any]:
    """Devices to compile for. It must be called before JAX is asked for real ones.

    The target is "h100", "h200", "b200", the file of another GPU's description (XLA's
    `GpuTargetConfigProto` as text), or a TPU and its chips, "v5p:2x2x1". `count` is of
    GPUs, all in one host.
    """
    description = machine(target).description
    if description is None:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return _devices(target, "tpu", "tpu")
    # Without a GPU nothing can be tried out.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    jax.config.update("jax_platforms", "cpu,cuda")
    options = dict(topology=f"1x1x{count}", target_config=description)
    return _devices("", "cuda", "cuda13", **options)


def _devices(name: str, platform: str, extra: str, **options: str) -> list[Any]:
    try:
        return topologies.get_topology_desc(name, platform=platform, **options).devices
    except (ImportError, RuntimeError, KeyError) as error:
        raise ImportError(
            f"the compiler for {platform} is not installed or does not start: pip "
            f"install 'dsv4-eqx[{extra}]' ({error})"
        ) from error


# What a compiled program's text names that starts no kernel.
_NO_KERNEL: Final = frozenset(
    "parameter get-tuple-element tuple bitcast constant iota after-all partition-id "
    "replica-id opt-barrier".split()
)


def launches(program: str) -> Launches:
    """Kernels that a compiled GPU program launches; of branches, the longest one's."""
    computations, entry = _computations(program)
    unknown: list[str] = []

    def count(name: str) -> int:
        return sum(count_line(line) for line in computations[name])

    def count_line(line: str) -> int:
        operation = _operation(line)
        if operation in _NO_KERNEL:
            return 0
        if operation == "while":
            body = _named("body", line)[0]
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if trips is None:
                origin = re.search(r'op_name="([^"]*)"', line)
                unknown.append(origin.group(1) if origin else body)
            return count(body) * (int(trips.group(1)) if trips else 1)
        if operation in ("conditional", "call"):
            return max((count(name) for name in _called(line)), default=0)
        return 1

    return Launches(count(entry), tuple(unknown))


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first that runs."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line)
        if header:
            name = header.group(2)
            lines[name] = []
            entry = name if header.group(1) else entry
        elif line.startswith("}"):
            name = ""
        elif name and " = " in line:
            lines[name].append(line.strip())
    return lines, entry


def _operation(line: str) -> str:
    """What a line does: after its type, which may be a tuple of types."""
    found = re.search(r" = (?:\(.*?\)|\S+) ([\w\-]+)\(", line)
    assert found is not None, line
    return found.group(1)


def _called(line: str) -> Sequence[str]:
    names = _named("to_apply|true_computation|false_computation", line)
    for several in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += several.replace("%", "").split(", ")
    return names


def _named(attribute: str, line: str) -> list[str]:
    return re.findall(rf"(?:{attribute})=%?([\w.\-]+)", line)
