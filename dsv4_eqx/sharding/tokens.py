"""Tokens of other devices, where mesh axes split sequences: those before, and all."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from dsv4_eqx.sharding.gather import gather, size_of, sum_and_split

_SEQ = 1  # the dimension of tokens


def with_tokens_before(
    arrays: Sequence[Float[Array, "batch local_seq ..."]],
    counts: Sequence[int],
    axes: tuple[str, ...],
) -> list[Float[Array, "batch longer_seq ..."]]:
    """This device's tokens, with the tokens before them in front.

    **Arguments:** as for `tokens_before`.
    """
    before = tokens_before(arrays, counts, axes)
    return [jnp.concatenate(parts, _SEQ) for parts in zip(before, arrays, strict=True)]


def tokens_before(
    arrays: Sequence[Float[Array, "batch local_seq ..."]],
    counts: Sequence[int],
    axes: tuple[str, ...],
) -> list[Float[Array, "batch count ..."]]:
    """The tokens before this device's tokens; zeros before the sequence begins.

    **Arguments:**

    - `arrays`: arrays of this device's tokens.
    - `counts`: how many earlier tokens are wanted of each array.
    - `axes`: the mesh axes that split the sequence, major first.
    """
    if not arrays:
        return []
    batch, local = arrays[0].shape[:2]
    wide = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    parts = [[x[:, :0]] for x in arrays]
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
    return [jnp.concatenate(pieces, _SEQ) for pieces in parts]


def _from_before(
    x: Shaped[Array, "..."], distance: int, axes: tuple[str, ...]
) -> Shaped[Array, "..."]:
    """The array of the device `distance` places before; zeros if there is none."""
    pairs = [(i, i + distance) for i in range(size_of(axes) - distance)]
    return lax.ppermute(x, axes, pairs) if pairs else jnp.zeros_like(x)


def gathered_tokens(
    x: Shaped[Array, "batch local_seq ..."], axes: str | tuple[str, ...] | None
) -> Shaped[Array, "batch seq ..."]:
    """The tokens of all devices of some mesh axes, in order.

    **Arguments:**

    - `x`: this device's tokens.
    - `axes`: the mesh axes that split the sequence, major first.
    """
    return gather(x, axes, _SEQ)


def summed_and_split(
    x: Float[Array, "batch seq ..."], axis: str | None
) -> Float[Array, "batch local_seq ..."]:
    """This device's tokens of the sum over all devices of a mesh axis.

    **Arguments:**

    - `x`: partial sums for all tokens.
    - `axis`: the mesh axis.
    """
    return sum_and_split(x, axis, _SEQ)
