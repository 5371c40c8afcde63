"""A picture of a mesh: which devices hold which part of batch and weights."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

_MOST_NAMED = 256  # devices with a number in them


def plot_mesh(sizes: Mapping[str, int], path: str | os.PathLike) -> None:
    """Draws the devices in order, a panel for each pair of `data` and `expert`.

    In a panel are rows of `context` and columns of `tensor`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib: pip install 'dsv4-eqx[plot]'"
        ) from error
    data, expert, context, tensor = sizes.values()
    devices = np.arange(data * expert * context * tensor)
    # Rows are data, then context; columns expert, then tensor.
    grid = devices.reshape(data, expert, context, tensor).transpose(0, 2, 1, 3)
    grid = grid.reshape(data * context, expert * tensor)
    columns = np.broadcast_to(np.arange(expert * tensor) // tensor, grid.shape)
    figure = Figure(figsize=(8, 1.5 + 6.5 * min(1.0, grid.shape[0] / grid.shape[1])))
    axes: Any = figure.subplots()
    # A colour for each part of the experts; a line between the parts of an axis.
    axes.imshow(columns, cmap="Pastel1" if expert <= 9 else "viridis", aspect="auto")
    for edge in range(0, grid.shape[0] + 1, context):
        axes.axhline(edge - 0.5, color="black", linewidth=1)
    for edge in range(0, grid.shape[1] + 1, tensor):
        axes.axvline(edge - 0.5, color="black", linewidth=1)
    if devices.size <= _MOST_NAMED:
        for (row, column), device in np.ndenumerate(grid):
            axes.text(column, row, str(device), ha="center", va="center", fontsize=7)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"expert={expert}, each of tensor={tensor}")
    axes.set_ylabel(f"data={data}, each of context={context}")
    axes.set_title(f"{devices.size:,} devices")
    figure.savefig(path, dpi=150, bbox_inches="tight")
