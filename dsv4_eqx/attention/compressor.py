"""Compression: each window of tokens becomes one entry.

Paper sections 2.3.1 and 2.3.2. The same module serves heavily compressed attention
(disjoint windows), compressed sparse attention and its indexer (each entry also pools
the window before its own, through a second series of channels).
"""

from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray

from dsv4_eqx.attention.cache import (
    CompressorState,
    Extended,
    rows_from,
    validate_state,
)
from dsv4_eqx.attention.documents import document_starts, last_tokens, tokens_from
from dsv4_eqx.kernels.entries import Entries, Values, replaced, write_if
from dsv4_eqx.kernels.pool import pool_windows
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.precision import wide_dtype
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.validation import (
    validate_flag,
    validate_ids,
    validate_number,
    validate_sizes,
)
from dsv4_eqx.primitives.norm import RMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding

# Finite, so that a softmax over nothing but such gates is not NaN.
_NO_WEIGHT: Final = -1e30


class Compressor(eqx.Module):
    r"""Pools windows of `ratio` tokens by a softmax over tokens, channel by channel.

    $C_w = \sum_j \mathrm{softmax}_j(Z_j + B_j) \odot V_j$ over the window's tokens $j$
    (paper eq. 20 to 23), float32, then normalised and rotated to the position of the
    window's first token. With two series, the same softmax also includes the tokens of
    the *previous* window, with their first series (eq. 9 to 12). The paper calls this
    series b; in the weights it comes first.
    """

    value: Float[Array, "series head_dim dim"]
    gate: Float[Array, "series head_dim dim"]
    position_bias: Float32[Array, "ratio series head_dim"]
    norm: RMSNorm
    rope: RotaryEmbedding
    dim: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    ratio: int = eqx.field(static=True)
    overlap: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        head_dim: int,
        ratio: int,
        *,
        overlap: bool = False,
        rope: RotaryEmbedding,
        norm_eps: float = 1e-6,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `dim`: channels of a token.
        - `head_dim`: channels of an entry.
        - `ratio`: tokens in a window.
        - `overlap`: whether an entry also pools the window before, by a second series.
        - `rope`: the layer's rotary embedding.
        - `norm_eps`: added to the mean square in the entries' norm.
        - `std`: deviation of the initial weights, which are normal.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights; the position bias is float32.

        **Raises:** ValueError if a size is not a positive integer, a number is negative
        or not finite, or the embedding rotates more channels than an entry has.
        """
        self.dim, self.head_dim, self.ratio = validate_sizes(
            "Compressor", dim=dim, head_dim=head_dim, ratio=ratio
        )
        validate_flag("Compressor", "overlap", overlap)
        std = validate_number("Compressor", "std", std)
        validate_rotary("Compressor", rope, self.head_dim)
        value_key, gate_key = jax.random.split(key)
        series = 2 if overlap else 1
        shape = (series, self.head_dim, self.dim)
        self.value = normal(value_key, shape, dtype, std=std)
        self.gate = normal(gate_key, shape, dtype, std=std)
        self.position_bias = jnp.zeros((ratio, series, head_dim), jnp.float32)
        self.norm = RMSNorm(head_dim, eps=norm_eps)
        self.rope = rope
        self.overlap = bool(overlap)

    @compiled_once
    @jax.named_scope("Compressor")
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Entries:
        """Entries of all complete windows of sequences that start at position 0.

        **Arguments:**

        - `x`: normalised activations; the entries have the same dtype.
        - `segment_ids`: document of each token, where a row has several; each document
            is compressed alone. An id that comes back begins a new document.

        **Raises:** ValueError if `segment_ids` are not one integer for each token.
        """
        ratio = self.ratio
        windows = x.shape[1] // ratio
        if segment_ids is not None:
            validate_ids("Compressor", "segment_ids", segment_ids, x.shape[:2])
            starts = document_starts(segment_ids)
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None] - starts
            values, gates = self.project(x)
            return self.compress_documents(
                values, gates, positions, starts, windows, x.dtype
            )
        values, gates = self.project(x[:, : windows * ratio])
        pooled = self.pool(_windows(values, ratio), _windows(gates, ratio))
        first = jnp.arange(windows, dtype=jnp.int32) * ratio
        return self.finish(pooled.astype(x.dtype), jnp.tile(first, (x.shape[0], 1)))

    def project(
        self, x: Float[Array, "batch seq dim"]
    ) -> tuple[
        Float[Array, "batch seq series head_dim"],
        Float[Array, "batch seq series head_dim"],
    ]:
        """Each token's values and gates, float32, from normalised activations."""
        values = project(x, self.value, wide=True)  # eq. 20; with overlap, eq. 9
        gates = project(x, self.gate, wide=True)  # eq. 21; with overlap, eq. 10
        return values, gates

    def pool(
        self,
        values: Float[Array, "batch windows ratio series head_dim"],
        gates: Float[Array, "batch windows ratio series head_dim"],
    ) -> Float[Array, "batch windows head_dim"]:
        """The weighted sum of each window's values, float32.

        Values and gates are from `project`, of consecutive windows; none comes before
        the first.
        """
        gates = gates + self.position_bias.astype(gates.dtype)[None, None]
        return pool_windows(values, gates)  # eq. 22, 23; with overlap, eq. 11, 12

    def compress_documents(
        self,
        values: Float[Array, "batch tokens series head_dim"],
        gates: Float[Array, "batch tokens series head_dim"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        windows: int,
        dtype: DTypeLike,
    ) -> Entries:
        """Entries of all windows whose last token is among the given tokens.

        With two series, an entry pools the first series of the window before and the
        second series of its own window. A document's first entry pools its own window
        only. For windows of 4 tokens:

            position        0  1  2  3  4  5  6  7  8  9
            first entry    [   own    ]
            second entry   [  before  ][   own    ]
            in no entry                             8  9

        Values and gates are from `project`: of earlier tokens that the windows need,
        then of the given tokens. Positions are those in the documents, and segment ids
        are never negative. `windows` is how many entries to return, at least as many as
        there are; the surplus ones have the segment id -1.
        """
        ratio, series, _ = self.position_bias.shape
        seq = positions.shape[1]
        last = last_tokens(positions, ratio, windows)
        is_window, last = last < seq, jnp.minimum(last, seq - 1)
        first_positions = jnp.take_along_axis(positions, last, axis=1) - (ratio - 1)
        first = last - (ratio - 1) + (values.shape[1] - seq)

        def pooled_tokens(x: Array, fill: float) -> Array:
            """The tokens that each window pools, one series after another."""
            parts = []
            for n in range(series):
                back = ratio * (series - 1 - n)  # tokens back to this series' window
                part = tokens_from(x[:, :, n], first - back, ratio)
                if back > 0:
                    exists = (first_positions >= back)[..., None, None]
                    part = jnp.where(exists, part, fill)
                parts.append(part)
            return jnp.concatenate(parts, axis=2)

        bias = jnp.concatenate([self.position_bias[:, n] for n in range(series)])
        gates = pooled_tokens(gates, _NO_WEIGHT) + bias.astype(gates.dtype)[None, None]
        values = pooled_tokens(values, 0)
        pooled = pool_windows(values[:, :, :, None], gates[:, :, :, None])  # as `pool`
        document = jnp.take_along_axis(segment_ids, last, axis=1)
        return self.finish(
            pooled.astype(dtype),
            jnp.where(is_window, first_positions, 0),
            jnp.where(is_window, document, -1),
        )

    def init_state(
        self, batch: int, capacity: int, dtype: DTypeLike
    ) -> CompressorState:
        """The state before any token, for `extend`.

        **Arguments:**

        - `batch`: rows.
        - `capacity`: the most tokens that a row can have.
        - `dtype`: of the entries.
        """
        ratio, series, head_dim = self.position_bias.shape
        pending = (batch, self.num_pending, series, head_dim)
        return CompressorState(
            values=jnp.zeros(pending, wide_dtype(dtype)),
            gates=jnp.zeros(pending, wide_dtype(dtype)),
            entries=jnp.zeros((batch, capacity // ratio, head_dim), dtype),
        )

    @compiled_once
    @jax.named_scope("Compressor.extend")
    def extend(
        self,
        x: Float[Array, "batch seq dim"],
        state: CompressorState,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Entries, Extended]:
        """All entries, including those of the windows that new tokens complete.

        **Arguments:**

        - `x`: normalised activations of the new tokens, then padding.
        - `state`: after `start` tokens.
        - `start`: tokens that each row has already.
        - `lengths`: new tokens of each row.

        **Returns:** the entries, and an `Extended`, whose `keep` gives the next state.

        **Raises:** ValueError if `state` is not a `CompressorState`, such as an
        `Extended` whose `keep` was not called.
        """
        validate_state("Compressor.extend", state, CompressorState)
        ratio = self.ratio
        values, gates = self.project(x)
        values = jnp.concatenate([state.values, values], axis=1)
        gates = jnp.concatenate([state.gates, gates], axis=1)
        num_windows = -(-x.shape[1] // ratio)  # that may become complete
        index = jnp.arange(num_windows, dtype=start.dtype)[None]
        window = start[:, None] // ratio + index
        is_new = (window + 1) * ratio <= (start + lengths)[:, None]

        def write(entries: Values, start: Int[Array, " batch"]) -> Values:
            pooled = self.pool_after(values, gates, start)
            new = self.rope(self.norm(pooled.astype(x.dtype)), window * ratio)
            place = jnp.where(is_new, window, entries.shape[1])
            return replaced(entries, place, new)

        entries = write_if(jnp.any(is_new), write, state.entries, start)
        index = jnp.arange(1, entries.shape[1] + 1, dtype=jnp.int32)
        last_positions = jnp.broadcast_to(index * ratio - 1, entries.shape[:2])
        extended = Extended(CompressorState(values, gates, entries), x.shape[1])
        return Entries(entries, last_positions), extended

    @property
    def num_pending(self) -> int:
        """How many tokens before its last one an entry may need."""
        ratio, series, _ = self.position_bias.shape
        return ratio * series - 1

    def pool_after(
        self,
        values: Float[Array, "batch seq series head_dim"],
        gates: Float[Array, "batch seq series head_dim"],
        start: Int[Array, " batch"],
    ) -> Float[Array, "batch windows head_dim"]:
        """Pools the windows of new tokens, beginning with the first new token's.

        Values and gates are from `project`, of the `num_pending` tokens before position
        `start` and of the new tokens. As many windows are returned as the new tokens
        can complete at most; those that remain incomplete are meaningless. Tokens
        before position 0 have weight 0. With ratio 4, two series and five new tokens
        from position 10 on, seven are pending:

            position     3   4 5 6 7   8 9 10 11   12 13 14 -- (padding)
            input        pending: 3 .. 9     new: 10 .. 14
            window           ---1---   ----2----   -----3-----
                             ^ begin       ^ start

        Window 2 becomes complete; window 1 is read because window 2's entry pools its
        tokens too. Window 3 stays incomplete here, but not for every `start`.
        """
        ratio, series, _ = self.position_bias.shape
        num_new = values.shape[1] - self.num_pending
        windows = -(-num_new // ratio)
        num_before = series - 1  # windows that only the first entry needs
        size = (num_before + windows) * ratio
        first = (start // ratio - num_before) * ratio  # position of the first token
        begin = first - (start - self.num_pending)  # its index in `values`
        position = first[:, None] + jnp.arange(size, dtype=start.dtype)[None]
        is_token = (position >= 0)[..., None, None]
        padding = ((0, 0), (0, ratio - 1), (0, 0), (0, 0))
        values = rows_from(jnp.pad(values, padding), begin, size, -3)
        gates = rows_from(jnp.pad(gates, padding), begin, size, -3)
        pooled = self.pool(
            _windows(jnp.where(is_token, values, 0), ratio),
            _windows(jnp.where(is_token, gates, _NO_WEIGHT), ratio),
        )
        return pooled[:, num_before:]

    def finish(
        self,
        pooled: Float[Array, "batch windows head_dim"],
        first_positions: Int[Array, "batch windows"],
        segment_ids: Int[Array, "batch windows"] | None = None,
    ) -> Entries:
        """Normalised, rotated entries, in the dtype of `pooled`.

        Positions and segment ids are those of each window's first token.
        """
        values = self.rope(self.norm(pooled), first_positions)
        return Entries(values, first_positions + (self.ratio - 1), segment_ids)


def _windows(x: Float[Array, "batch seq *channels"], ratio: int) -> Array:
    return x.reshape(x.shape[0], x.shape[1] // ratio, ratio, *x.shape[2:])


def validate_rotary(call: str, rope: RotaryEmbedding, head_dim: int) -> None:
    """Refuses a rotary embedding of more channels than a head has."""
    if rope.rotary_dim > head_dim:
        raise ValueError(
            f"{call}: rope rotates {rope.rotary_dim} channels and head_dim is "
            f"{head_dim}: give an embedding with a rotary_dim of at most that."
        )
