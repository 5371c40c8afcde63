"""DeepSeek-V4: embedding, layers, the head, and multi-token prediction.

Paper section 2 and the released code. The streams start as copies of the embedding; a
hyper-head collapses them before the last norm; logits are float32.
"""

import functools
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from dsv4_eqx.config.config import Config
from dsv4_eqx.hyper_connection import HyperHead
from dsv4_eqx.model.abstract import AbstractModel, Cache, Lookahead
from dsv4_eqx.model.cross_entropy import (
    cross_entropy_from_hidden,
    in_chunks,
    logits_from,
)
from dsv4_eqx.model.given_experts import GivenExperts, validate_given_experts
from dsv4_eqx.model.inputs import (
    Lengths,
    SegmentIds,
    TokenIds,
    is_concrete,
    token_places,
    validate_axes,
    validate_new_tokens,
    validate_prediction_block,
    validate_streams,
    validate_targets,
    validate_token_ids,
    validate_two_tokens,
)
from dsv4_eqx.model.layers import Layers
from dsv4_eqx.model.mtp import MTP, MTPCache
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.model.parts import make_hyper_head
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.quantized_weight import is_quantized
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_dtype,
    validate_int,
    validate_key,
    validate_size,
)
from dsv4_eqx.primitives.norm import RMSNorm

_MAX_ROWS: Final = 2**31 - 1


class DeepSeekV4(AbstractModel):
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
        - `dtype`: dtype of the weights, except those that are always float32.

        **Raises:** ValueError if `config` is not a `Config`, `key` not a key, or
        `dtype` not a dtype for weights.
        """
        if not isinstance(config, Config):
            raise invalid_argument("DeepSeekV4", "config", config, "a Config")
        validate_key("DeepSeekV4", key)
        dtype = validate_dtype("DeepSeekV4", dtype)
        keys = jax.random.split(key, 4 + config.num_nextn_predict_layers)
        shape = (config.vocab_size, config.hidden_size)
        std = config.initializer_range
        self.embedding = normal(keys[0], shape, dtype, std=std)
        self.layers = Layers(config, key=keys[1], dtype=dtype)
        self.head = make_hyper_head(config, key=keys[2])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.unembedding = normal(keys[3], shape, dtype, std=std)
        self.mtp = tuple(
            MTP(config, config.num_hidden_layers + i, key=key, dtype=dtype)
            for i, key in enumerate(keys[4:])
        )
        self.config = config

    def streams(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after the last layer: see `AbstractModel.streams`."""
        token_ids = self.validate_tokens(tokens)
        places = token_places("DeepSeekV4", token_ids, segment_ids)
        given = self.validate_experts(experts, token_ids)
        streams = self.embed(token_ids)
        return self.layers(streams, token_ids, *places, given, remat=remat)

    def observe_streams(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> tuple[Float[Array, "batch seq streams dim"], tuple[LayerValues, ...]]:
        """The residual streams as by `streams`, and what each layer computed."""
        token_ids = self.validate_tokens(tokens)
        places = token_places("DeepSeekV4", token_ids, segment_ids)
        given = self.validate_experts(experts, token_ids)
        streams = self.embed(token_ids)
        return self.layers.observe(streams, token_ids, *places, given, remat=remat)

    def collapse(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> Float[Array, "*batch dim"]:
        """Collapses residual streams into the final hidden activations."""
        return self.norm(self.head(streams))

    def embed(
        self, token_ids: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq streams dim"]:
        """The streams before the first layer: copies of the embedding."""
        validate_axes("DeepSeekV4", {"tokens": token_ids, "model": self})
        embedded = self.embedding[token_ids]
        return jnp.repeat(embedded[:, :, None], self.head.base.shape[0], axis=2)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """The state before any token: see `AbstractModel.init_cache`."""
        batch, capacity = self._validate_sizes("init_cache", batch, capacity)
        layers = self.layers.init_cache(batch, capacity, self.embedding.dtype)
        return Cache(jnp.zeros(batch, jnp.int32), layers, capacity)

    def extend_streams(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Cache]:
        """The streams of new tokens, and the cache: see `AbstractModel.extend`."""
        token_ids, lengths = self.validate_new(tokens, cache, lengths)
        streams, layers = self.layers.extend(
            self.embed(token_ids), token_ids, cache.layers, cache.lengths, lengths
        )
        return streams, Cache(cache.lengths + lengths, layers, cache.capacity)

    def lookahead(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Lookahead]:
        """The streams of new tokens not kept yet: see `AbstractModel.lookahead`."""
        token_ids, lengths = self.validate_new(tokens, cache, lengths)
        streams, layers = self.layers.lookahead(
            self.embed(token_ids), token_ids, cache.layers, cache.lengths, lengths
        )
        return streams, Lookahead(cache.lengths, lengths, layers, cache.capacity)

    def cross_entropy(
        self,
        hidden: Float[Array, "*batch dim"],
        targets: Int[Array | np.ndarray, "*batch"],
        mask: Bool[Array | np.ndarray, "*batch"] | None = None,
        *,
        chunk: int | None = None,
    ) -> Float[Array, "*batch"]:
        """Cross-entropy in nats of each target: see `AbstractModel.cross_entropy`."""
        call, vocab = "cross_entropy", self.config.vocab_size
        targets = validate_targets(call, targets, hidden.shape[:-1], vocab, mask)
        chunk = None if chunk is None else validate_size(call, "chunk", chunk)
        weights = self.unembedding
        nats = in_chunks(cross_entropy_from_hidden, chunk, weights, hidden, targets)
        return nats if mask is None else jnp.where(mask, nats, 0)

    def unembed(
        self, hidden: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Logits of the next token, at least float32."""
        return logits_from(hidden, self.unembedding)

    def hidden_ahead(
        self,
        streams: Float[Array, "batch seq streams dim"],
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
    ) -> Float[Array, "batch seq dim"]:
        """The prediction block's activations: see `AbstractModel.hidden_ahead`."""
        token_ids, following = self.validate_ahead(streams, tokens)
        places = token_places("hidden_ahead", token_ids, segment_ids)
        return self.mtp[0](streams, self.embedding[following], following, *places)

    @property
    def num_mtp(self) -> int:
        """Number of prediction (MTP) blocks."""
        return len(self.mtp)

    def init_mtp_cache(self, batch: int, capacity: int) -> MTPCache:
        """The prediction block's state: see `AbstractModel.init_mtp_cache`."""
        validate_prediction_block("init_mtp_cache", self.num_mtp)
        batch, capacity = self._validate_sizes("init_mtp_cache", batch, capacity)
        return self.mtp[0].init_cache(batch, capacity, self.embedding.dtype)

    def extend_mtp(
        self,
        streams: Float[Array, "batch seq streams dim"],
        following: Int[Array, "batch seq"],
        cache: MTPCache,
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], MTPCache]:
        """The prediction block's activations: see `AbstractModel.extend_mtp`."""
        new = streams, following, cache, lengths
        following, lengths = self.validate_following(*new)
        embedded = self.embedding[following]
        return self.mtp[0].extend(streams, embedded, following, cache, lengths)

    def num_params(self) -> int:
        """Parameters of the main model, without prediction blocks and hash tables."""
        main = (self.embedding, self.layers, self.head, self.norm, self.unembedding)
        return count_params(main)

    def _validate_cache(self, cache: Cache, lengths: Lengths) -> None:
        if isinstance(cache, Lookahead):
            raise ValueError(
                "extend: the cache is a Lookahead, of whose new tokens it is not "
                "settled how many stay: give lookahead.keep(lengths)."
            )
        if not isinstance(cache, Cache):
            raise ValueError(f"extend: the cache is a {type(cache).__name__}.")
        batch = lengths.shape[0]
        expected = eqx.filter_eval_shape(self.init_cache, batch, cache.capacity)
        if not eqx.tree_equal(expected, eqx.filter_eval_shape(lambda: cache)):
            raise ValueError(
                f"extend: the cache is for {cache.lengths.shape[0]} rows of its model; "
                f"this model with {batch} rows needs another, from init_cache({batch}, "
                f"{cache.capacity})."
            )
        if is_concrete(lengths, cache.lengths):
            totals = np.asarray(cache.lengths) + np.asarray(lengths)
            row = int(totals.argmax())
            if totals[row] > cache.capacity:
                raise ValueError(
                    f"extend: row {row} would have {totals[row]} tokens, and the cache "
                    f"has room for {cache.capacity}; make a larger one with init_cache."
                )

    def validate_tokens(self, tokens: TokenIds) -> Int[Array, "batch seq"]:
        """Token ids, validated as for calling."""
        token_ids = validate_token_ids("DeepSeekV4", tokens, self.config.vocab_size)
        max_positions = self.config.max_position_embeddings
        if not all(isinstance(size, int) for size in token_ids.shape):
            raise ValueError(
                f"DeepSeekV4: tokens of the symbolic shape {token_ids.shape}: the "
                "programs depend on the sizes; export one for each."
            )
        if token_ids.shape[1] > max_positions:
            raise ValueError(
                f"{token_ids.shape[1]} tokens a row are beyond max_position_embeddings="
                f"{max_positions}: give fewer, or raise it in the configuration."
            )
        return token_ids

    def validate_experts(
        self, experts: GivenExperts, token_ids: Int[Array, "batch seq"]
    ) -> tuple[Int[Array, "batch seq slots"] | None, ...] | None:
        """Given experts of each layer, validated as for calling."""
        shape = token_ids.shape
        return validate_given_experts("DeepSeekV4", self.layers, experts, shape)

    def validate_ahead(
        self, streams: Float[Array, "batch seq streams dim"], tokens: TokenIds
    ) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
        """Token ids, validated as for `hidden_ahead`, and the token after each."""
        call = "hidden_ahead"
        validate_prediction_block(call, self.num_mtp)
        token_ids = self.validate_tokens(tokens)
        validate_two_tokens(call, token_ids)
        validate_streams(call, streams, token_ids)
        # The last position has no next token. Any will do: its output means nothing.
        return token_ids, jnp.pad(token_ids[:, 1:], ((0, 0), (0, 1)))

    def validate_new(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None
    ) -> tuple[Int[Array, "batch seq"], Int32[Array, " batch"]]:
        """New token ids and their number in each row, validated as for `extend`."""
        vocab = self.config.vocab_size
        token_ids, lengths = validate_new_tokens("extend", tokens, lengths, vocab)
        self._validate_cache(cache, lengths)
        return token_ids, jnp.asarray(lengths, jnp.int32)

    def validate_following(
        self,
        streams: Float[Array, "..."],
        following: TokenIds,
        cache: MTPCache,
        lengths: Lengths,
    ) -> tuple[Int[Array, "batch seq"], Int32[Array, " batch"]]:
        """Following token ids and their number, validated as for `extend_mtp`."""
        call = "extend_mtp"
        validate_prediction_block(call, self.num_mtp)
        vocab = self.config.vocab_size
        token_ids, lengths = validate_new_tokens(call, following, lengths, vocab)
        validate_streams(call, streams, token_ids)
        rows = cache.lengths.shape if isinstance(cache, MTPCache) else None
        if rows != lengths.shape:
            raise ValueError(
                f"{call}: the cache is a {type(cache).__name__} of {rows} rows; "
                f"{len(lengths)} rows need one from init_mtp_cache."
            )
        return token_ids, jnp.asarray(lengths, jnp.int32)

    def _validate_sizes(self, call: str, batch: int, capacity: int) -> tuple[int, int]:
        max_positions = self.config.max_position_embeddings
        return (
            validate_int(call, "batch", batch, most=_MAX_ROWS),
            validate_int(call, "capacity", capacity, most=max_positions),
        )


@functools.lru_cache(maxsize=8)
def abstract_model(config: Config, dtype: DTypeLike) -> DeepSeekV4:
    """A model of shapes and dtypes alone, without arrays."""

    def make() -> DeepSeekV4:
        return DeepSeekV4(config, key=jax.random.key(0), dtype=dtype)

    return eqx.filter_eval_shape(make)


def count_params(tree: object) -> int:
    """Elements of all floating-point arrays, quantised and abstract ones included."""
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    arrays = (x for x in leaves if hasattr(x, "dtype"))
    return sum(x.size for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))
