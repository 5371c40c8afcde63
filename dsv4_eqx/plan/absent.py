"""Programs compiled for GPUs and TPUs that are not there, by XLA's own compilers.

A machine without an accelerator can compile for one, if its compiler is installed, and
read off the program what it would hold and how many kernels it would launch. Nothing
can be run.
"""

import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
from jax.experimental import topologies

# What XLA asks about a GPU. Clock in GHz, bytes and bytes/s.
_HOPPER: Final = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{name}"
"""
_GPUS: Final = {
    "h100": dict(
        bandwidth=3352320000000, memory=84942979072, name="NVIDIA H100 80GB HBM3"
    ),
    "h200": dict(bandwidth=4800000000000, memory=150754820096, name="NVIDIA H200"),
}


class Launches(NamedTuple):
    """What a GPU's program starts."""

    kernels: int  # those in a loop as often as it runs
    unknown_loops: tuple[str, ...]  # loops whose rounds only the device knows


def is_gpu(target: str) -> bool:
    """Whether a target of `absent_devices` is one or more GPUs."""
    return re.fullmatch(r"v\d\w*:\d+(x\d+)*", target) is None


def absent_devices(target: str, count: int = 1) -> list[Any]:
    """Devices to compile for. It must be called before JAX is asked for real ones.

    The target is "h100", "h200", the file of another GPU's description (XLA's
    `GpuTargetConfigProto` as text), or a TPU and its chips, "v5p:2x2x1". `count` is of
    GPUs, all in one host.
    """
    if not is_gpu(target):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return _devices(target, "tpu", "tpu")
    if target in _GPUS:
        description = _HOPPER.format(**_GPUS[target])
    elif os.path.isfile(target):
        description = pathlib.Path(target).read_text()
    else:
        raise ValueError(
            f"absent_devices was called with {target!r}: it must be one of "
            f"{', '.join(_GPUS)}, a file, or a TPU such as 'v5p:2x2x1'."
        )
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


def compile_for(device: Any, function: Callable[..., Any], *shapes: Any) -> Any:
    """A function compiled for one absent device; its arguments are given as shapes."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def on_device(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.jit(function).lower(*jax.tree.map(on_device, shapes)).compile()


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
