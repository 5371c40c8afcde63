"""Context parallelism: attention of sequences that are split over a mesh, exactly.

Every device has consecutive tokens, which it projects and compresses. The tokens before
them that its windows need come from the device before. Entries are few, so every device
gathers all of them; it then selects and attends for its own queries.

The devices of `tensor`, which split the heads, may split the tokens too, outside of
attention. They then gather latents and keys, which are narrow, before the heads attend;
a reduce-scatter adds up the heads' outputs and splits the tokens again.
"""

import abc
import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.attention.divergence import divergence_by_blocks
from dsv4_eqx.attention.values import (
    AttentionValues,
    IndexerDivergence,
    IndexerValues,
    no_selected,
)
from dsv4_eqx.kernels.entries import Entries, Selection
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.sharding.gather import gather, own_part, size_of, sum_and_split
from dsv4_eqx.sharding.tensor import of_all_heads, with_zeros_for_other_heads
from dsv4_eqx.sharding.tokens import with_tokens_before

_SEQ = 1  # the dimension of tokens


class AbstractSplitSequence(eqx.Module):
    """Attention of a sequence that is split over mesh axes, called like `Attention`."""

    attention: eqx.AbstractVar[Attention]
    axes: eqx.AbstractVar[tuple[str, ...]]  # that split tokens, major first

    def __call__(
        self,
        x: Float[Array, "batch local_seq dim"],
        positions: Int[Array, "batch local_seq"],
        segment_ids: Int[Array, "batch local_seq"] | None = None,
    ) -> Float[Array, "batch local_seq dim"]:
        """The output for this device's tokens; `positions` are in the whole sequence.

        Where a row has several documents, positions are in these, and `segment_ids` are
        those that `document_starts` gives for the whole rows.
        """
        return self._run(x, positions, segment_ids, is_observed=False)[0]

    def observe(
        self,
        x: Float[Array, "batch local_seq dim"],
        positions: Int[Array, "batch local_seq"],
        segment_ids: Int[Array, "batch local_seq"] | None = None,
    ) -> tuple[Float[Array, "batch local_seq dim"], AttentionValues]:
        """The output, and what `Attention.observe` shows of this device's tokens."""
        return self._run(x, positions, segment_ids, is_observed=True)

    @abc.abstractmethod
    def _run(self, x, positions, segment_ids, *, is_observed) -> tuple[Array, Any]:
        """The output and, where it is observed, what is shown."""


class SplitSequence(AbstractSplitSequence):
    """Heads are whole, or split over another axis: the output is then added up."""

    attention: Attention
    axes: tuple[str, ...] = eqx.field(static=True)
    heads_axis: str | None = eqx.field(static=True)  # that splits heads, if one does

    def _run(self, x, positions, segment_ids, *, is_observed) -> tuple[Array, Any]:
        attention, axes = dequantize(self.attention), self.axes
        latent = attention.project_latent(x)
        keys = attention.project_keys(x, positions)
        compressors = _compressors(attention, x.shape[1], axes, is_observed)
        projected, counts = _projected(compressors, x)
        counts.append(_num_before(attention, x.shape[1], axes))
        # One message for everything.
        *projected, keys = with_tokens_before([*projected, keys], counts, axes)
        places = positions, segment_ids
        entries = _entries(compressors, projected, *places, axes, x.dtype)
        tokens = x, latent, *places
        selection, indexer = _selection(attention, entries, tokens, axes, is_observed)
        attended = entries[0] if entries else None  # not those of the indexer
        operands = latent, positions, keys, attended, selection, segment_ids
        out, log_sum_exp = _attend(attention, operands, is_observed)
        values = None
        if is_observed:
            weights = _taught_weights(attention, x)
            divergence = _divergence(
                attention, operands, log_sum_exp, weights, entries, self.heads_axis
            )
            values = AttentionValues(log_sum_exp, indexer, divergence)
        if self.heads_axis is None:
            return out, values
        return lax.psum(out, self.heads_axis), of_all_heads(values, self.heads_axis)


class SplitSequenceAndHeads(AbstractSplitSequence):
    """The axis that splits the heads splits the tokens too.

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
    axes: tuple[str, ...] = eqx.field(static=True)
    heads_axis: str = eqx.field(static=True)  # the last of them

    def _run(self, x, positions, segment_ids, *, is_observed) -> tuple[Array, Any]:
        attention, axes = dequantize(self.attention), self.axes
        latent = attention.project_latent(x)
        keys = attention.project_keys(x, positions)
        compressors = _compressors(attention, x.shape[1], axes, is_observed)
        projected = with_tokens_before(*_projected(compressors, x), axes)
        places = positions, segment_ids
        entries = _entries(compressors, projected, *places, axes, x.dtype)
        tokens = x, latent, *places
        selection, indexer = _selection(attention, entries, tokens, axes, is_observed)
        joined = gather(jnp.concatenate([latent, keys], 2), self.heads_axis, _SEQ)
        latent, keys = jnp.split(joined, [latent.shape[2]], axis=2)
        positions, segment_ids = self._of_all_heads(*places)
        if selection is not None:
            selection = gather(selection, self.heads_axis, _SEQ)
        num_before = _num_before(attention, x.shape[1], axes)
        (keys,) = with_tokens_before([keys], [num_before], axes[:-1])
        attended = entries[0] if entries else None  # not those of the indexer
        operands = latent, positions, keys, attended, selection, segment_ids
        out, log_sum_exp = _attend(attention, operands, is_observed)
        out = sum_and_split(out, self.heads_axis, _SEQ)
        if not is_observed:
            return out, None
        weights = _taught_weights(attention, x)
        if weights is not None:
            weights = gather(weights, self.heads_axis, _SEQ)
        divergence = _divergence(
            attention, operands, log_sum_exp, weights, entries, self.heads_axis
        )
        # All of these devices know it of each other's tokens; each teaches by its own.
        divergence = jax.tree.map(
            lambda x: own_part(x, self.heads_axis, _SEQ), divergence
        )
        parts = with_zeros_for_other_heads(log_sum_exp, self.heads_axis)
        log_sum_exp = sum_and_split(parts, self.heads_axis, _SEQ)
        return out, AttentionValues(log_sum_exp, indexer, divergence)

    def _of_all_heads(
        self,
        positions: Int[Array, "batch local_seq"],
        segment_ids: Int[Array, "batch local_seq"] | None,
    ) -> tuple[Int[Array, "batch joined_seq"], Int[Array, "batch joined_seq"] | None]:
        """Positions and documents of the tokens of all devices of `heads_axis`."""
        if segment_ids is not None:
            joined = jnp.stack([positions, segment_ids], axis=2)
            joined = gather(joined, self.heads_axis, _SEQ)
            return joined[..., 0], joined[..., 1]
        local = positions.shape[1]
        first = positions[:, :1] - lax.axis_index(self.heads_axis) * local
        index = jnp.arange(local * size_of(self.heads_axis), dtype=jnp.int32)[None]
        return first + index, None


def _num_before(attention: Attention, local: int, axes: tuple[str, ...]) -> int:
    """Window keys before a device's tokens, at most as many as the sequence has."""
    return min(attention.window, local * size_of(axes)) - 1


# Unannotated lists: a dimension name has one size, and the two compressors' differ.
def _compressors(
    attention: Attention, local: int, axes: tuple[str, ...], is_observed: bool
) -> list:
    """The layer's compressor, then the indexer's, where they are needed."""
    if attention.compressor is None:
        return []
    windows = local * size_of(axes) // attention.compressor.ratio
    if windows == 0:
        return []
    if attention.indexer is None:
        return [attention.compressor]
    if windows <= attention.indexer.topk and not is_observed:
        return [attention.compressor]
    return [attention.compressor, attention.indexer.compressor]


def _projected(
    compressors: list, x: Float[Array, "batch local_seq dim"]
) -> tuple[list, list[int]]:
    """Values and gates of each compressor, and how many earlier tokens each needs."""
    # The layer's compressor comes first. Nothing but its weights trains the indexer's.
    inputs = [x, lax.stop_gradient(x)][: len(compressors)]
    pairs = zip(compressors, inputs, strict=True)
    tokens = [part for compressor, x in pairs for part in compressor.project(x)]
    counts = [compressor.num_pending for compressor in compressors for _ in range(2)]
    return tokens, counts


def _entries(
    compressors: list,
    projected: list,
    positions: Int[Array, "batch local_seq"],
    segment_ids: Int[Array, "batch local_seq"] | None,
    axes: tuple[str, ...],
    dtype: np.dtype,
) -> list:
    """The whole sequence's `Entries`, for compressors with the same windows."""
    if not compressors:
        return []
    ratio, local = compressors[0].ratio, positions.shape[1]
    num_windows = -(-local // ratio)  # that may end among these tokens
    pairs = list(zip(compressors, projected[::2], projected[1::2], strict=True))
    if segment_ids is not None:
        arguments = positions, segment_ids, num_windows, dtype
        local_entries = [
            compressor.compress_documents(*pair, *arguments)
            for compressor, *pair in pairs
        ]
        joined = _gathered_values([entries.values for entries in local_entries], axes)
        first = local_entries[0]
        places = jnp.stack([first.last_positions, first.segment_ids], axis=2)
        places = gather(places, axes, _SEQ)
        last, segment_ids = places[..., 0], places[..., 1]
        return [Entries(values, last, segment_ids) for values in joined]
    start = positions[:, 0]
    index = jnp.arange(num_windows, dtype=start.dtype)[None]
    first_positions = (start[:, None] // ratio + index) * ratio
    local_values = []
    for compressor, values, gates in pairs:
        pooled = compressor.pool_after(values, gates, start).astype(dtype)
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
    joined = gather(jnp.concatenate(parts, axis=2), axes, _SEQ)[:, place]
    ends = itertools.accumulate(part.shape[2] for part in parts)
    return jnp.split(joined, list(ends)[:-1], axis=2)


def _selection(
    attention: Attention,
    entries: list,
    tokens: tuple,
    axes: tuple[str, ...],
    is_observed: bool,
) -> tuple[Selection, IndexerValues | None]:
    """The entries that this device's tokens attend to; None where they see all."""
    indexer, (x, latent, positions, segment_ids) = attention.indexer, tokens
    if indexer is None:
        return None, None
    if len(entries) < 2:
        return None, no_selected(*x.shape[:2]) if is_observed else None
    weights = indexer.project_weights(x)
    operands = latent, weights, positions, entries[1], segment_ids
    if not is_observed:
        return indexer.select(*operands), None
    windows = x.shape[1] * size_of(axes) // indexer.compressor.ratio
    return indexer.select_observed(*operands, num_windows=windows)


def _attend(
    attention: Attention, operands: tuple, is_observed: bool
) -> tuple[Array, Any]:
    if is_observed:
        return attention.attend_observed(*operands)
    return attention.attend(*operands), None


def _taught_weights(
    attention: Attention, x: Float[Array, "batch local_seq dim"]
) -> Float[Array, "batch local_seq index_heads"] | None:
    """The indexer's head weights as its loss trains them; None without an indexer."""
    if attention.indexer is None:
        return None
    return attention.indexer.project_weights(lax.stop_gradient(x))


def _divergence(
    attention: Attention,
    operands: tuple,
    log_sum_exp: Float[Array, "batch joined_seq local_heads"],
    weights: Float[Array, "batch joined_seq index_heads"] | None,
    entries: list,
    heads_axis: str | None,
) -> IndexerDivergence | None:
    """Of the tokens for which the device attends, with the `operands` of attention."""
    if weights is None:
        return None
    latent, positions, _, attended, selection, segment_ids = operands
    documents = () if segment_ids is None else (segment_ids,)
    per_query = latent, positions, log_sum_exp, weights, selection, *documents
    keys = entries[1] if len(entries) > 1 else None
    if heads_axis is None:
        return divergence_by_blocks(attention, per_query, attended, keys)
    sum_heads = functools.partial(lax.psum, axis_name=heads_axis)
    return divergence_by_blocks(attention, per_query, attended, keys, sum_heads)


def _places_of_windows(devices: int, local: int, ratio: int) -> np.ndarray:
    """The index of each complete window among the gathered windows of all devices.

    A device completes the windows whose last token it has. It returns as many windows
    as it can complete at most, beginning with the window of its first token; some of
    these are incomplete.
    """
    windows = np.arange(devices * local // ratio)
    device = ((windows + 1) * ratio - 1) // local
    return device * -(-local // ratio) + windows - device * local // ratio
