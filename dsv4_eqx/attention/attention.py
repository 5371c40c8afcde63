"""DeepSeek-V4's attention: sliding, compressed sparse and heavily compressed.

Paper section 2.3. One key head serves all query heads and is its own value; queries
come through a low-rank latent and are normalised head by head; the output is rotated
back at the query's position and projected group by group.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from dsv4_eqx.attention.cache import (
    AttentionCache,
    CompressorState,
    positions_after,
)
from dsv4_eqx.attention.compressor import Compressor
from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.kinds import CSA, HCA, SLIDING
from dsv4_eqx.kernels.attend import attend, query_block
from dsv4_eqx.kernels.entries import Entries, Selection
from dsv4_eqx.kernels.query_blocks import map_queries
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_int,
    validate_activations,
    validate_ids,
)
from dsv4_eqx.primitives.linear import GroupedLinear
from dsv4_eqx.primitives.norm import RMSNorm, UnweightedRMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding


class Attention(eqx.Module):
    """Attention of one layer: a sliding window, and compressed entries if it has them.

    A compressor makes it heavily compressed attention (every query sees all complete
    windows), an indexer beside it compressed sparse attention (the best of them). Such
    layers rotate everything with the longer base and YaRN.

    Each method is one step, so that a wrapper can put its own work between them.
    Gradients are reverse-mode only: the derivatives are custom.
    """

    query_down: Float[Array, "q_rank dim"]
    query_norm: RMSNorm
    query_up: Float[Array, "heads head_dim q_rank"]
    head_norm: UnweightedRMSNorm
    key_value: Float[Array, "head_dim dim"]
    key_value_norm: RMSNorm
    sinks: Float32[Array, " heads"]
    output_down: GroupedLinear
    output_up: Float[Array, "dim groups out_per_group"]
    rope: RotaryEmbedding
    compressor: Compressor | None
    indexer: Indexer | None
    window: int = eqx.field(static=True)

    def __init__(
        self,
        config: Config,
        kind: str,
        ratio: int,
        *,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `config`: the sizes.
        - `kind`: the layer's kind, as in `config.layer_types`.
        - `ratio`: tokens in a compressed entry, as in `config.compress_ratios`.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights; norms, sinks and position biases are float32.

        **Raises:** ValueError if there is no such kind, or not with that ratio.
        """
        _validate_kind(kind, ratio)
        keys = jax.random.split(key, 7)
        dim, rank = config.hidden_size, config.q_lora_rank
        heads, head_dim = config.num_attention_heads, config.head_dim
        std = config.initializer_range
        groups, per_group = config.o_groups, config.o_lora_rank
        self.query_down = std * jax.random.normal(keys[0], (rank, dim), dtype)
        self.query_norm = RMSNorm(rank, eps=config.rms_norm_eps)
        self.query_up = std * jax.random.normal(keys[1], (heads, head_dim, rank), dtype)
        self.head_norm = UnweightedRMSNorm(eps=config.rms_norm_eps)
        self.key_value = std * jax.random.normal(keys[2], (head_dim, dim), dtype)
        self.key_value_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.sinks = jnp.zeros(heads, jnp.float32)
        self.output_down = GroupedLinear(
            heads * head_dim // groups,
            groups * per_group,
            groups,
            key=keys[3],
            std=std,
            dtype=dtype,
        )
        self.output_up = std * jax.random.normal(
            keys[4], (dim, groups, per_group), dtype
        )
        self.rope = _rotary(config, kind)
        self.compressor, self.indexer = _compression(
            config, kind, ratio, self.rope, (keys[5], keys[6]), dtype
        )
        self.window = config.sliding_window

    @jax.named_scope("Attention")
    def __call__(
        self, x: Float[Array, "batch seq dim"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq dim"]:
        """Attention over a whole sequence.

        **Arguments:**

        - `x`: normalised activations.
        - `positions`: 0, 1, 2, ... in each row.

        **Raises:** ValueError if `x` has other channels or another dtype than the
        weights or no tokens, or the positions are not one integer for each token.
        """
        validate_activations("Attention", x, self.query_down, ("batch", "seq", "dim"))
        validate_ids("Attention", "positions", positions, x.shape[:2])
        if x.size == 0:
            raise ValueError(
                f"Attention was called with x of shape {x.shape}: batch and seq must "
                "be at least 1."
            )
        positions = positions.astype(jnp.int32)  # as those of compressed entries
        self = dequantize(self)
        latent = self.project_latent(x)
        keys = self.project_keys(x, positions)
        entries = None if self.compressor is None else self.compressor(x)
        selection = None
        if self.indexer is not None:
            selection = self.indexer(x, latent, positions)
        # No more than the sequence: a window that it does not fill costs nothing.
        num_before = min(self.window, x.shape[1]) - 1
        before = jnp.zeros_like(keys, shape=(len(keys), num_before, keys.shape[2]))
        keys = jnp.concatenate([before, keys], axis=1)
        return self.attend(latent, positions, keys, entries, selection)

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> AttentionCache:
        """The state before any token.

        **Arguments:**

        - `batch`: rows.
        - `capacity`: tokens that there will be room for.
        - `dtype`: of the activations.
        """

        def state(compressor: Compressor | None) -> CompressorState | None:
            if compressor is None:
                return None
            return compressor.init_state(batch, capacity, dtype)

        num_before = min(self.window, capacity) - 1
        head_dim = self.key_value.shape[0]
        return AttentionCache(
            window_keys=jnp.zeros((batch, num_before, head_dim), dtype),
            compressor=state(self.compressor),
            indexer=state(None if self.indexer is None else self.indexer.compressor),
        )

    @jax.named_scope("Attention.extend")
    def extend(
        self,
        x: Float[Array, "batch seq dim"],
        cache: AttentionCache,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], AttentionCache]:
        """Attention of new tokens over themselves and all before them.

        **Arguments:**

        - `x`: normalised activations of the new tokens, then padding, whose output
            means nothing.
        - `cache`: after `start` tokens.
        - `start`: tokens that each row has already.
        - `lengths`: new tokens of each row.

        **Returns:** the output, and the cache with all new tokens; `keep` shortens it.
        """
        validate_activations("Attention", x, self.query_down, ("batch", "seq", "dim"))
        self = dequantize(self)
        positions = positions_after(start, lengths, x.shape[1])
        latent = self.project_latent(x)
        keys = self.project_keys(x, positions)
        keys = jnp.concatenate([cache.window_keys, keys], axis=1)
        entries, selection, compressor, indexer = None, None, None, None
        if self.compressor is not None and cache.compressor is not None:
            entries, compressor = self.compressor.extend(
                x, cache.compressor, start, lengths
            )
        if self.indexer is not None and cache.indexer is not None:
            selection, indexer = self.indexer.extend(
                x, latent, cache.indexer, start, lengths
            )
        out = self.attend(latent, positions, keys, entries, selection)
        return out, AttentionCache(keys, compressor, indexer)

    def project_latent(
        self, x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch seq q_rank"]:
        """The normalised latent of the queries, which the indexer shares.

        **Arguments:**

        - `x`: normalised activations.
        """
        return self.query_norm(project(x, self.query_down))

    def project_keys(
        self, x: Float[Array, "batch seq dim"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq head_dim"]:
        """Rotated keys, which are the values too.

        **Arguments:**

        - `x`: normalised activations.
        - `positions`: of the tokens.
        """
        keys = self.key_value_norm(project(x, self.key_value))
        return self.rope(keys, positions)

    def attend(
        self,
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
        window_keys: Float[Array, "batch keys head_dim"],
        entries: Entries | None,
        selection: Selection,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq dim"]:
        """From latents to the layer's output, a block of queries at a time.

        Queries and heads' outputs are many times wider than the model; none of them
        exists for the whole sequence.

        **Arguments:**

        - `latent`: from `project_latent`.
        - `positions`, `window_keys`, `entries`, `selection`, `segment_ids`: as for the
            function `attend`.
        """

        def attend_block(per_query, keys):
            latent, positions, selection, segment_ids = per_query
            queries = self.project_queries(latent, positions)
            out = attend(
                queries, positions, keys, self.sinks, entries, selection, segment_ids
            )
            return self.project_output(out, positions)

        per_query = (latent, positions, selection, segment_ids)
        block = query_block(window_keys)
        return map_queries(attend_block, per_query, window_keys, block)

    def project_queries(
        self,
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Normalised, rotated queries.

        **Arguments:**

        - `latent`: from `project_latent`.
        - `positions`: of the tokens.
        """
        queries = project(latent, self.query_up)
        return self.rope(self.head_norm(queries), positions[..., None])

    def project_output(
        self,
        out: Float[Array, "batch seq heads head_dim"],
        positions: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq dim"]:
        """Rotates back at the queries' positions and mixes the heads, by groups.

        **Arguments:**

        - `out`: what `attend` gave.
        - `positions`: of the queries.
        """
        out = self.rope(out, positions[..., None], inverse=True)
        groups = self.output_down.weight.shape[0]
        latent = self.output_down(out.reshape(*out.shape[:2], groups, -1))
        return project(latent, self.output_up, over=2)


def _validate_kind(kind: str, ratio: int) -> None:
    if kind not in (SLIDING, CSA, HCA):
        allowed = f"{SLIDING!r}, {CSA!r} or {HCA!r}"
        raise invalid_argument("Attention", "kind", kind, allowed)
    fits = is_int(ratio) and (ratio == 0 if kind == SLIDING else ratio >= 1)
    if not fits:
        allowed = "0" if kind == SLIDING else "an integer, at least 1,"
        raise invalid_argument("Attention", "ratio", ratio, f"{allowed} in {kind!r}")


def _compression(
    config: Config,
    kind: str,
    ratio: int,
    rope: RotaryEmbedding,
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
    dtype: DTypeLike,
) -> tuple[Compressor | None, Indexer | None]:
    """What a layer of this kind has of the two."""
    if kind == SLIDING:
        return None, None
    compressor = Compressor(
        config,
        ratio=ratio,
        overlap=kind == CSA,
        head_dim=config.head_dim,
        rope=rope,
        key=keys[0],
        dtype=dtype,
    )
    if kind == HCA:
        return compressor, None
    return compressor, Indexer(config, ratio=ratio, rope=rope, key=keys[1], dtype=dtype)


def _rotary(config: Config, kind: str) -> RotaryEmbedding:
    if kind == SLIDING:
        return RotaryEmbedding(config.qk_rope_head_dim, base=config.rope_theta)
    return RotaryEmbedding(
        config.qk_rope_head_dim,
        base=config.compress_rope_theta,
        yarn=config.rope_scaling,
    )
