"""DeepSeek-V4: embedding, layers, the head, and multi-token prediction.

Paper section 2 and the released code. The streams start as copies of the embedding; a
hyper-head collapses them before the last norm; logits are float32.
"""

from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from dsv4_eqx.checks import is_int, refusal
from dsv4_eqx.config import Config
from dsv4_eqx.hyper_connection import HyperHead
from dsv4_eqx.inputs import (
    Lengths,
    TokenIds,
    are_known,
    check_counts,
    check_lengths,
    check_token_ids,
)
from dsv4_eqx.layers import Layers, LayersCache
from dsv4_eqx.mtp import MTP
from dsv4_eqx.primitives.norm import RMSNorm
from dsv4_eqx.primitives.packed import is_packed
from dsv4_eqx.primitives.precision import at_least_float32

_MOST_ROWS: Final = 2**31 - 1


class Cache(eqx.Module):
    """The state of the model after some tokens, for `DeepSeekV4.extend`."""

    lengths: Int32[Array, " batch"]  # tokens of each row so far
    layers: LayersCache
    capacity: int = eqx.field(static=True)


class Lookahead(eqx.Module):
    """The state of the model with new tokens of which only the first may stay."""

    before: Int32[Array, " batch"]  # tokens of each row without the new ones
    lengths: Int32[Array, " batch"]  # new tokens of each row
    layers: LayersCache
    seq: int = eqx.field(static=True)  # room for new tokens
    capacity: int = eqx.field(static=True)

    def keep(self, lengths: Lengths) -> Cache:
        """The cache after the tokens that stay: no copy of more than their windows.

        **Arguments:**

        - `lengths`: of each row's new tokens, those that stay: 0 to as many as
            `lookahead` was told of.

        **Raises:** ValueError if there is not an integer for each row, or one of them
        is out of its range, which is not checked under `jit`.
        """
        lengths = check_counts("Lookahead.keep", lengths, self.lengths)
        lengths = jnp.asarray(lengths, jnp.int32)
        layers = self.layers.keep(lengths, self.seq)
        return Cache(self.before + lengths, layers, self.capacity)


class DeepSeekV4(eqx.Module):
    """The whole model: tokens in, float32 logits out."""

    embedding: Float[Array, "vocab dim"]
    layers: Layers
    head: HyperHead
    norm: RMSNorm
    unembedding: Float[Array, "vocab dim"]
    mtp: tuple[MTP, ...]
    config: Config = eqx.field(static=True)

    def __init__(
        self, config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ):
        """**Arguments:**

        - `config`: sizes and schedule.
        - `key`: randomness of the initial weights, normal with deviation
            `config.initializer_range`; norms and mixing scales are 1, biases and sinks
            0.
        - `dtype`: dtype of the weights, but for those that stay float32.
        """
        keys = jax.random.split(key, 4 + config.num_nextn_predict_layers)
        shape = (config.vocab_size, config.hidden_size)
        std = config.initializer_range
        self.embedding = std * jax.random.normal(keys[0], shape, dtype)
        self.layers = Layers(config, key=keys[1], dtype=dtype)
        self.head = HyperHead(config, key=keys[2])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.unembedding = std * jax.random.normal(keys[3], shape, dtype)
        self.mtp = tuple(
            MTP(config, config.num_hidden_layers + i, key=key, dtype=dtype)
            for i, key in enumerate(keys[4:])
        )
        self.config = config

    def __call__(
        self, tokens: TokenIds, *, remat: bool = False
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position, float32.

        **Arguments:**

        - `tokens`: token ids, each in `[0, vocab)`.
        - `remat`: keep only each layer's input for the backward pass.

        **Raises:** ValueError if the tokens are no array of integers of two dimensions,
        are empty, or longer than `max_position_embeddings`; and if one is outside the
        vocabulary, which is not checked under `jit`.
        """
        return self.unembed(self.hidden(tokens, remat=remat))

    def hidden(
        self, tokens: TokenIds, *, remat: bool = False
    ) -> Float[Array, "batch seq dim"]:
        """What the unembedding turns into logits.

        **Arguments:** as for calling.
        """
        return self.norm(self.head(self.streams(tokens, remat=remat)))

    def streams(
        self, tokens: TokenIds, *, remat: bool = False
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after the last layer.

        **Arguments:** as for calling.
        """
        token_ids = self._checked(tokens)
        streams = self._embed(token_ids)
        return self.layers(streams, token_ids, _positions(token_ids), remat=remat)

    def _embed(
        self, token_ids: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq streams dim"]:
        """The streams before the first layer: copies of the embedding."""
        embedded = self.embedding[token_ids]
        return jnp.repeat(embedded[:, :, None], self.head.base.shape[0], axis=2)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """The state before any token, for `extend`.

        **Arguments:**

        - `batch`: rows.
        - `capacity`: tokens that each row will have room for.

        **Raises:** ValueError if either is no positive integer, or the capacity is
        above `max_position_embeddings`.
        """
        for name, value, most in (
            ("batch", batch, _MOST_ROWS),
            ("capacity", capacity, self.config.max_position_embeddings),
        ):
            if not is_int(value) or not 1 <= value <= most:
                allowed = f"an integer in [1, {most}]"
                raise refusal("init_cache", name, value, allowed)
        layers = self.layers.init_cache(batch, capacity, self.embedding.dtype)
        return Cache(jnp.zeros(batch, jnp.int32), layers, capacity)

    def extend(
        self,
        tokens: TokenIds,
        cache: Cache,
        lengths: Lengths | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """What the unembedding turns into logits, for tokens after those in the cache.

        One function for a prompt, a part of one, a single new token, or several to
        verify. Rows may be of different lengths, new and old. The given cache stays as
        it was: to go back, go on from there.

        **Arguments:**

        - `tokens`: the new token ids of each row, then anything as padding.
        - `cache`: from `init_cache` or another call.
        - `lengths`: new tokens of each row, 0 to `seq`; all of them by default.

        **Returns:** the hidden activations, which mean nothing at the padding, and the
        cache after the new tokens.

        **Raises:** ValueError if the tokens are not as for calling, the cache is of
        another model or batch, or `lengths` do not fit the tokens; and if a row would
        have more tokens than the capacity, which is not checked under `jit`.
        """
        streams, cache = self.extend_streams(tokens, cache, lengths)
        return self.norm(self.head(streams)), cache

    def extend_streams(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Cache]:
        """The residual streams after the last layer, and the cache.

        **Arguments:** as for `extend`.

        **Raises:** ValueError as `extend` does.
        """
        token_ids, lengths = self._checked_new(tokens, cache, lengths)
        streams, layers = self.layers.extend(
            self._embed(token_ids), token_ids, cache.layers, cache.lengths, lengths
        )
        return streams, Cache(cache.lengths + lengths, layers, cache.capacity)

    def lookahead(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Lookahead]:
        """As `extend_streams`, where what is seen decides which tokens stay.

        **Arguments:** as for `extend`.

        **Returns:** the streams, and what gives the cache after as many of each row's
        new tokens as its method `keep` is told.

        **Raises:** ValueError as `extend` does.
        """
        token_ids, lengths = self._checked_new(tokens, cache, lengths)
        streams, layers = self.layers.extend(
            self._embed(token_ids),
            token_ids,
            cache.layers,
            cache.lengths,
            lengths,
            keep=False,
        )
        seq = token_ids.shape[1]
        return streams, Lookahead(cache.lengths, lengths, layers, seq, cache.capacity)

    @jax.named_scope("unembed")
    def unembed(
        self, hidden: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Logits, at least float32.

        **Arguments:**

        - `hidden`: from `hidden`.
        """
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.unembedding,
            preferred_element_type=at_least_float32(hidden).dtype,
        )

    def multi_token_logits(
        self, tokens: TokenIds, *, remat: bool = False
    ) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "batch seq-1 vocab"]]:
        """Logits of the next token, and of the one after it.

        The second has one position less: it needs the next token itself.

        **Arguments:** as for calling; at least two tokens.

        **Raises:** ValueError if the model has no prediction block or there is a single
        token, and as for calling.
        """
        if len(self.mtp) != 1:
            raise ValueError(
                f"multi_token_logits: the model has {len(self.mtp)} prediction blocks "
                "(num_nextn_predict_layers); it needs one."
            )
        token_ids = self._checked(tokens)
        if token_ids.shape[1] < 2:
            raise ValueError("multi_token_logits: give at least two tokens a row.")
        streams = self.streams(token_ids, remat=remat)
        following = token_ids[:, 1:]
        ahead = self.mtp[0](
            streams[:, :-1], self.embedding[following], following, _positions(following)
        )
        return self.unembed(self.norm(self.head(streams))), self.unembed(ahead)

    def num_params(self) -> int:
        """Parameters of the main model: without prediction blocks and hash tables."""
        main = (self.embedding, self.layers, self.head, self.norm, self.unembedding)
        return count_params(main)

    def _checked_new(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None
    ) -> tuple[Int[Array, "batch seq"], Int32[Array, " batch"]]:
        lengths = check_lengths("extend", lengths, tokens)
        token_ids = check_token_ids(tokens, self.embedding.shape[0], lengths)
        self._check_cache(cache, lengths)
        return token_ids, jnp.asarray(lengths, jnp.int32)

    def _check_cache(self, cache: Cache, lengths: Lengths) -> None:
        if not isinstance(cache, Cache):
            raise ValueError(f"extend: the cache is a {type(cache).__name__}.")
        batch = lengths.shape[0]
        wanted = eqx.filter_eval_shape(self.init_cache, batch, cache.capacity)
        if not eqx.tree_equal(wanted, eqx.filter_eval_shape(lambda: cache)):
            raise ValueError(
                f"extend: the cache is for {cache.lengths.shape[0]} rows of its model; "
                f"this model with {batch} rows needs another, from init_cache({batch}, "
                f"{cache.capacity})."
            )
        if are_known(lengths, cache.lengths):
            totals = np.asarray(cache.lengths) + np.asarray(lengths)
            row = int(totals.argmax())
            if totals[row] > cache.capacity:
                raise ValueError(
                    f"extend: row {row} would have {totals[row]} tokens, and the cache "
                    f"has room for {cache.capacity}; make a larger one with init_cache."
                )

    def _checked(self, tokens: TokenIds) -> Int[Array, "batch seq"]:
        token_ids = check_token_ids(tokens, self.embedding.shape[0])
        most = self.config.max_position_embeddings
        if token_ids.shape[1] > most:
            raise ValueError(
                f"{token_ids.shape[1]} tokens a row are beyond max_position_embeddings="
                f"{most}: give fewer, or raise it in the configuration."
            )
        return token_ids


def count_params(tree: object) -> int:
    """Elements of all floating-point arrays in `tree`, packed and abstract ones too."""
    found = jax.tree.leaves(tree, is_leaf=is_packed)
    leaves = (x for x in found if hasattr(x, "dtype"))
    return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def _positions(token_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    batch, seq = token_ids.shape
    return jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
