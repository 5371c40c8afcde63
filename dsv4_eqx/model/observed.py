"""What a layer can show of a call: the results of `observe`."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from dsv4_eqx.attention.values import AttentionValues
from dsv4_eqx.moe.router import Routing


class LayerValues(eqx.Module):
    """What one layer computed; a part of your own without `observe` shows None."""

    streams: Float[Array, "batch seq streams dim"]  # the layer's output
    attention: AttentionValues | None
    routing: Routing | None


def observed(part: Any, *args: Any) -> tuple[Any, Any]:
    """A part's output, and what its `observe` shows, or None if it has none.

    **Arguments:**

    - `part`: a module, or a wrapper around one.
    - `args`: those of the part.
    """
    if hasattr(part, "observe"):
        return part.observe(*args)
    return part(*args), None
