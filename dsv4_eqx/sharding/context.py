"""Sequences that lie split over a mesh: context parallelism, exact.

Every device has consecutive tokens. It projects and compresses its own; what a window
needs of the tokens before comes from the device before. Entries are few, so that all
devices gather all of them; each then selects and attends for its own queries.

The devices that split the heads split the tokens too, wherever each token goes its own
way. They gather latents and keys, which are narrow, before the heads attend, and add up
what the heads give in the same step that splits the tokens again.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.kernels.entries import Entries
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.sharding.gather import gather, size_of, sum_and_split

_SEQ = 1  # the dimension of tokens


class SplitSequence(eqx.Module):
    """Attention of a sequence that lies split over mesh axes, called like `Attention`.

    The output is complete: the sum over the devices that split the heads.
    """

    attention: Attention
    axes: tuple[str, ...] = eqx.field(static=True)  # that split tokens, major first
    heads_axis: str | None = eqx.field(static=True)  # that splits heads, if one does

    def __call__(
        self,
        x: Float[Array, "batch local_seq dim"],
        positions: Int[Array, "batch local_seq"],
    ) -> Float[Array, "batch local_seq dim"]:
        """**Arguments:**

        - `x`: normalised activations of this device's tokens.
        - `positions`: of these tokens, in the whole sequence.
        """
        attention = dequantize(self.attention)
        latent = attention.project_latent(x)
        keys = attention.project_keys(x, positions)
        compressors = self._compressors(attention, x.shape[1])
        tokens = [part for one in compressors for part in one.project(x)]
        pending = [one.num_pending for one in compressors for _ in range(2)]
        context = tuple(axis for axis in self.axes if axis != self.heads_axis)
        num_before = min(attention.window, x.shape[1] * size_of(self.axes)) - 1
        # In the same message, unless there are keys to gather first.
        own, counts = ([], []) if self._gathers else ([keys], [num_before])
        before = tokens_before([*tokens, *own], [*pending, *counts], self.axes)
        tokens = [jnp.concatenate(parts, _SEQ) for parts in zip(before, tokens)]
        entries = self._entries(compressors, tokens, positions, x)
        selection = None
        if len(entries) == 2 and attention.indexer is not None:
            weights = attention.indexer.project_weights(x)
            selection = attention.indexer.select(latent, weights, positions, entries[1])
        if self._gathers:
            joined = gathered_tokens(
                jnp.concatenate([latent, keys], 2), self.heads_axis
            )
            latent, keys = jnp.split(joined, [latent.shape[2]], axis=2)
            positions = self._positions_of_all_heads(positions)
            if selection is not None:
                selection = gathered_tokens(selection, self.heads_axis)
            before = tokens_before([keys], [num_before], context)
        keys = jnp.concatenate([before[-1], keys], _SEQ)
        entries = entries[0] if entries else None
        out = attention.attend(latent, positions, keys, entries, selection)
        if self._gathers:
            return summed_and_split(out, self.heads_axis)
        return out if self.heads_axis is None else lax.psum(out, self.heads_axis)

    @property
    def _gathers(self) -> bool:
        return self.heads_axis in self.axes

    def _positions_of_all_heads(
        self, positions: Int[Array, "batch local_seq"]
    ) -> Int[Array, "batch joined_seq"]:
        """Positions of the tokens of all devices of `heads_axis`."""
        local = positions.shape[1]
        first = positions[:, :1] - lax.axis_index(self.heads_axis) * local
        return first + jnp.arange(local * size_of((self.heads_axis,)), dtype=jnp.int32)

    def _compressors(self, attention: Attention, local: int) -> list:
        """The layer's compressor, then the indexer's, as far as they are needed."""
        if attention.compressor is None:
            return []
        ratio = attention.compressor.ratio
        windows = local * size_of(self.axes) // ratio
        if windows == 0:
            return []
        if attention.indexer is None or windows <= attention.indexer.topk:
            return [attention.compressor]
        return [attention.compressor, attention.indexer.compressor]

    # Lists of no kind: a name has one size, and the two compressors' heads differ.
    def _entries(
        self,
        compressors: list,
        tokens: list,
        positions: Int[Array, "batch local_seq"],
        x: Float[Array, "batch local_seq dim"],
    ) -> list:
        """The whole sequence's `Entries` of compressors with the same windows.

        **Arguments:**

        - `compressors`: of the layer.
        - `tokens`: values and gates of each, with those of the tokens before.
        - `positions`: of this device's tokens.
        - `x`: gives the entries' dtype.
        """
        if not compressors:
            return []
        ratio, local = compressors[0].ratio, positions.shape[1]
        start, most = positions[:, 0], -(-local // ratio)
        first = (start[:, None] // ratio + jnp.arange(most, dtype=start.dtype)) * ratio
        made = []
        for one, values, gates in zip(compressors, tokens[::2], tokens[1::2]):
            pooled = one.pool_after(values, gates, start).astype(x.dtype)
            made.append(one.finish(pooled, first).values)
        place = _places_of_windows(size_of(self.axes), local, ratio)
        joined = gathered_tokens(jnp.concatenate(made, axis=2), self.axes)[:, place]
        last = (jnp.arange(len(place), dtype=jnp.int32) + 1) * ratio - 1
        last = jnp.broadcast_to(last, joined.shape[:2])
        ends = itertools.accumulate(part.shape[2] for part in made)
        parts = jnp.split(joined, list(ends)[:-1], axis=2)
        return [Entries(values, last) for values in parts]


class SplitTokens(eqx.Module):
    """A module of tokens and ids that lie split over the axis that it sums over.

    Gathers the tokens before and splits them again where it adds up the outputs.
    """

    module: Any
    axis: str = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "batch local_seq dim"],
        token_ids: Int[Array, "batch local_seq"],
    ) -> Float[Array, "batch local_seq dim"]:
        """**Arguments:** the module's own, of this device's tokens."""
        x, token_ids = (
            gathered_tokens(x, self.axis),
            gathered_tokens(token_ids, self.axis),
        )
        return summed_and_split(self.module(x, token_ids), self.axis)


def tokens_before(
    arrays: Sequence[Float[Array, "batch local_seq ..."]],
    counts: Sequence[int],
    axes: tuple[str, ...],
) -> list[Float[Array, "batch count ..."]]:
    """The tokens before this device's own; zeros before the sequence begins.

    **Arguments:**

    - `arrays`: of this device's tokens.
    - `counts`: how many tokens of each array.
    - `axes`: mesh axes that split the sequence, major first.
    """
    if not arrays:
        return []
    batch, local = arrays[0].shape[:2]
    wide = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    parts = [[x[:, :0]] for x in arrays]
    # From as many devices back as it takes; one, unless they have few tokens each.
    for distance in range(1, -(-max(counts) // local) + 1):
        sizes = [min(max(n - (distance - 1) * local, 0), local) for n in counts]
        tails = [x[:, local - size :] for x, size in zip(arrays, sizes, strict=True)]
        # All in one message; the wider dtype keeps every bit.
        message = [tail.astype(wide).reshape(batch, -1) for tail in tails]
        moved = _from_before(jnp.concatenate(message, axis=1), distance, axes)
        ends = itertools.accumulate(part.shape[1] for part in message)
        moved = jnp.split(moved, list(ends)[:-1], axis=1)
        for own, new, tail in zip(parts, moved, tails):
            own.insert(0, new.astype(tail.dtype).reshape(tail.shape))
    return [jnp.concatenate(own, _SEQ) for own in parts]


def _from_before(
    x: Shaped[Array, "..."], distance: int, axes: tuple[str, ...]
) -> Shaped[Array, "..."]:
    """What the device so many places before this one has; zeros if there is none."""
    pairs = [(i, i + distance) for i in range(size_of(axes) - distance)]
    return lax.ppermute(x, axes, pairs) if pairs else jnp.zeros_like(x)


def _places_of_windows(devices: int, local: int, ratio: int) -> np.ndarray:
    """Where each window is among those that all devices made, some of them in part.

    A device completes the windows whose last token it has, and makes as many windows
    as it could complete at most, from the one that its first token is in.
    """
    windows = np.arange(devices * local // ratio)
    device = ((windows + 1) * ratio - 1) // local
    return device * -(-local // ratio) + windows - device * local // ratio


def gathered_tokens(
    x: Shaped[Array, "batch local_seq ..."], axes: str | tuple[str, ...] | None
) -> Shaped[Array, "batch seq ..."]:
    """The tokens of all devices of some mesh axes, in order.

    **Arguments:**

    - `x`: this device's.
    - `axes`: that split the sequence, major first.
    """
    return gather(x, axes, _SEQ)


def summed_and_split(
    x: Float[Array, "batch seq ..."], axis: str | None
) -> Float[Array, "batch local_seq ..."]:
    """This device's tokens of the sum over all devices of a mesh axis.

    **Arguments:**

    - `x`: partial sums of all tokens.
    - `axis`: the mesh axis.
    """
    return sum_and_split(x, axis, _SEQ)
