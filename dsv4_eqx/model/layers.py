"""The stack of layers, compiled once for each kind rather than once for each layer.

A schedule is a few layers of its own, then a unit that repeats, then perhaps a rest.
The unit's layers are stacked and scanned, so that compile time does not grow with
depth. Flash: three layers, then (heavily compressed, compressed sparse) twenty times.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dsv4_eqx.attention.cache import AttentionCache, mark_entries
from dsv4_eqx.config.config import Config
from dsv4_eqx.kernels.entries import StackedEntries
from dsv4_eqx.model.block import Block
from dsv4_eqx.moe.experts import Experts, StackedExperts


class LayersCache(eqx.Module):
    """The state of every layer, stacked as the layers are."""

    first: tuple[AttentionCache, ...]
    repeated: tuple[AttentionCache, ...]
    last: tuple[AttentionCache, ...]

    def keep(self, lengths: Int[Array, " batch"], seq: int) -> "LayersCache":
        """**Arguments:** as for `AttentionCache.keep`."""

        def one(cache: AttentionCache) -> AttentionCache:
            return cache.keep(lengths, seq)

        return LayersCache(
            first=tuple(map(one, self.first)),
            repeated=tuple(map(jax.vmap(one), self.repeated)),
            last=tuple(map(one, self.last)),
        )


class Layers(eqx.Module):
    """All layers: `first`, then `repeated` as often as it is stacked, then `last`.

    Each block in `repeated` has a leading dimension for the repetitions.
    """

    first: tuple[Block, ...]
    repeated: tuple[Block, ...]
    last: tuple[Block, ...]

    def __init__(
        self, config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ):
        """**Arguments:**

        - `config`: sizes and schedule.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights, but for those that stay float32.
        """
        num_layers = config.num_hidden_layers
        keys = jax.random.split(key, num_layers)
        kinds = [config.layer_kind(layer) for layer in range(num_layers)]
        start, period, repeats = repeating_unit(kinds)
        end = start + period * repeats

        def block(layer: int) -> Block:
            return Block(config, layer, key=keys[layer], dtype=dtype)

        def stacked(layer: int) -> Block:
            make = eqx.filter_vmap(
                lambda key: Block(config, layer, key=key, dtype=dtype)
            )
            return make(keys[layer:end:period])

        self.first = tuple(block(layer) for layer in range(start))
        self.repeated = tuple(stacked(start + i) for i in range(period))
        self.last = tuple(block(layer) for layer in range(end, num_layers))

    def __call__(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        *,
        remat: bool = False,
    ) -> Float[Array, "batch seq streams dim"]:
        """**Arguments:**

        - `streams`: the residual streams.
        - `token_ids`: the tokens; hash routing reads them.
        - `positions`: 0, 1, 2, ... in each row.
        - `remat`: keep only each layer's input for the backward pass.
        """

        def run(block: Callable[..., Array], streams: Array) -> Array:
            return block(streams, token_ids, positions)

        run = eqx.filter_checkpoint(run) if remat else run

        def run_all(streams: Array, blocks: tuple, name: str) -> Array:
            for i, block in enumerate(blocks):
                with jax.named_scope(f"layers.{name}.{i}"):
                    streams = run(block, streams)
            return streams

        def run_unit(streams: Array, unit: tuple) -> tuple[Array, None]:
            return run_all(streams, unit, "repeated"), None

        streams = run_all(streams, self.first, "first")
        if self.repeated:
            streams, _ = lax.scan(run_unit, streams, self.repeated)
        return run_all(streams, self.last, "last")

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> LayersCache:
        """The state of all layers before any token.

        **Arguments:** as for `Attention.init_cache`.
        """

        def state(block: Block) -> AttentionCache:
            return block.attention.init_cache(batch, capacity, dtype)

        def stacked(block: Block) -> AttentionCache:
            one = eqx.filter_eval_shape(
                lambda part: state(jax.tree.map(lambda x: x[0], part)), block
            )
            shape = (self.num_repeats,)
            return jax.tree.map(lambda x: jnp.zeros(shape + x.shape, x.dtype), one)

        return LayersCache(
            first=tuple(map(state, self.first)),
            repeated=tuple(map(stacked, self.repeated)),
            last=tuple(map(state, self.last)),
        )

    def extend(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        cache: LayersCache,
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
        *,
        keep: bool = True,
    ) -> tuple[Float[Array, "batch seq streams dim"], LayersCache]:
        """**Arguments:** as for `Block.extend`, with the state of all layers.

        - `keep`: False leaves it to `LayersCache.keep` which new tokens stay.
        """
        seq = token_ids.shape[1]

        def run(
            streams: Array, blocks: tuple, caches: tuple, name: str
        ) -> tuple[Array, tuple]:
            after = []
            for i, (block, before) in enumerate(zip(blocks, caches, strict=True)):
                with jax.named_scope(f"layers.{name}.{i}"):
                    streams, new = block.extend(
                        streams, token_ids, before, start, lengths
                    )
                    after.append(new.keep(lengths, seq) if keep else new)
            return streams, tuple(after)

        # A scan copies what it hands out and collects: entries stay where they are, as
        # experts do.
        def run_unit(carry: tuple, unit: tuple) -> tuple[tuple, tuple]:
            streams, stacks = carry
            repeat, blocks, rest = unit
            blocks = _in_place(blocks, self.repeated, repeat)
            entries = jax.tree.map(lambda x: StackedEntries(x, repeat), stacks)
            states = eqx.combine(rest, entries)
            streams, after = run(streams, blocks, states, "repeated")
            after = _unwrapped(after)
            stacks, rest = eqx.partition(after, mark_entries(after))
            return (streams, stacks), rest

        streams, first = run(streams, self.first, cache.first, "first")
        repeated = ()
        if self.repeated:
            stacks, rest = eqx.partition(cache.repeated, mark_entries(cache.repeated))
            units = jnp.arange(self.num_repeats), self.repeated, rest
            (streams, stacks), rest = lax.scan(run_unit, (streams, stacks), units)
            repeated = eqx.combine(rest, stacks)
        streams, last = run(streams, self.last, cache.last, "last")
        return streams, LayersCache(first, repeated, last)

    def __len__(self) -> int:
        return len(self.first) + self.num_repeats * len(self.repeated) + len(self.last)

    @property
    def num_repeats(self) -> int:
        """How often the unit repeats."""
        stacked = jax.tree.leaves(self.repeated)
        return stacked[0].shape[0] if stacked else 0

    def __getitem__(self, layer: int) -> Block:
        """One layer's block, unstacked."""
        if not 0 <= layer < len(self):
            raise IndexError(f"layer {layer} of {len(self)}")
        inner = layer - len(self.first)
        if inner < 0:
            return self.first[layer]
        repeat, position = divmod(inner, max(len(self.repeated), 1))
        if repeat < self.num_repeats:
            return jax.tree.map(lambda x: x[repeat], self.repeated[position])
        return self.last[inner - self.num_repeats * len(self.repeated)]


def _in_place(blocks: tuple, stacked: tuple, repeat: Int[Array, ""]) -> tuple:
    """One repetition's blocks, their experts read from the stack."""

    def replace(node: Any, stack: Any) -> Any:
        return StackedExperts(stack, repeat) if is_experts(node) else node

    def is_experts(node: Any) -> bool:
        return isinstance(node, Experts)

    def one(block: Any, stack: Any) -> Any:
        # What is a block only while it runs, as with split weights, is handed out.
        if not isinstance(block, Block):
            return block
        return jax.tree.map(replace, block, stack, is_leaf=is_experts)

    return tuple(map(one, blocks, stacked))


def _unwrapped(caches: PyTree) -> PyTree:
    """The caches with the arrays that entries lie in."""

    def is_wrapped(node: Any) -> bool:
        return isinstance(node, StackedEntries)

    def unwrap(node: Any) -> Any:
        return node.stack if is_wrapped(node) else node

    return jax.tree.map(unwrap, caches, is_leaf=is_wrapped)


def repeating_unit(kinds: Sequence[object]) -> tuple[int, int, int]:
    """Start, period and count of the repetition that leaves least to compile.

    **Arguments:**

    - `kinds`: what must be equal for two layers to share their program.

    **Returns:** `(len(kinds), 0, 0)` where nothing repeats.
    """
    num_layers = len(kinds)
    best = (num_layers, num_layers, 0, 0)  # blocks to compile, start, period, repeats
    for start in range(num_layers):
        for period in range(1, (num_layers - start) // 2 + 1):
            repeats = 1
            while (
                kinds[start : start + period]
                == (kinds[start + repeats * period : start + (repeats + 1) * period])
            ):
                repeats += 1
            blocks = num_layers - period * (repeats - 1)
            if repeats > 1:
                best = min(best, (blocks, start, period, repeats))
    return best[1:]
