"""What a layer can show of a call: the results of `observe`."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from dsv4_eqx.attention.values import AttentionValues
from dsv4_eqx.moe.router import Routing


class LayerValues(eqx.Module):
    """What one layer computed.

    A part of your own without `observe` shows None. One that has it returns its output
    and a tree of arrays, each of which begins with the dimensions batch and seq.
    """

    streams: Float[Array, "batch seq streams dim"]  # the layer's output
    attention: AttentionValues | Any
    routing: Routing | Any
