"""The lightning indexer: which compressed entries each query attends to.

Paper section 2.3.1, eq. 13 to 17. Small heads score every visible entry; the best
`topk` are selected. Scores are computed for a block of queries at a time, and only over
the entries that the block can see. Selecting gives the indexer no gradient.

The released code multiplies queries and keys by an orthonormal Hadamard matrix before
quantising them; without quantisation it cancels in the product and is left out.
"""

from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from dsv4_eqx.attention.attend import (
    QUERY_BLOCK,
    Selection,
    join_blocks,
    split_blocks,
)
from dsv4_eqx.attention.cache import CompressorState, positions_after
from dsv4_eqx.attention.compressor import Compressor
from dsv4_eqx.attention.entries import Entries, tile_of, visible
from dsv4_eqx.config import Config
from dsv4_eqx.primitives.precision import at_least_float32
from dsv4_eqx.primitives.product import project
from dsv4_eqx.primitives.rotary import RotaryEmbedding

# Attending to an entry of one's own costs about this many times one in common.
_GATHER_COST: Final = 4
_ENTRY_TILE: Final = 256


class Indexer(eqx.Module):
    r"""Scores entries and selects the best.

    $I_{t,w} = \sum_h \omega_{t,h}\,\mathrm{ReLU}(q_{t,h} \cdot k_w)$ (eq. 16).

    Of the entries that a query sees, the `topk` highest scores are selected; equal
    scores: the earlier entry.
    """

    query_up: Float[Array, "index_heads index_dim q_rank"]
    head_weights: Float[Array, "index_heads dim"]
    compressor: Compressor
    rope: RotaryEmbedding
    topk: int = eqx.field(static=True)

    def __init__(
        self,
        config: Config,
        *,
        ratio: int,
        rope: RotaryEmbedding,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `config`: sizes and `index_topk`.
        - `ratio`: tokens in a window.
        - `rope`: the layer's rotary embedding.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights.
        """
        query_key, weight_key, compressor_key = jax.random.split(key, 3)
        heads, dim, std = (
            config.index_n_heads,
            config.index_head_dim,
            config.initializer_range,
        )
        self.query_up = std * jax.random.normal(
            query_key, (heads, dim, config.q_lora_rank), dtype
        )
        self.head_weights = std * jax.random.normal(
            weight_key, (heads, config.hidden_size), dtype
        )
        self.compressor = Compressor(
            config,
            ratio=ratio,
            overlap=True,
            head_dim=dim,
            rope=rope,
            key=compressor_key,
            dtype=dtype,
        )
        self.rope = rope
        self.topk = config.index_topk

    @jax.named_scope("Indexer")
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
    ) -> Selection:
        """The selection of every query of a sequence that starts at position 0.

        **Arguments:**

        - `x`: normalised activations.
        - `latent`: the normalised query latent, shared with attention.
        - `positions`: of the tokens.
        """
        ratio = self.compressor.position_bias.shape[0]
        if x.shape[1] // ratio <= self.topk:
            return None  # everything visible is selected: no score is needed
        weights = self.project_weights(x)
        return self.select(latent, weights, positions, self.compressor(x))

    def extend(
        self,
        x: Float[Array, "batch seq dim"],
        latent: Float[Array, "batch seq q_rank"],
        state: CompressorState,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Selection, CompressorState]:
        """The selection of new tokens, and the state with all of them.

        **Arguments:**

        - `x`: normalised activations of the new tokens, then padding.
        - `latent`: their normalised query latents.
        - `state`: of the indexer's compressor after `start` tokens.
        - `start`: tokens that each row has already.
        - `lengths`: new tokens of each row.
        """
        keys, state = self.compressor.extend(x, state, start, lengths)
        if keys.values.shape[1] <= self.topk:
            return None, state
        positions = positions_after(start, lengths, x.shape[1])
        weights = self.project_weights(x)
        return self.select(latent, weights, positions, keys), state

    def project_weights(
        self, x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch seq index_heads"]:
        """The weight of each head for each query, scaled, at least float32.

        **Arguments:**

        - `x`: normalised activations.
        """
        heads, dim, _ = self.query_up.shape
        weights = project(x, self.head_weights)
        return at_least_float32(weights) * (dim**-0.5 * heads**-0.5)

    def select(
        self,
        latent: Float[Array, "batch seq q_rank"],
        weights: Float[Array, "batch seq index_heads"],
        positions: Int[Array, "batch seq"],
        keys: Entries,
        owners: Int[Array, "batch seq"] | None = None,
    ) -> Selection:
        """The highest scores among what each query sees.

        **Arguments:**

        - `latent`: the normalised query latent.
        - `weights`: from `project_weights`.
        - `positions`: of the queries.
        - `keys`: the indexer's own entries.
        - `owners`: document of each query, if the entries have owners.
        """
        operands = lax.stop_gradient((latent, weights, keys, self.query_up))
        latent, weights, keys, query_up = operands
        seq = latent.shape[1]

        def select_block(operands):
            latent, weights, positions, owners = operands
            queries = project(latent, query_up)
            queries = self.rope(queries, positions[..., None])
            seen = visible(keys, positions, owners)
            return _select_block(queries, weights, seen, keys, self.topk)

        operands = (latent, weights, positions, owners)
        if seq <= QUERY_BLOCK:
            return select_block(operands)
        blocks = jax.tree.map(split_blocks, operands)
        return join_blocks(lax.map(select_block, blocks), seq)


def _select_block(
    queries: Float[Array, "batch block index_heads index_dim"],
    weights: Float[Array, "batch block index_heads"],
    seen: Bool[Array, "batch block entries"],
    keys: Entries,
    topk: int,
) -> Selection:
    scores = jnp.where(seen, _scores(queries, weights, keys, seen), -jnp.inf)
    if scores.shape[-1] <= _GATHER_COST * topk:
        return seen & highest(scores, topk)
    best, index = lax.top_k(scores, min(topk, scores.shape[-1]))
    return jnp.where(best == -jnp.inf, -1, index)


def _scores(
    queries: Float[Array, "batch block index_heads index_dim"],
    weights: Float[Array, "batch block index_heads"],
    keys: Entries,
    seen: Bool[Array, "batch block entries"],
) -> Float[Array, "batch block entries"]:
    """Float32 scores, tile by tile up to the last entry that any query sees."""
    batch, block = queries.shape[:2]
    num_entries = keys.values.shape[1]
    tile = min(_ENTRY_TILE, num_entries)
    needed = jnp.max(jnp.where(jnp.any(seen, axis=(0, 1)), jnp.arange(num_entries), -1))

    def score_tile(i, scores):
        # The last tile reaches back into the one before.
        begin = jnp.minimum(i * tile, num_entries - tile)
        part = tile_of(keys.values, begin, tile)
        products = jnp.einsum(
            "bqhc,bec->bqhe", queries, part, preferred_element_type=weights.dtype
        )
        # Rows of queries: XLA on CPU is slow to reduce [1, block, heads, entries]. A
        # product: the reduction of a single row would take the one above into its loop.
        rows = jax.nn.relu(products).reshape(batch * block, -1, tile)
        part = jnp.einsum(
            "rhe,rh->re",
            rows,
            weights.reshape(batch * block, -1),
            precision=lax.Precision.HIGHEST,
        )
        part = part.reshape(batch, block, tile).astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(scores, part, begin, axis=2)

    scores = jnp.zeros_like(queries, jnp.float32, shape=(batch, block, num_entries))
    scores = lax.fori_loop(0, needed // tile + 1, score_tile, scores)
    return jnp.where(scores == 0, 0.0, scores)  # -0.0 and 0.0 are one score


def highest(
    scores: Float[Array, "batch block entries"], count: int
) -> Bool[Array, "batch block entries"]:
    """Marks the `count` highest scores of each row; of equal ones, the earlier.

    Finds the lowest score that is still in, bit by bit: far cheaper than sorting.

    **Arguments:**

    - `scores`: float32; all are marked where there are no more than `count` above
        minus infinity.
    - `count`: how many to mark.
    """
    ordered = _ordered(scores)

    def decide_bit(bit, threshold):
        raised = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        reached = jnp.sum(ordered >= raised[..., None], axis=-1) >= count
        return jnp.where(reached, raised, threshold)

    lowest = jnp.zeros_like(ordered, shape=ordered.shape[:-1])
    lowest = lax.fori_loop(0, 32, decide_bit, lowest)[..., None]
    marked = ordered >= lowest
    is_tied = (jnp.sum(marked, axis=-1, keepdims=True) > count) & (
        lowest > _ordered(jnp.array(-jnp.inf, jnp.float32))
    )

    def break_ties(marked):
        above = ordered > lowest
        room = count - jnp.sum(above, axis=-1, keepdims=True)
        tied = ordered == lowest
        earliest = jnp.cumsum(tied, axis=-1) <= room
        return jnp.where(is_tied, above | (tied & earliest), marked)

    return lax.cond(jnp.any(is_tied), break_ties, lambda marked: marked, marked)


def _ordered(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
