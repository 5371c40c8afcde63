"""Multi-token prediction (MTP): one more block, which predicts the token after next.

Paper section 2 and the released code. It is an additional training objective, and it
drafts tokens for speculative decoding.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from dsv4_eqx.attention.cache import AttentionCache
from dsv4_eqx.config.config import Config
from dsv4_eqx.hyper_connection import HyperHead
from dsv4_eqx.model.block import Block
from dsv4_eqx.model.parts import make_hyper_head
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.numerics.validation import validate_counts
from dsv4_eqx.primitives.norm import RMSNorm


class MTPCache(eqx.Module):
    """The state of a prediction block after some tokens."""

    lengths: Int32[Array, " batch"]  # tokens of each row so far
    attention: AttentionCache


class MTP(eqx.Module):
    r"""A prediction block: a layer after the main model, for the token after next.

    From the streams at position $i$ and the embedding of token $i+1$ it predicts token
    $i+2$: $X' = \mathrm{Block}(W_e\,\mathrm{norm}(e_{i+1}) + W_h\,\mathrm{norm}(X_i))$,
    stream by stream. Embedding and unembedding are the main model's.
    """

    embedding_norm: RMSNorm
    embedding_in: Float[Array, "dim dim"]
    streams_norm: RMSNorm
    streams_in: Float[Array, "dim dim"]
    block: Block
    head: HyperHead
    norm: RMSNorm

    def __init__(
        self,
        config: Config,
        layer: int,
        *,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `config`: the sizes.
        - `layer`: number of the block, counted on from the main layers.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights, except those that are always float32.
        """
        keys = jax.random.split(key, 4)
        dim, eps = config.hidden_size, config.rms_norm_eps
        std = config.initializer_range
        self.embedding_norm = RMSNorm(dim, eps=eps)
        self.embedding_in = normal(keys[0], (dim, dim), dtype, std=std)
        self.streams_norm = RMSNorm(dim, eps=eps)
        self.streams_in = normal(keys[1], (dim, dim), dtype, std=std)
        self.block = Block(config, layer, key=keys[2], dtype=dtype)
        self.head = make_hyper_head(config, key=keys[3])
        self.norm = RMSNorm(dim, eps=eps)

    @jax.named_scope("MTP")
    def __call__(
        self,
        streams: Float[Array, "batch seq streams dim"],
        embedded: Float[Array, "batch seq dim"],
        token_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq dim"]:
        """Hidden activations, as the model's `unembed` takes them.

        **Arguments:**

        - `streams`: of the main model after its last layer.
        - `embedded`: embedding of the next token at each position.
        - `token_ids`: ids of these next tokens.
        - `positions`, `segment_ids`: of the streams, as for `Attention`. Where the next
            token belongs to another document, the output is meaningless.
        """
        joined = self._join(streams, embedded)
        streams = self.block(joined, token_ids, positions, segment_ids)
        return self.norm(self.head(streams))

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> MTPCache:
        """The state before any token: see `Attention.init_cache`."""
        attention = self.block.attention.init_cache(batch, capacity, dtype)
        return MTPCache(jnp.zeros(batch, jnp.int32), attention)

    @jax.named_scope("MTP.extend")
    def extend(
        self,
        streams: Float[Array, "batch seq streams dim"],
        embedded: Float[Array, "batch seq dim"],
        token_ids: Int[Array, "batch seq"],
        cache: MTPCache,
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], MTPCache]:
        """The same for tokens after those in the cache.

        **Arguments:**

        - `streams`, `embedded`, `token_ids`: as for calling, then padding.
        - `cache`: from `init_cache` or another call.
        - `lengths`: new tokens of each row.

        **Raises:** ValueError if `lengths` are not one integer for each row or, except
        under `jit`, one of them is outside `[0, seq]`.
        """
        batch, seq = token_ids.shape
        num_new = np.full(batch, seq, np.int32)
        lengths = jnp.asarray(validate_counts("MTP.extend", lengths, num_new))
        streams, extended = self.block.extend(
            self._join(streams, embedded),
            token_ids,
            cache.attention,
            cache.lengths,
            lengths,
        )
        cache = MTPCache(cache.lengths + lengths, extended.keep(lengths))
        return self.norm(self.head(streams)), cache

    def _join(
        self,
        streams: Float[Array, "batch seq streams dim"],
        embedded: Float[Array, "batch seq dim"],
    ) -> Float[Array, "batch seq streams dim"]:
        embedding_in, streams_in = dequantize((self.embedding_in, self.streams_in))
        embedded = project(self.embedding_norm(embedded), embedding_in)
        return embedded[:, :, None] + project(self.streams_norm(streams), streams_in)
