"""The lightning indexer: which compressed entries each query attends to.

Paper section 2.3.1, eq. 13 to 17. Small heads score every visible entry; the best
`topk` are selected. Scores are computed for one block of queries at a time, and only
for the entries that the block can see. The selection has no gradient, so that a loss
over tokens does not train the indexer; `divergence.py` has what does.

The released code multiplies queries and keys by an orthonormal Hadamard matrix before
quantising them; without quantisation it cancels in the product and is left out.
"""

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.attention.cache import (
    CompressorState,
    Extended,
    positions_after,
    validate_capacity,
    validate_state,
)
from dsv4_eqx.attention.compressor import Compressor
from dsv4_eqx.attention.documents import document_starts
from dsv4_eqx.attention.values import IndexerValues, no_selected
from dsv4_eqx.kernels.chosen import over_heads
from dsv4_eqx.kernels.entries import Entries, Selection, visible
from dsv4_eqx.kernels.query_blocks import map_blocks
from dsv4_eqx.kernels.select import query_block, select, select_with_scores
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.validation import validate_number, validate_sizes


class Indexer(eqx.Module):
    r"""Scores entries and selects the best.

    $I_{t,w} = \sum_h \omega_{t,h}\,\mathrm{ReLU}(q_{t,h} \cdot k_w)$ (eq. 16).

    Of the entries that a query sees, the `topk` with the highest scores are selected;
    among equal scores, the earlier ones.
    """

    query_up: Float[Array, "index_heads index_dim q_rank"]
    head_weights: Float[Array, "index_heads dim"]
    compressor: Compressor
    dim: int = eqx.field(static=True)
    q_rank: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    topk: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        q_rank: int,
        num_heads: int,
        topk: int,
        *,
        compressor: Compressor,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `dim`: channels of a token.
        - `q_rank`: channels of the query latent.
        - `num_heads`: heads, each of `compressor.head_dim` channels.
        - `topk`: entries that a query selects.
        - `compressor`: makes the indexer's own entries, in windows like the layer's;
            queries are rotated by its embedding.
        - `std`: deviation of the initial weights, which are normal.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights.

        **Raises:** ValueError if a size is not a positive integer, or `std` is negative
        or not finite.
        """
        self.dim, self.q_rank, self.num_heads, self.topk = validate_sizes(
            "Indexer", dim=dim, q_rank=q_rank, num_heads=num_heads, topk=topk
        )
        std = validate_number("Indexer", "std", std)
        query_key, weight_key = jax.random.split(key)
        query_shape = (self.num_heads, compressor.head_dim, self.q_rank)
        self.query_up = normal(query_key, query_shape, dtype, std=std)
        weight_shape = (self.num_heads, self.dim)
        self.head_weights = normal(weight_key, weight_shape, dtype, std=std)
        self.compressor = compressor

    def with_topk(self, topk: int) -> "Indexer":
        """The same indexer, selecting so many entries.

        **Raises:** ValueError if `topk` is not a positive integer.
        """
        (topk,) = validate_sizes("Indexer.with_topk", topk=topk)
        indexer = copy.copy(self)
        object.__setattr__(indexer, "topk", topk)
        return indexer

    @compiled_once
    @jax.named_scope("Indexer")
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Selection:
        """The selection of every query of sequences that start at position 0.

        None means that all visible entries are selected.

        **Arguments:**

        - `x`: normalised activations.
        - `latent`: the normalised query latent, shared with attention.
        - `positions`: of the tokens, each in its document.
        - `segment_ids`: as for `Compressor`.
        """
        if x.shape[1] // self.compressor.ratio <= self.topk:
            return None  # all visible entries are selected: no score is needed
        return self.select(*self.operands(x, latent, positions, segment_ids))

    @compiled_once
    @jax.named_scope("Indexer.observe")
    def observe(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Selection, IndexerValues]:
        """Calls it, and returns windows and scores of what was selected beside it."""
        windows = x.shape[1] // self.compressor.ratio
        if windows == 0:
            return None, no_selected(*x.shape[:2])
        operands = self.operands(x, latent, positions, segment_ids)
        return self.select_observed(*operands, num_windows=windows)

    def operands(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> tuple:
        """The arguments of `select`, of whole sequences; its own are as for calling."""
        # Starts of documents are the ids that the entries have.
        starts = () if segment_ids is None else (document_starts(segment_ids),)
        keys = self.compressor(x, *starts)
        return latent, self.project_weights(x), positions, keys, *starts

    def extend(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        state: CompressorState,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Selection, Extended]:
        """The selection of the queries of new tokens.

        **Arguments:**

        - `x`: normalised activations of the new tokens, then padding.
        - `latent`: their normalised query latents.
        - `state`: of the indexer's compressor after `start` tokens.
        - `start`: tokens that each row has already.
        - `lengths`: new tokens of each row.

        **Returns:** the selection, and an `Extended`; its `keep` gives the next state.

        **Raises:** ValueError if `state` is not a `CompressorState`, such as an
        `Extended` whose `keep` was not called; and, except under `jit`, if a row would
        complete more windows than the state has room for.
        """
        validate_state("Indexer.extend", state, CompressorState)
        capacity = self.compressor.capacity(state)
        validate_capacity("Indexer.extend", capacity, start, lengths)
        return self._extend(x, latent, state, start, lengths)

    @compiled_once
    def _extend(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        state: CompressorState,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Selection, Extended]:
        keys, extended = self.compressor.extend(x, state, start, lengths)
        if keys.values.shape[1] <= self.topk:
            return None, extended
        positions = positions_after(start, lengths, x.shape[1])
        weights = self.project_weights(x)
        return self.select(latent, weights, positions, keys), extended

    def project_weights(
        self, x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch seq index_heads"]:
        """The weight of each head for each query, scaled, at least float32."""
        heads, dim, _ = self.query_up.shape
        weights = project(x, self.head_weights)  # eq. 15
        return at_least_float32(weights) * (dim**-0.5 * heads**-0.5)

    def select(
        self,
        latent: Float[Array, "batch seq q_rank"],
        weights: Float[Array, "batch seq index_heads"],
        positions: Int[Array, "batch seq"],
        keys: Entries,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Selection:
        """Selects the entries with the highest scores among those that a query sees.

        `weights` are from `project_weights`, and `keys` the indexer's own entries; give
        each query's document if these have segment ids.
        """
        return self._by_blocks(select, latent, weights, positions, keys, segment_ids)

    def select_observed(
        self,
        latent: Float[Array, "batch seq q_rank"],
        weights: Float[Array, "batch seq index_heads"],
        positions: Int[Array, "batch seq"],
        keys: Entries,
        segment_ids: Int[Array, "batch seq"] | None = None,
        *,
        num_windows: int,
    ) -> tuple[Selection, IndexerValues]:
        """The selection, None if all entries are selected, and what it consists of.

        `num_windows` is their number in the sequence, the most that a query can see.
        """
        selection, best, scores = self._by_blocks(
            select_with_scores, latent, weights, positions, keys, segment_ids
        )
        # No query sees more: what is cut off is -1.
        best, scores = best[..., :num_windows], scores[..., :num_windows]
        rows = jnp.arange(len(best), dtype=best.dtype)[:, None, None]
        windows = keys.last_positions[rows, best] // self.compressor.ratio
        values = IndexerValues(jnp.where(best < 0, -1, windows), scores)
        return selection if num_windows > self.topk else None, values

    def _by_blocks(
        self,
        function: Callable[..., Any],
        latent: Float[Array, "batch seq q_rank"],
        weights: Float[Array, "batch seq index_heads"],
        positions: Int[Array, "batch seq"],
        keys: Entries,
        segment_ids: Int[Array, "batch seq"] | None,
    ) -> Any:
        """A function such as `select`, given one block of queries at a time."""
        latent, weights, keys = lax.stop_gradient((latent, weights, keys))
        indexer = lax.stop_gradient(self)

        def run_block(operands: tuple) -> Any:
            latent, weights, positions, segment_ids = operands
            queries = indexer.project_queries(latent, positions)
            seen = visible(keys, positions, segment_ids)
            return function(queries, weights, seen, keys, self.topk)  # eq. 16, 17

        operands = (latent, weights, positions, segment_ids)
        return map_blocks(run_block, operands, query_block(keys))

    def project_queries(
        self,
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq index_heads index_dim"]:
        """Rotated queries of the index heads."""
        queries = project(latent, self.query_up)  # eq. 14
        return self.compressor.rope(queries, positions[..., None])

    def score_chosen(
        self,
        latent: Float[Array, "batch seq q_rank"],
        weights: Float[Array, "batch seq index_heads"],
        positions: Int[Array, "batch seq"],
        keys: Entries,
        selection: Selection,
    ) -> Float[Array, "batch seq chosen"]:
        """Scores of the entries that a selection names, or of all; with a gradient.

        The other arguments are those of `select`.
        """
        queries = self.project_queries(latent, positions)

        def weighted(products: Array) -> Array:
            rectified = jax.nn.relu(products)
            return jnp.einsum(
                "bqhe,bqh->bqe", rectified, weights, precision=lax.Precision.HIGHEST
            )

        return over_heads(weighted, queries, keys, selection)  # eq. 16
