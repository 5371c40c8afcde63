"""DSpark: the drafter of newer releases, which drafts a block of tokens at once.

DSpark paper (arXiv 2607.05147) and the released weights. It reads what some layers of
the model have made of the tokens so far, runs its own blocks over one known token and
places for the rest, and then corrects each place by the token before it.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.config.config import Config
from dsv4_eqx.config.drafter import DSparkConfig
from dsv4_eqx.hyper_connection import HyperHead
from dsv4_eqx.kernels.attend_every import attend_every
from dsv4_eqx.model.block import Block
from dsv4_eqx.model.drafting import (
    Drafts,
    DSparkContext,
    drafting_config,
    validate_anchors,
    validate_means,
    validate_temperature,
)
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.model.parts import make_hyper_head
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.numerics.validation import validate_counts
from dsv4_eqx.primitives.norm import RMSNorm


class DSpark(eqx.Module):
    r"""A drafter: `block_size` tokens after one that the model has chosen.

    Its context at position $j$ is $c_j = \mathrm{norm}(W\,[m_1, m_2, \dots])$, where
    $m_l$ is the mean of the residual streams after layer $l$ of the model. Each block
    makes a key of $c_j$ with its own weights. The block of tokens is the chosen one,
    then noise; every place sees the keys of the last `sliding_window` positions and
    those of all places, in both directions. Place $i$ gives the logits
    $L_i = U_i + W_2 W_1[y_{i-1}]$, where $U_i$ are the model's logits of its state and
    $y_{i-1}$ is the token before. Embedding and unembedding are the model's.
    """

    main_in: Float[Array, "dim targets dim"]
    main_norm: RMSNorm
    stages: tuple[Block, ...]
    head: HyperHead
    norm: RMSNorm
    markov_in: Float[Array, "vocab markov_rank"]
    markov_out: Float[Array, "vocab markov_rank"]
    confidence: Float[Array, "1 confidence_in"]
    config: Config = eqx.field(static=True)
    sizes: DSparkConfig = eqx.field(static=True)

    def __init__(
        self,
        config: Config,
        sizes: DSparkConfig,
        *,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `config`: of the model that it drafts for.
        - `sizes`: its own, as from `DSparkConfig.from_hf`.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights, except those that are always float32.

        **Raises:** ValueError if the two do not fit each other.
        """
        config = drafting_config(config, sizes)
        keys = jax.random.split(key, 5 + sizes.num_stages)
        dim, eps, rank = config.hidden_size, config.rms_norm_eps, sizes.markov_rank
        std = config.initializer_range
        shape = dim, len(sizes.target_layer_ids), dim
        self.main_in = normal(keys[0], shape, dtype, std=std)
        self.main_norm = RMSNorm(dim, eps=eps)
        self.stages = tuple(
            Block(config, config.num_hidden_layers, key=key, dtype=dtype)
            for key in keys[5:]
        )
        self.head = make_hyper_head(config, key=keys[1])
        self.norm = RMSNorm(dim, eps=eps)
        self.markov_in = normal(keys[2], (config.vocab_size, rank), dtype, std=std)
        self.markov_out = normal(keys[3], (config.vocab_size, rank), dtype, std=std)
        self.confidence = normal(keys[4], (1, dim + rank), dtype, std=std)
        self.config, self.sizes = config, sizes

    def means(
        self, streams: Sequence[Float[Array, "batch seq streams dim"]]
    ) -> Float[Array, "batch seq targets dim"]:
        """What the drafter reads of the model.

        **Arguments:**

        - `streams`: after each layer of the model, as `model.observe` shows them.
        """
        chosen = [streams[layer] for layer in self.sizes.target_layer_ids]
        return jnp.stack([jnp.mean(x, axis=2) for x in chosen], axis=2)

    def init_context(self, batch: int, dtype: DTypeLike = jnp.float32) -> DSparkContext:
        """The state before any token, of activations in `dtype`."""
        window, head_dim = self.config.sliding_window, self.config.head_dim
        shape = (batch, len(self.stages), window, head_dim)
        return DSparkContext(jnp.zeros(batch, jnp.int32), jnp.zeros(shape, dtype))

    @jax.named_scope("DSpark.read")
    def read(
        self,
        means: Float[Array, "batch seq targets dim"],
        context: DSparkContext,
        lengths: Int[Array | np.ndarray, " batch"] | None = None,
    ) -> DSparkContext:
        """The state after more tokens that the model has read.

        Read what the model keeps, in any parts: a draft that it rejected must not be
        read, and each token that it keeps must, whether or not it was drafted.

        **Arguments:**

        - `means`: of the new tokens, from `means`, then padding.
        - `context`: from `init_context` or another call.
        - `lengths`: new tokens of each row; all of them by default.

        **Raises:** ValueError if the means do not fit the drafter or the context, or
        `lengths` are not one integer in `[0, seq]` for each row.
        """
        shape = len(self.sizes.target_layer_ids), self.config.hidden_size
        batch, seq = validate_means(means, shape, context)
        num_new = np.full(batch, seq, np.int32)
        counts = num_new if lengths is None else lengths
        counts = jnp.asarray(validate_counts("DSpark.read", counts, num_new))
        positions = context.lengths[:, None] + jnp.arange(seq)[None]
        inputs = self.main_norm(project(means, dequantize(self.main_in), over=2))
        # Straight to the keys: neither a norm nor a hyper-connection of the block.
        new = [
            dequantize(stage.attention).project_keys(inputs, positions)
            for stage in self.stages
        ]
        keys = jnp.concatenate([context.keys, jnp.stack(new, axis=1)], axis=2)
        # The last ones before the padding:  [ old window | new | padding ]
        #                                          ^-- window --^
        kept = counts[:, None] + jnp.arange(context.keys.shape[2])[None]
        keys = jnp.take_along_axis(keys, kept[:, None, :, None], axis=2)
        return DSparkContext(context.lengths + counts, keys)

    def hidden(
        self, model: DeepSeekV4, anchors: Int[Array, " batch"], context: DSparkContext
    ) -> Float[Array, "batch places dim"]:
        """What the blocks make of each place, before the last norm.

        **Arguments, raises:** as for `draft`.
        """
        anchors = validate_anchors(anchors, context, self.config.vocab_size)
        shape = (len(anchors), self.sizes.block_size - 1)
        noise = jnp.full(shape, self.sizes.noise_token_id, anchors.dtype)
        token_ids = jnp.concatenate([anchors[:, None], noise], axis=1)
        streams = model.embed(token_ids)
        for stage, block in enumerate(self.stages):
            keys = context.keys[:, stage]
            streams = _run(block, streams, token_ids, keys, context.lengths)
        return self.head(streams)

    @jax.named_scope("DSpark.draft")
    def draft(
        self,
        model: DeepSeekV4,
        anchors: Int[Array, " batch"],
        context: DSparkContext,
        *,
        temperature: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Drafts:
        """Drafts the tokens after those that the model has chosen and not read.

        **Arguments:**

        - `model`: whose embedding and unembedding it uses.
        - `anchors`: the chosen token of each row.
        - `context`: after all tokens before it, from `read`.
        - `temperature`: of drawn drafts; at 0, the likeliest ones.
        - `key`: randomness of drawn drafts.

        **Raises:** ValueError if the anchors are not a token id for each row of the
        context, the temperature is below 0, or drafts are to be drawn without a key.
        """
        validate_temperature(temperature, key)
        hidden = self.hidden(model, anchors, context)
        logits = model.unembed(self.norm(hidden))
        markov_in, markov_out, confidence = dequantize(
            (self.markov_in, self.markov_out, self.confidence)
        )

        def place(before: Int[Array, " batch"], given: tuple) -> tuple:
            own, state, place_key = given
            row = markov_in[before]
            own = own + project(row, markov_out, wide=True)
            joined = jnp.concatenate([state, row], axis=-1)
            is_kept = project(joined, confidence, wide=True)[..., 0]
            chosen = jnp.argmax(own, axis=-1).astype(before.dtype)
            if temperature > 0:
                drawn = jax.random.categorical(place_key, own / temperature)
                chosen = drawn.astype(before.dtype)
            return chosen, (chosen, own, is_kept)

        keys = jax.random.split(
            jax.random.key(0) if key is None else key, hidden.shape[1]
        )
        per_place = jnp.moveaxis(logits, 1, 0), jnp.moveaxis(hidden, 1, 0), keys
        _, found = lax.scan(place, jnp.asarray(anchors), per_place)
        return Drafts(*(jnp.moveaxis(x, 0, 1) for x in found))


def _run(
    block: Block,
    streams: Float[Array, "batch places streams dim"],
    token_ids: Int[Array, "batch places"],
    context: Float[Array, "batch window head_dim"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch places streams dim"]:
    """A block, every place of which sees the context and all places."""
    x, mixing = block.attention_connection.read(streams)
    x = _attend(block, block.attention_norm(x), context, lengths)
    streams = block.attention_connection.write(streams, x, mixing)
    x, mixing = block.moe_connection.read(streams)
    x = block.moe(block.moe_norm(x), token_ids)
    return block.moe_connection.write(streams, x, mixing)


def _attend(
    block: Block,
    x: Float[Array, "batch places dim"],
    context: Float[Array, "batch window head_dim"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch places dim"]:
    attention, window = dequantize(block.attention), context.shape[1]
    positions = lengths[:, None] + jnp.arange(x.shape[1])[None]
    latent = attention.project_latent(x)
    queries = attention.project_queries(latent, positions)
    own = attention.project_keys(x, positions)
    # The oldest slots are empty until there are as many tokens.
    is_there = jnp.arange(window)[None] >= window - lengths[:, None]
    seen = jnp.concatenate([is_there, jnp.ones(own.shape[:2], bool)], axis=1)
    keys = jnp.concatenate([context, own], axis=1)
    out = attend_every(queries, keys, seen, attention.sinks)
    return attention.project_output(out, positions)
