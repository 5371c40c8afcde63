"""DeepSeek-V4's attention: sliding, compressed sparse and heavily compressed.

Paper section 2.3. One key head serves all query heads and is its own value; queries
come through a low-rank latent and are normalised head by head; the output is rotated
back at the query's position and projected group by group.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from dsv4_eqx.attention.cache import (
    AttentionCache,
    CompressorState,
    Extended,
    positions_after,
)
from dsv4_eqx.attention.checks import (
    validate_cache,
    validate_parts,
    validate_sequences,
)
from dsv4_eqx.attention.compressor import Compressor, validate_rotary
from dsv4_eqx.attention.divergence import SumHeads, divergence_by_blocks, same
from dsv4_eqx.attention.documents import document_starts
from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.attention.values import AttentionValues, observed
from dsv4_eqx.kernels.attend import attend, query_block
from dsv4_eqx.kernels.entries import Entries, Selection
from dsv4_eqx.kernels.query_blocks import map_queries
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.quantized_weight import dequantize
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_activations,
    validate_number,
    validate_sizes,
)
from dsv4_eqx.primitives.linear import GroupedLinear
from dsv4_eqx.primitives.norm import RMSNorm, UnweightedRMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding


class Attention(eqx.Module):
    """Attention of one layer: a sliding window and, if any, compressed entries.

    With a compressor it is heavily compressed attention: every query also sees the
    entries of all complete windows. With an indexer beside it, it is compressed sparse
    attention: every query sees the entries that the indexer selects. DeepSeek-V4's
    layers with a compressor use a longer rotary base and YaRN for every rotation.

    Each method is one step, so that a wrapper can put its own work between them. Those
    that take `x` take normalised activations.

    The derivatives are custom and reverse-mode only, except inside of
    `use_kernels("reference")`.
    """

    # With some of the heads or groups, the output is a partial sum.
    partial_over: ClassVar = ("heads", "groups")

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
    dim: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        q_rank: int,
        num_groups: int,
        out_per_group: int,
        window: int,
        rope: RotaryEmbedding,
        compressor: Compressor | None = None,
        indexer: Indexer | None = None,
        norm_eps: float = 1e-6,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `dim`: channels of a token.
        - `num_heads`: query heads.
        - `head_dim`: channels of a head, and of the one head of keys.
        - `q_rank`: channels of the query latent.
        - `num_groups`: groups of heads in the output projection.
        - `out_per_group`: channels that come out of a group.
        - `window`: uncompressed tokens that a query sees, itself included.
        - `rope`: rotary embedding of queries and keys; its inverse rotates outputs.
        - `compressor`: makes the compressed entries, of `head_dim` channels.
        - `indexer`: selects the entries that a query sees; without it, it sees all.
        - `norm_eps`: added to the mean square in all norms.
        - `std`: deviation of the initial weights, which are normal.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights; norms and sinks are float32.

        **Raises:** ValueError if a size is not a positive integer, a number is negative
        or not finite, the groups do not divide the heads, or compressor, indexer and
        attention have sizes that do not match.
        """
        call = "Attention"
        self.dim, self.num_heads, self.head_dim, self.window = validate_sizes(
            call, dim=dim, num_heads=num_heads, head_dim=head_dim, window=window
        )
        q_rank, num_groups, out_per_group = validate_sizes(
            call, q_rank=q_rank, num_groups=num_groups, out_per_group=out_per_group
        )
        std = validate_number(call, "std", std)
        if num_heads % num_groups != 0:
            allowed = f"a divisor of num_heads={num_heads}"
            raise invalid_argument(call, "num_groups", num_groups, allowed)
        validate_rotary(call, rope, head_dim)
        validate_parts(head_dim, q_rank, compressor, indexer)
        keys = jax.random.split(key, 5)
        self.query_down = normal(keys[0], (q_rank, dim), dtype, std=std)
        self.query_norm = RMSNorm(q_rank, eps=norm_eps)
        self.query_up = normal(keys[1], (num_heads, head_dim, q_rank), dtype, std=std)
        self.head_norm = UnweightedRMSNorm(eps=norm_eps)
        self.key_value = normal(keys[2], (head_dim, dim), dtype, std=std)
        self.key_value_norm = RMSNorm(head_dim, eps=norm_eps)
        self.sinks = jnp.zeros(num_heads, jnp.float32)
        sizes = num_heads * head_dim // num_groups, num_groups * out_per_group
        self.output_down = GroupedLinear(
            *sizes, num_groups, key=keys[3], std=std, dtype=dtype
        )
        shape = (dim, num_groups, out_per_group)
        self.output_up = normal(keys[4], shape, dtype, std=std)
        self.rope, self.compressor, self.indexer = rope, compressor, indexer

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq dim"]:
        """Attention over whole sequences.

        **Arguments:**

        - `x`: normalised activations.
        - `positions`: 0, 1, 2, ... in each row, or in each document of a row.
        - `segment_ids`: document of each token, where a row has several: any integers,
            the same throughout a document. An id that comes back after another one
            begins a new document.

        **Raises:** ValueError if `x` has no tokens, or other channels or another dtype
        than the weights; if `positions` or `segment_ids` are not one integer for each
        token; and, except under `jit`, if positions do not start at 0 in each document.
        """
        validate_sequences(x, self.query_down, positions, segment_ids)
        return self._run(x, positions, segment_ids)[0]

    def observe(
        self,
        x: Float[Array, "batch seq dim"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        *,
        sum_heads: SumHeads = same,
    ) -> tuple[Float[Array, "batch seq dim"], AttentionValues]:
        """Calls it, and returns what was computed on the way beside the output.

        Where each device has some of the heads, `sum_heads` adds up over devices.
        """
        validate_sequences(x, self.query_down, positions, segment_ids)
        return self._run(x, positions, segment_ids, sum_heads)

    @compiled_once
    @jax.named_scope("Attention")
    def _run(
        self,
        x: Float[Array, "batch seq dim"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None,
        sum_heads: SumHeads | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Any]:
        """The output and, if `sum_heads` is given, what was computed on the way."""
        self = dequantize(self)
        positions = positions.astype(jnp.int32)  # like those of compressed entries
        # Starts are unique ids, even where a segment id comes back.
        documents = () if segment_ids is None else (document_starts(segment_ids),)
        latent = self.project_latent(x)
        keys = self.project_keys(x, positions)
        entries = None if self.compressor is None else self.compressor(x, *documents)
        # A window longer than the sequence costs nothing more.
        num_before = min(self.window, x.shape[1]) - 1
        before = jnp.zeros_like(keys, shape=(keys.shape[0], num_before, keys.shape[2]))
        keys = jnp.concatenate([before, keys], axis=1)
        selection = shown = divergence = None
        indexed = x, latent, positions, *documents
        if self.indexer is not None and sum_heads is None:
            selection = self.indexer(*indexed)
        elif self.indexer is not None:
            selection, shown = observed(self.indexer, *indexed)
        operands = latent, positions, keys, entries, selection, *documents
        if sum_heads is None:
            return self.attend(*operands), None
        out, log_sum_exp = self.attend_observed(*operands)
        if isinstance(self.indexer, Indexer):
            detached = lax.stop_gradient((x, latent))
            _, weights, _, *taught = self.indexer.operands(*detached, *indexed[2:])
            per_query = latent, positions, log_sum_exp, weights, selection, *documents
            divergence = divergence_by_blocks(
                self, per_query, entries, taught[0], sum_heads
            )
        return out, AttentionValues(log_sum_exp, shown, divergence)

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> AttentionCache:
        """The state before any token, for `extend`.

        **Arguments:**

        - `batch`: rows.
        - `capacity`: the most tokens that a row can have.
        - `dtype`: of the activations.
        """

        def state(compressor: Compressor | None) -> CompressorState | None:
            if compressor is None:
                return None
            return compressor.init_state(batch, capacity, dtype)

        num_before = min(self.window, capacity) - 1
        return AttentionCache(
            window_keys=jnp.zeros((batch, num_before, self.head_dim), dtype),
            compressor=state(self.compressor),
            indexer=state(None if self.indexer is None else self.indexer.compressor),
        )

    def extend(
        self,
        x: Float[Array, "batch seq dim"],
        cache: AttentionCache,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], Extended]:
        """Attention of new tokens over themselves and all tokens before them.

        **Arguments:**

        - `x`: normalised activations of the new tokens, then padding, whose output is
            meaningless.
        - `cache`: after `start` tokens.
        - `start`: tokens that each row has already.
        - `lengths`: new tokens of each row.

        **Returns:** the output, and an `Extended`, whose `keep` gives the next cache.

        **Raises:** ValueError as calling does, and if `cache` is not an
        `AttentionCache`, such as an `Extended` whose `keep` was not called; and, except
        under `jit`, if a row would have more tokens than the cache has room for.
        """
        validate_cache("Attention.extend", self, cache, start, lengths)
        validate_activations("Attention", x, self.query_down, ("batch", "seq", "dim"))
        return self._extend(x, cache, start, lengths)

    @compiled_once
    @jax.named_scope("Attention.extend")
    def _extend(
        self,
        x: Float[Array, "batch seq dim"],
        cache: AttentionCache,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], Extended]:
        self = dequantize(self)
        positions = positions_after(start, lengths, x.shape[1])
        latent = self.project_latent(x)
        keys = self.project_keys(x, positions)
        keys = jnp.concatenate([cache.window_keys, keys], axis=1)
        entries, selection, compressor, indexer = None, None, None, None
        if self.compressor is not None and cache.compressor is not None:
            entries, extended = self.compressor.extend(
                x, cache.compressor, start, lengths
            )
            compressor = extended.longer
        if self.indexer is not None and cache.indexer is not None:
            selection, extended = self.indexer.extend(
                x, latent, cache.indexer, start, lengths
            )
            indexer = extended.longer
        out = self.attend(latent, positions, keys, entries, selection)
        return out, Extended(AttentionCache(keys, compressor, indexer), x.shape[1])

    def project_latent(
        self, x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch seq q_rank"]:
        """The normalised latent of the queries, which the indexer shares."""
        return self.query_norm(project(x, self.query_down))

    def project_keys(
        self, x: Float[Array, "batch seq dim"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq head_dim"]:
        """Rotated keys, which are also the values."""
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
        """From latents to the layer's output, one block of queries at a time.

        Queries and the heads' outputs are many times wider than the model, so they
        never exist for the whole sequence. The arguments after `latent`, which is from
        `project_latent`, are those of the function `attend`.
        """
        per_query = (latent, positions, selection, segment_ids)
        return self._by_blocks(lambda out, _: out, per_query, window_keys, entries)

    def attend_observed(
        self,
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
        window_keys: Float[Array, "batch keys head_dim"],
        entries: Entries | None,
        selection: Selection,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Float[Array, "batch seq heads"]]:
        """What `attend` gives, and the log-sum-exp of each query's logits."""
        per_query = (latent, positions, selection, segment_ids)
        return self._by_blocks(lambda *both: both, per_query, window_keys, entries)

    def _by_blocks(
        self,
        result: Callable[[Array, Array], Any],
        per_query: tuple,
        window_keys: Float[Array, "batch keys head_dim"],
        entries: Entries | None,
    ) -> Any:
        """`result` of output and log-sum-exp, block by block."""

        def attend_block(per_query: tuple, keys: Array) -> Any:
            latent, positions, selection, segment_ids = per_query
            queries = self.project_queries(latent, positions)
            out, log_sum_exp = attend(
                queries, positions, keys, self.sinks, entries, selection, segment_ids
            )
            return result(self.project_output(out, positions), log_sum_exp)

        block = query_block(window_keys)
        return map_queries(attend_block, per_query, window_keys, block)

    def project_queries(
        self,
        latent: Float[Array, "batch seq q_rank"],
        positions: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Normalised, rotated queries, from the latents of `project_latent`."""
        queries = project(latent, self.query_up)
        return self.rope(self.head_norm(queries), positions[..., None])

    def project_output(
        self,
        out: Float[Array, "batch seq heads head_dim"],
        positions: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq dim"]:
        """Rotates the heads' outputs back and projects them group by group."""
        out = self.rope(out, positions[..., None], inverse=True)
        groups = self.output_down.weight.shape[0]
        latent = self.output_down(out.reshape(*out.shape[:2], groups, -1))
        return project(latent, self.output_up, over=2)
