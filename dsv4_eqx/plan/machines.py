"""Machines to compile for: what XLA asks about them, and what their makers state.

Rates are those of the data sheets, for dense bfloat16 products and for the memory.
"""

import os
import pathlib
import re
from typing import Final, NamedTuple


class Machine(NamedTuple):
    """One device."""

    form: str  # of the kernels
    products: float | None  # floating-point operations a second, bfloat16
    bandwidth: float | None  # bytes of memory a second
    description: str | None = None  # of a GPU: XLA's GpuTargetConfigProto as text


_NVIDIA: Final = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{name}"
"""
_HOPPER: Final = dict(cores=132, cache=52428800, clock=1.98, major=9)
_BLACKWELL: Final = dict(cores=148, cache=132644864, clock=1.965, major=10)
_GPUS: Final = {
    "h100": ("hopper", 989e12, 3352320000000, 84942979072, _HOPPER),
    "h200": ("hopper", 989e12, 4800000000000, 150754820096, _HOPPER),
    "b200": ("gpu", 2250e12, 8000000000000, 191501434880, _BLACKWELL),
}
_TPUS: Final = {  # operations and bytes a second of a chip
    "v4": (275e12, 1.2e12),
    "v5e": (197e12, 0.82e12),
    "v5p": (459e12, 2.77e12),
    "v6e": (918e12, 1.64e12),
}


def is_gpu(target: str) -> bool:
    """Whether a target of `machine` is one or more GPUs."""
    return re.fullmatch(r"v\d\w*:\d+(x\d+)*", target) is None


def machine(target: str) -> Machine:
    """One device of a target: a GPU's name, the file of its description, or TPUs.

    **Raises:** ValueError if it is none of these.
    """
    if not is_gpu(target):
        return Machine("tpu", *_TPUS.get(target.partition(":")[0], (None, None)))
    if target in _GPUS:
        form, products, bandwidth, memory, kind = _GPUS[target]
        name = f"NVIDIA {target.upper()}"
        text = _NVIDIA.format(bandwidth=bandwidth, memory=memory, name=name, **kind)
        return Machine(form, products, bandwidth, text)
    if not os.path.isfile(target):
        raise ValueError(
            f"there is no device {target!r} to compile for: it must be one of "
            f"{', '.join(_GPUS)}, a file, or a TPU such as 'v5p:2x2x1'."
        )
    text = pathlib.Path(target).read_text()
    bandwidth = re.search(r"memory_bandwidth:\s*(\d+)", text)
    hopper = re.search(r"cuda_compute_capability\s*\{\s*major:\s*9\b", text)
    form = "hopper" if hopper else "gpu"
    return Machine(form, None, float(bandwidth[1]) if bandwidth else None, text)
