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

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.kernels.entries import Entries, Selection
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.sharding.gather import gather, size_of, sum_and_split

_SEQ = 1  # the dimension of tokens


class SplitSequence(eqx.Module):
    """Attention of a sequence that lies split over mesh axes, called like `Attention`.

    Where another axis splits the heads, the output is the sum over its devices.
    """

    attention: Attention
    axes: tuple[str, ...] = eqx.field(static=True)  # that split tokens, major first
    heads_axis: str | None = eqx.field(static=True)  # that splits heads, if one does

    def __call__(
        self,
        x: Float[Array, "batch local_seq dim"],
        positions: Int[Array, "batch local_seq"],
        segment_ids: Int[Array, "batch local_seq"] | None = None,
    ) -> Float[Array, "batch local_seq dim"]:
        """**Arguments:**

        - `x`: normalised activations of this device's tokens.
        - `positions`: of these tokens, in the whole sequence or in their documents.
        - `segment_ids`: their documents, where a row has several: of the whole rows'
            `document_starts`.
        """
        attention = dequantize(self.attention)
        latent = attention.project_latent(x)
        keys = attention.project_keys(x, positions)
        compressors = _compressors(attention, x.shape[1], self.axes)
        tokens, counts = _projected(compressors, x)
        num_before = _num_before(attention, x.shape[1], self.axes)
        # All in one message.
        *tokens, keys = with_tokens_before(
            [*tokens, keys], [*counts, num_before], self.axes
        )
        entries = _entries(compressors, tokens, positions, segment_ids, self.axes, x)
        selection = _selection(attention, entries, x, latent, positions, segment_ids)
        own = entries[0] if entries else None
        out = attention.attend(latent, positions, keys, own, selection, segment_ids)
        return out if self.heads_axis is None else lax.psum(out, self.heads_axis)


class SplitSequenceAndHeads(eqx.Module):
    """`SplitSequence` where the axis that splits the heads splits the tokens too.

    Each device compresses and selects for its own tokens; then those that split the
    heads gather latents and keys, attend for the tokens of all of them, each with its
    own heads, and split the tokens again where they add up the outputs. Of 8 tokens
    over context=2, tensor=2:

        device                     (0, 0)     (0, 1)     (1, 0)     (1, 1)
        compresses, selects        0 1        2 3        4 5        6 7
        attends, half the heads    0 1 2 3    0 1 2 3    4 5 6 7    4 5 6 7
        gives, of all heads        0 1        2 3        4 5        6 7
    """

    attention: Attention
    axes: tuple[str, ...] = eqx.field(static=True)  # that split tokens, major first
    heads_axis: str = eqx.field(static=True)  # the last of them

    def __call__(
        self,
        x: Float[Array, "batch local_seq dim"],
        positions: Int[Array, "batch local_seq"],
        segment_ids: Int[Array, "batch local_seq"] | None = None,
    ) -> Float[Array, "batch local_seq dim"]:
        """**Arguments:** as for `SplitSequence`."""
        attention = dequantize(self.attention)
        latent = attention.project_latent(x)
        keys = attention.project_keys(x, positions)
        compressors = _compressors(attention, x.shape[1], self.axes)
        tokens = with_tokens_before(*_projected(compressors, x), self.axes)
        entries = _entries(compressors, tokens, positions, segment_ids, self.axes, x)
        selection = _selection(attention, entries, x, latent, positions, segment_ids)
        joined = gathered_tokens(jnp.concatenate([latent, keys], 2), self.heads_axis)
        latent, keys = jnp.split(joined, [latent.shape[2]], axis=2)
        positions, segment_ids = self._of_all_heads(positions, segment_ids)
        if selection is not None:
            selection = gathered_tokens(selection, self.heads_axis)
        num_before = _num_before(attention, x.shape[1], self.axes)
        context = tuple(axis for axis in self.axes if axis != self.heads_axis)
        (keys,) = with_tokens_before([keys], [num_before], context)
        own = entries[0] if entries else None
        out = attention.attend(latent, positions, keys, own, selection, segment_ids)
        return summed_and_split(out, self.heads_axis)

    def _of_all_heads(
        self,
        positions: Int[Array, "batch local_seq"],
        segment_ids: Int[Array, "batch local_seq"] | None,
    ) -> tuple[Int[Array, "batch joined_seq"], Int[Array, "batch joined_seq"] | None]:
        """Positions and documents of the tokens of all devices of `heads_axis`."""
        if segment_ids is not None:
            joined = jnp.stack([positions, segment_ids], axis=2)
            joined = gathered_tokens(joined, self.heads_axis)
            return joined[..., 0], joined[..., 1]
        local = positions.shape[1]
        first = positions[:, :1] - lax.axis_index(self.heads_axis) * local
        index = jnp.arange(local * size_of((self.heads_axis,)), dtype=jnp.int32)
        return first + index, None


def split_sequence(
    attention: Attention, axes: tuple[str, ...], heads_axis: str | None
) -> SplitSequence | SplitSequenceAndHeads:
    """Attention of a sequence that lies split over mesh axes.

    **Arguments:**

    - `attention`: of one device.
    - `axes`: that split the tokens, major first.
    - `heads_axis`: that splits the heads, if one does; it may be the last of `axes`.
    """
    if heads_axis is not None and heads_axis in axes:
        return SplitSequenceAndHeads(attention, axes, heads_axis)
    return SplitSequence(attention, axes, heads_axis)


def _num_before(attention: Attention, local: int, axes: tuple[str, ...]) -> int:
    """Window keys before a device's tokens; no more than the sequence has."""
    return min(attention.window, local * size_of(axes)) - 1


# Lists of no kind: a name has one size, and the two compressors' heads differ.
def _compressors(attention: Attention, local: int, axes: tuple[str, ...]) -> list:
    """The layer's compressor, then the indexer's, as far as they are needed."""
    if attention.compressor is None:
        return []
    ratio = attention.compressor.ratio
    windows = local * size_of(axes) // ratio
    if windows == 0:
        return []
    if attention.indexer is None or windows <= attention.indexer.topk:
        return [attention.compressor]
    return [attention.compressor, attention.indexer.compressor]


def _projected(
    compressors: list, x: Float[Array, "batch local_seq dim"]
) -> tuple[list, list[int]]:
    """Values and gates of each compressor, and how many tokens before they need."""
    tokens = [part for one in compressors for part in one.project(x)]
    return tokens, [one.num_pending for one in compressors for _ in range(2)]


def _entries(
    compressors: list,
    tokens: list,
    positions: Int[Array, "batch local_seq"],
    segment_ids: Int[Array, "batch local_seq"] | None,
    axes: tuple[str, ...],
    x: Float[Array, "batch local_seq dim"],
) -> list:
    """The whole sequence's `Entries` of compressors with the same windows.

    **Arguments:**

    - `compressors`: of the layer.
    - `tokens`: values and gates of each, with those of the tokens before.
    - `positions`, `segment_ids`: of this device's tokens.
    - `axes`: that split the sequence, major first.
    - `x`: gives the entries' dtype.
    """
    if not compressors:
        return []
    ratio, local = compressors[0].ratio, positions.shape[1]
    most = -(-local // ratio)  # windows that may end among these tokens
    pairs = list(zip(compressors, tokens[::2], tokens[1::2], strict=True))
    if segment_ids is not None:
        own = positions, segment_ids, most, x.dtype
        made = [one.compress_documents(*pair, *own) for one, *pair in pairs]
        joined = _gathered_values([entries.values for entries in made], axes)
        of_entries = jnp.stack([made[0].last_positions, made[0].segment_ids], axis=2)
        of_entries = gathered_tokens(of_entries, axes)
        last, segment_ids = of_entries[..., 0], of_entries[..., 1]
        return [Entries(values, last, segment_ids) for values in joined]
    start = positions[:, 0]
    first = (start[:, None] // ratio + jnp.arange(most, dtype=start.dtype)) * ratio
    made = []
    for one, values, gates in pairs:
        pooled = one.pool_after(values, gates, start).astype(x.dtype)
        made.append(one.finish(pooled, first).values)
    place = _places_of_windows(size_of(axes), local, ratio)
    joined = _gathered_values(made, axes, place)
    last = (jnp.arange(len(place), dtype=jnp.int32) + 1) * ratio - 1
    last = jnp.broadcast_to(last, joined[0].shape[:2])
    return [Entries(values, last) for values in joined]


def _gathered_values(
    made: list, axes: tuple[str, ...], place: np.ndarray | slice = slice(None)
) -> list:
    """Entries of all devices, of several compressors in one message."""
    joined = gathered_tokens(jnp.concatenate(made, axis=2), axes)[:, place]
    ends = itertools.accumulate(part.shape[2] for part in made)
    return jnp.split(joined, list(ends)[:-1], axis=2)


def _selection(
    attention: Attention,
    entries: list,
    x: Float[Array, "batch local_seq dim"],
    latent: Float[Array, "batch local_seq q_rank"],
    positions: Int[Array, "batch local_seq"],
    segment_ids: Int[Array, "batch local_seq"] | None,
) -> Selection:
    """Which of all entries this device's tokens attend to, if they do not to all."""
    if attention.indexer is None or len(entries) < 2:
        return None
    weights = attention.indexer.project_weights(x)
    return attention.indexer.select(latent, weights, positions, entries[1], segment_ids)


def with_tokens_before(
    arrays: Sequence[Float[Array, "batch local_seq ..."]],
    counts: Sequence[int],
    axes: tuple[str, ...],
) -> list[Float[Array, "batch longer_seq ..."]]:
    """This device's tokens, and those before them from the devices before.

    **Arguments:** as for `tokens_before`.
    """
    before = tokens_before(arrays, counts, axes)
    return [jnp.concatenate(parts, _SEQ) for parts in zip(before, arrays, strict=True)]


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
