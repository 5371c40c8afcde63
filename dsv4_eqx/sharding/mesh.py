"""The mesh: four axes, always all there, any of them of size 1."""

import math
import operator
from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES: Final = ("data", "expert", "tensor", "context")


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `expert`, `tensor` and `context`.

    **Arguments:**

    - `data`: parts of the batch.
    - `expert`: parts of the experts; the batch is split over it as well.
    - `tensor`: parts of heads, groups, hidden channels and vocabulary.
    - `context`: for parts of the sequence, which nothing here splits yet: `parallelize`
        takes 1 only.
    - `devices`: all devices by default.

    **Raises:** ValueError if a size is not positive or the sizes do not multiply to
    the number of devices.
    """
    sizes = [operator.index(size) for size in (data, expert, tensor, context)]
    devices = jax.devices() if devices is None else devices
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if min(sizes) < 1:
        raise ValueError(f"make_mesh({shown}): every size must be at least 1.")
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"make_mesh({shown}) needs {math.prod(sizes)} devices and there are "
            f"{len(devices)}: choose sizes that multiply to {len(devices)}."
        )
    # Auto: under Explicit axes, equinox's filters and indexing of sharded arrays fail.
    grid = np.asarray(devices, dtype=object).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
