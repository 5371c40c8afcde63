"""The tokens before a device's own, where mesh axes split sequences."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from dsv4_eqx.sharding.gather import size_of


def with_tokens_before(
    arrays: Sequence[Float[Array, "batch local_seq ..."]],
    counts: Sequence[int],
    axes: tuple[str, ...],
) -> list[Float[Array, "batch longer_seq ..."]]:
    """This device's tokens, with as many tokens before them as `counts` says.

    Before the sequence begins, these are zeros.
    """
    if not arrays:
        return []
    batch, local = arrays[0].shape[:2]
    wide = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    parts = [[x] for x in arrays]
    # One device back is enough, unless devices have very few tokens each.
    for distance in range(1, -(-max(counts) // local) + 1):
        sizes = [min(max(n - (distance - 1) * local, 0), local) for n in counts]
        tails = [x[:, local - size :] for x, size in zip(arrays, sizes, strict=True)]
        # One message for all arrays; the widest dtype keeps every bit.
        message = [tail.astype(wide).reshape(batch, -1) for tail in tails]
        moved = _from_before(jnp.concatenate(message, axis=1), distance, axes)
        ends = itertools.accumulate(part.shape[1] for part in message)
        moved = jnp.split(moved, list(ends)[:-1], axis=1)
        for pieces, new, tail in zip(parts, moved, tails):
            pieces.insert(0, new.astype(tail.dtype).reshape(tail.shape))
    return [jnp.concatenate(pieces, axis=1) for pieces in parts]


def _from_before(
    x: Shaped[Array, "..."], distance: int, axes: tuple[str, ...]
) -> Shaped[Array, "..."]:
    """The array of the device `distance` places before; zeros if there is none."""
    pairs = [(i, i + distance) for i in range(size_of(axes) - distance)]
    return lax.ppermute(x, axes, pairs) if pairs else jnp.zeros_like(x)
