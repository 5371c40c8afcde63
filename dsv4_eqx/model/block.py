"""One layer: attention and experts, each read from and written to the streams."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.attention.cache import AttentionCache, Extended
from dsv4_eqx.attention.checks import validate_cache
from dsv4_eqx.attention.values import observed
from dsv4_eqx.config.config import Config
from dsv4_eqx.hyper_connection import HyperConnection
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.model.parts import make_attention, make_hyper_connection, make_moe
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.primitives.norm import RMSNorm


class Block(eqx.Module):
    """A DeepSeek-V4 layer (paper section 2).

    The residual path consists of several streams; hyper-connections read each
    sublayer's input from them and write its output back.
    """

    attention_connection: HyperConnection
    attention_norm: RMSNorm
    attention: Attention
    moe_connection: HyperConnection
    moe_norm: RMSNorm
    moe: MoE

    def __init__(
        self,
        config: Config,
        layer: int,
        *,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `config`: sizes and schedule.
        - `layer`: number of the layer, from 0; prediction (MTP) blocks come last.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights, except those that are always float32.

        **Raises:** ValueError if there is no such layer.
        """
        kind, ratio, moe_kind = config.layer_kind(layer)
        keys = jax.random.split(key, 4)
        self.attention_connection = make_hyper_connection(config, key=keys[0])
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = make_attention(config, kind, ratio, key=keys[1], dtype=dtype)
        self.moe_connection = make_hyper_connection(config, key=keys[2])
        self.moe_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = make_moe(config, moe_kind, key=keys[3], dtype=dtype)

    @compiled_once
    @jax.named_scope("Block")
    def __call__(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        experts: Int[Array, "batch seq slots"] | None = None,
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after the layer.

        **Arguments:**

        - `streams`: the residual streams before it.
        - `token_ids`: the tokens' ids, which hash routing reads.
        - `positions`, `segment_ids`: as for `Attention`.
        - `experts`: as for `MoE`.
        """
        given = () if experts is None else (experts,)
        documents = () if segment_ids is None else (segment_ids,)
        x, mixing = self.attention_connection.read(streams)
        x = self.attention(self.attention_norm(x), positions, *documents)
        streams = self.attention_connection.write(streams, x, mixing)
        x, mixing = self.moe_connection.read(streams)
        x = self.moe(self.moe_norm(x), token_ids, *given)
        return self.moe_connection.write(streams, x, mixing)

    @compiled_once
    @jax.named_scope("Block.observe")
    def observe(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        experts: Int[Array, "batch seq slots"] | None = None,
    ) -> tuple[Float[Array, "batch seq streams dim"], LayerValues]:
        """Calls it, and returns what was computed on the way beside the streams."""
        given = () if experts is None else (experts,)
        documents = () if segment_ids is None else (segment_ids,)
        x, mixing = self.attention_connection.read(streams)
        x = self.attention_norm(x)
        x, attention = observed(self.attention, x, positions, *documents)
        streams = self.attention_connection.write(streams, x, mixing)
        x, mixing = self.moe_connection.read(streams)
        x, routing = observed(self.moe, self.moe_norm(x), token_ids, *given)
        streams = self.moe_connection.write(streams, x, mixing)
        return streams, LayerValues(streams, attention, routing)

    def extend(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        cache: AttentionCache,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq streams dim"], Extended]:
        """The same for new tokens, after those in the cache.

        **Arguments:**

        - `streams`: the residual streams of new tokens, then of padding.
        - `token_ids`: the new tokens' ids, which hash routing reads.
        - `cache`, `start`, `lengths`: as for `Attention.extend`.

        **Returns:** the streams, and an `Extended`, whose `keep` gives the next cache.

        **Raises:** ValueError as `Attention.extend` does.
        """
        if isinstance(self.attention, Attention):
            validate_cache("Block.extend", self.attention, cache, start, lengths)
        return self._extend(streams, token_ids, cache, start, lengths)

    @compiled_once
    @jax.named_scope("Block.extend")
    def _extend(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        cache: AttentionCache,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq streams dim"], Extended]:
        x, mixing = self.attention_connection.read(streams)
        x, extended = self.attention.extend(
            self.attention_norm(x), cache, start, lengths
        )
        streams = self.attention_connection.write(streams, x, mixing)
        x, mixing = self.moe_connection.read(streams)
        x = self.moe(self.moe_norm(x), token_ids)
        return self.moe_connection.write(streams, x, mixing), extended
