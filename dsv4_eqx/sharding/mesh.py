"""The mesh: always the same four axes, any of which may have size 1."""

import math
from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from dsv4_eqx.numerics.validation import invalid_argument, validate_size

AXES: Final = ("data", "expert", "context", "tensor")


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `expert`, `context` and `tensor`.

    Consecutive devices are those of `tensor`, the axis with the most communication.

    **Arguments:**

    - `data`: parts of the batch.
    - `expert`: parts of the experts; the batch is split over it as well.
    - `context`: parts of the sequence.
    - `tensor`: parts of heads, groups, hidden channels and vocabulary.
    - `devices`: all devices by default.

    **Raises:** ValueError if a size is not a positive integer, the sizes do not
    multiply to the number of devices, or `devices` is not a sequence of different
    devices.
    """
    named_sizes = zip(AXES, (data, expert, context, tensor))
    sizes = [validate_size("make_mesh", axis, size) for axis, size in named_sizes]
    devices = jax.devices() if devices is None else devices
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    are_listed = isinstance(devices, Sequence | np.ndarray) and len(devices) > 0
    if not are_listed or not all(isinstance(x, jax.Device) for x in devices):
        raise ValueError(
            f"make_mesh(devices={devices!r}): must be devices, one or more, as from "
            "jax.devices()."
        )
    if len(set(devices)) != len(devices):
        raise ValueError(f"make_mesh(devices={devices!r}): must be different devices.")
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"make_mesh({shown}) needs {math.prod(sizes)} devices and there are "
            f"{len(devices)}: choose sizes that multiply to {len(devices)}."
        )
    # Auto: under Explicit axes, equinox's filters and indexing of sharded arrays fail.
    grid = np.asarray(devices, dtype=object).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def validate_mesh(call: str, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that is not like those of `make_mesh`."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise invalid_argument(call, "mesh", mesh, "from make_mesh")
    # In this order: `lax.ppermute` counts devices in the order of the mesh's axes.
    if tuple(axis for axis in mesh.shape if axis in AXES) != AXES:
        raise ValueError(
            f"{call}: the mesh has the axes {tuple(mesh.shape)} and needs "
            f"{AXES}, whatever their sizes: make it with make_mesh."
        )
    other = [kind.name for kind in mesh.axis_types if kind != AxisType.Auto]
    if other:
        raise ValueError(
            f"{call}: the mesh's axis_types are {other[0]} and must be Auto: make it "
            "with dsv4_eqx.make_mesh, or give jax.make_mesh "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.shape)}."
        )


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of every axis, from text like `data=8,expert=64`; 1 by default."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        axis, size = axis.strip(), size.strip()
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh {text!r}: {part!r} is no axis and size; write data=8,expert=64 "
                f"with axes among {', '.join(AXES)}."
            )
        if axis in sizes:
            raise ValueError(f"mesh {text!r}: {axis} is given twice; give it once.")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}
