"""Context parallelism: attention of sequences that are split over a mesh, exactly.

Every device has consecutive tokens, which it projects and compresses. The tokens before
them that its windows need come from the device before. Entries are few, so every device
gathers all of them; it then selects and attends for its own queries.

The devices of `tensor`, which split the heads, may split the tokens too, outside of
attention. They then gather latents and keys, which are narrow, before the heads attend;
a reduce-scatter adds up the heads' outputs and splits the tokens again.
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
    """Attention of a sequence that is split over mesh axes, called like `Attention`.

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
        - `segment_ids`: their documents, where a row has several, as
            `document_starts` of the whole rows gives them.
        """
        attention = dequantize(self.attention)
        latent = attention.project_latent(x)
        keys = attention.project_keys(x, positions)
        compressors = _compressors(attention, x.shape[1], self.axes)
        tokens, counts = _projected(compressors, x)
        num_before = _num_before(attention, x.shape[1], self.axes)
        # One message for everything.
        *tokens, keys = with_tokens_before(
            [*tokens, keys], [*counts, num_before], self.axes
        )
        entries = _entries(compressors, tokens, positions, segment_ids, self.axes, x)
        selection = _selection(attention, entries, x, latent, positions, segment_ids)
        attended = entries[0] if entries else None  # not those of the indexer
        out = attention.attend(
            latent, positions, keys, attended, selection, segment_ids
        )
        return out if self.heads_axis is None else lax.psum(out, self.heads_axis)


class SplitSequenceAndHeads(eqx.Module):
    """`SplitSequence` where the axis that splits the heads splits the tokens too.

    Each device compresses and selects for its own tokens. Then the devices that split
    the heads gather each other's latents and keys, and each attends with its heads for
    all of these tokens. A reduce-scatter adds up the outputs and splits the tokens
    again. 8 tokens over context=2, tensor=2:

        device                     (0, 0)     (0, 1)     (1, 0)     (1, 1)
        compresses, selects        0 1        2 3        4 5        6 7
        attends, half the heads    0 1 2 3    0 1 2 3    4 5 6 7    4 5 6 7
        returns, of all heads      0 1        2 3        4 5        6 7
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
        attended = entries[0] if entries else None  # not those of the indexer
        out = attention.attend(
            latent, positions, keys, attended, selection, segment_ids
        )
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
    """Attention of a sequence that is split over mesh axes.

    **Arguments:**

    - `attention`: one device's part of the weights.
    - `axes`: the mesh axes that split the tokens, major first.
    - `heads_axis`: the mesh axis that splits the heads, if any; it may be the last of
        `axes`.
    """
    if heads_axis is not None and heads_axis in axes:
        return SplitSequenceAndHeads(attention, axes, heads_axis)
    return SplitSequence(attention, axes, heads_axis)


def _num_before(attention: Attention, local: int, axes: tuple[str, ...]) -> int:
    """Window keys before a device's tokens, at most as many as the sequence has."""
    return min(attention.window, local * size_of(axes)) - 1


# Unannotated lists: a dimension name has one size, and the two compressors' differ.
def _compressors(attention: Attention, local: int, axes: tuple[str, ...]) -> list:
    """The layer's compressor, then the indexer's, where they are needed."""
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
    """Values and gates of each compressor, and how many earlier tokens each needs."""
    tokens = [part for compressor in compressors for part in compressor.project(x)]
    counts = [compressor.num_pending for compressor in compressors for _ in range(2)]
    return tokens, counts


def _entries(
    compressors: list,
    tokens: list,
    positions: Int[Array, "batch local_seq"],
    segment_ids: Int[Array, "batch local_seq"] | None,
    axes: tuple[str, ...],
    x: Float[Array, "batch local_seq dim"],
) -> list:
    """The whole sequence's `Entries`, for compressors with the same windows.

    **Arguments:**

    - `compressors`: of the layer.
    - `tokens`: values and gates of each compressor, with those of the tokens before.
    - `positions`, `segment_ids`: of this device's tokens.
    - `axes`: the mesh axes that split the sequence, major first.
    - `x`: activations, whose dtype the entries have.
    """
    if not compressors:
        return []
    ratio, local = compressors[0].ratio, positions.shape[1]
    num_windows = -(-local // ratio)  # that may end among these tokens
    pairs = list(zip(compressors, tokens[::2], tokens[1::2], strict=True))
    if segment_ids is not None:
        arguments = positions, segment_ids, num_windows, x.dtype
        local_entries = [
            compressor.compress_documents(*pair, *arguments)
            for compressor, *pair in pairs
        ]
        joined = _gathered_values([entries.values for entries in local_entries], axes)
        first = local_entries[0]
        places = jnp.stack([first.last_positions, first.segment_ids], axis=2)
        places = gathered_tokens(places, axes)
        last, segment_ids = places[..., 0], places[..., 1]
        return [Entries(values, last, segment_ids) for values in joined]
    start = positions[:, 0]
    windows = start[:, None] // ratio + jnp.arange(num_windows, dtype=start.dtype)
    first_positions = windows * ratio
    local_values = []
    for compressor, values, gates in pairs:
        pooled = compressor.pool_after(values, gates, start).astype(x.dtype)
        local_values.append(compressor.finish(pooled, first_positions).values)
    place = _places_of_windows(size_of(axes), local, ratio)
    joined = _gathered_values(local_values, axes, place)
    last = (jnp.arange(len(place), dtype=jnp.int32) + 1) * ratio - 1
    last = jnp.broadcast_to(last, joined[0].shape[:2])
    return [Entries(values, last) for values in joined]


def _gathered_values(
    parts: list, axes: tuple[str, ...], place: np.ndarray | slice = slice(None)
) -> list:
    """Entries of all devices; one message for all compressors."""
    joined = gathered_tokens(jnp.concatenate(parts, axis=2), axes)[:, place]
    ends = itertools.accumulate(part.shape[2] for part in parts)
    return jnp.split(joined, list(ends)[:-1], axis=2)


def _selection(
    attention: Attention,
    entries: list,
    x: Float[Array, "batch local_seq dim"],
    latent: Float[Array, "batch local_seq q_rank"],
    positions: Int[Array, "batch local_seq"],
    segment_ids: Int[Array, "batch local_seq"] | None,
) -> Selection:
    """The entries that this device's tokens attend to; None where they see all."""
    if attention.indexer is None or len(entries) < 2:
        return None
    weights = attention.indexer.project_weights(x)
    return attention.indexer.select(latent, weights, positions, entries[1], segment_ids)


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


def _places_of_windows(devices: int, local: int, ratio: int) -> np.ndarray:
    """The index of each complete window among the gathered windows of all devices.

    A device completes the windows whose last token it has. It returns as many windows
    as it can complete at most, beginning with the window of its first token; some of
    these are incomplete.
    """
    windows = np.arange(devices * local // ratio)
    device = ((windows + 1) * ratio - 1) // local
    return device * -(-local // ratio) + windows - device * local // ratio


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
