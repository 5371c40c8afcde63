"""The parts of a layer, made from a `Config`.

The parts themselves take sizes; this file alone reads them from a configuration, and
decides which parts a layer has. `kind` is the layer's entry in `config.layer_types` or
`config.mlp_layer_types`, `ratio` the one in `config.compress_ratios`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.attention.compressor import Compressor
from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING
from dsv4_eqx.hyper_connection import HyperConnection, HyperHead
from dsv4_eqx.moe.experts import Experts, SharedExpert
from dsv4_eqx.moe.moe import MoE
from dsv4_eqx.moe.router import HashRouter, TopKRouter
from dsv4_eqx.primitives.rotary import RotaryEmbedding


def make_hyper_connection(config: Config, *, key: PRNGKeyArray) -> HyperConnection:
    """A sublayer's connection to the residual streams."""
    return HyperConnection(
        config.hidden_size,
        config.hc_mult,
        sinkhorn_iters=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        std=config.initializer_range,
        key=key,
    )


def make_hyper_head(config: Config, *, key: PRNGKeyArray) -> HyperHead:
    """The head that collapses the streams after the last block."""
    return HyperHead(
        config.hidden_size,
        config.hc_mult,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        std=config.initializer_range,
        key=key,
    )


def make_attention(
    config: Config,
    kind: str,
    ratio: int,
    *,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
) -> Attention:
    """A layer's attention; the ratio is that of a compressed entry."""
    # `Attention` splits the same key into five, which are the first five of these.
    *_, compressor_key, indexer_key = jax.random.split(key, 7)
    compressor, indexer = None, None
    if kind in (CSA, HCA):
        compressor = make_compressor(
            config, config.head_dim, kind, ratio, key=compressor_key, dtype=dtype
        )
    if kind == CSA:
        indexer = make_indexer(config, ratio, key=indexer_key, dtype=dtype)
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        q_rank=config.q_lora_rank,
        num_groups=config.o_groups,
        out_per_group=config.o_lora_rank,
        window=config.sliding_window,
        rope=make_rotary(config, kind),
        compressor=compressor,
        indexer=indexer,
        norm_eps=config.rms_norm_eps,
        std=config.initializer_range,
        key=key,
        dtype=dtype,
    )


def make_compressor(
    config: Config,
    head_dim: int,
    kind: str,
    ratio: int,
    *,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
) -> Compressor:
    """A compressor that makes entries of `head_dim` channels; CSA's windows overlap."""
    return Compressor(
        config.hidden_size,
        head_dim,
        ratio,
        overlap=kind == CSA,
        rope=make_rotary(config, kind),
        norm_eps=config.rms_norm_eps,
        std=config.initializer_range,
        key=key,
        dtype=dtype,
    )


def make_indexer(
    config: Config,
    ratio: int,
    *,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
) -> Indexer:
    """CSA's indexer, with a compressor of its own."""
    # `Indexer` splits the same key into two, which are the first two of these.
    *_, compressor_key = jax.random.split(key, 3)
    return Indexer(
        config.hidden_size,
        config.q_lora_rank,
        config.index_n_heads,
        config.index_topk,
        compressor=make_compressor(
            config, config.index_head_dim, CSA, ratio, key=compressor_key, dtype=dtype
        ),
        std=config.initializer_range,
        key=key,
        dtype=dtype,
    )


def make_rotary(config: Config, kind: str) -> RotaryEmbedding:
    """A layer's rotary embedding: a longer base and YaRN where the layer compresses."""
    if kind == SLIDING:
        return RotaryEmbedding(config.qk_rope_head_dim, base=config.rope_theta)
    return RotaryEmbedding(
        config.qk_rope_head_dim,
        base=config.compress_rope_theta,
        yarn=config.rope_scaling,
    )


def make_moe(
    config: Config, kind: str, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
) -> MoE:
    """A layer's mixture of experts."""
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    return MoE(
        router=make_router(config, kind, key=router_key, dtype=dtype),
        experts=make_experts(config, key=experts_key, dtype=dtype),
        shared=make_shared_expert(config, key=shared_key, dtype=dtype),
    )


def make_router(
    config: Config, kind: str, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
) -> TopKRouter | HashRouter:
    """Routing by token id or by score, as the layer's kind says."""
    sizes = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    options: dict[str, Any] = dict(
        scaling_factor=config.routed_scaling_factor,
        std=config.initializer_range,
        key=key,
        dtype=dtype,
    )
    if kind == HASH_MOE:
        return HashRouter(*sizes, vocab_size=config.vocab_size, **options)
    return TopKRouter(*sizes, **options)


def make_experts(
    config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
) -> Experts:
    """The routed experts."""
    return Experts(
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        limit=config.swiglu_limit,
        std=config.initializer_range,
        key=key,
        dtype=dtype,
    )


def make_shared_expert(
    config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
) -> SharedExpert:
    """The expert that every token runs."""
    return SharedExpert(
        config.hidden_size,
        config.moe_intermediate_size,
        limit=config.swiglu_limit,
        std=config.initializer_range,
        key=key,
        dtype=dtype,
    )
