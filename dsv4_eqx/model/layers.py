"""The stack of layers, compiled once for each kind rather than once for each layer.

A schedule has a few single layers, then a unit of layers that repeats, then perhaps a
remainder. The unit's layers are stacked and scanned, so that compile time does not grow
with depth. Flash has three single layers, then the unit (heavily compressed, compressed
sparse) twenty times.
"""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.attention.cache import AttentionCache, Extended
from dsv4_eqx.attention.values import observed
from dsv4_eqx.config.config import Config
from dsv4_eqx.model.block import Block
from dsv4_eqx.model.given_experts import by_section
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.model.stacked import (
    experts_in_place,
    read_states,
    repeating_unit,
    with_room,
    write_states,
)
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.initial import stack


class Layers(eqx.Module):
    """All layers: `first`, then `repeated` as often as it is stacked, then `last`.

    Each block in `repeated` has a leading dimension for the repetitions.
    """

    first: tuple[Block, ...]
    repeated: tuple[Block, ...]
    last: tuple[Block, ...]
    num_repeats: int = eqx.field(static=True)  # how often the unit repeats

    def __init__(
        self, config: Config, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ):
        """**Arguments:**

        - `config`: sizes and schedule.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights, except those that are always float32.
        """
        num_layers = config.num_hidden_layers
        keys = jax.random.split(key, num_layers)
        kinds = [config.layer_kind(layer) for layer in range(num_layers)]
        start, period, repeats = repeating_unit(kinds)
        end = start + period * repeats

        def block(layer: int) -> Block:
            return Block(config, layer, key=keys[layer], dtype=dtype)

        def stacked(layer: int) -> Block:
            def make(key: PRNGKeyArray) -> Block:
                return Block(config, layer, key=key, dtype=dtype)

            return stack(make, keys[layer:end:period])

        self.first = tuple(block(layer) for layer in range(start))
        self.repeated = tuple(stacked(start + i) for i in range(period))
        self.last = tuple(block(layer) for layer in range(end, num_layers))
        self.num_repeats = repeats

    @compiled_once
    def __call__(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        experts: tuple[Int[Array, "batch seq slots"] | None, ...] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after all layers.

        **Arguments:**

        - `streams`: the residual streams before the first layer.
        - `token_ids`: the tokens' ids, which hash routing reads.
        - `positions`, `segment_ids`: as for `Attention`.
        - `experts`: of each layer what `Block` takes, or None; where layers repeat, of
            all repetitions or of none.
        - `remat`: keep only each layer's input for the backward pass.
        """

        def run(
            block: Callable[..., Array], streams: Array, experts: Array | None
        ) -> tuple[Array, None]:
            others = _others(segment_ids, experts)
            return block(streams, token_ids, positions, *others), None

        streams, *_ = self._run(run, streams, experts, remat)
        return streams

    @compiled_once
    def observe(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        experts: tuple[Int[Array, "batch seq slots"] | None, ...] | None = None,
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch seq streams dim"], tuple[LayerValues, ...]]:
        """Calls the layers, and returns what each computed beside the streams."""

        def run(
            block: Any, streams: Array, experts: Array | None
        ) -> tuple[Array, LayerValues]:
            others = _others(segment_ids, experts)
            out, values = observed(block, streams, token_ids, positions, *others)
            return out, LayerValues(out, None, None) if values is None else values

        streams, first, repeated, last = self._run(run, streams, experts, remat)
        middle = (
            jax.tree.map(operator.itemgetter(repeat), values)
            for repeat in range(self.num_repeats)
            for values in repeated
        )
        return streams, (*first, *middle, *last)

    def _run(
        self,
        run: Callable[..., tuple[Array, Any]],
        streams: Array,
        experts: tuple | None,
        remat: bool,
    ) -> tuple[Array, tuple, tuple, tuple]:
        """The streams after all layers, and what `run` returns of each beside them."""
        run = eqx.filter_checkpoint(run) if remat else run

        def run_all(
            streams: Array, blocks: tuple, given: tuple, name: str
        ) -> tuple[Array, tuple[Any, ...]]:
            values = []
            for i, (block, experts) in enumerate(zip(blocks, given, strict=True)):
                with jax.named_scope(f"layers.{name}.{i}"):
                    streams, value = run(block, streams, experts)
                values.append(value)
            return streams, tuple(values)

        def run_unit(streams: Array, unit: tuple) -> tuple[Array, tuple]:
            blocks, given = unit
            return run_all(streams, blocks, given, "repeated")

        repeated = ()
        of_first, of_repeated, of_last = by_section(self, experts)
        streams, first = run_all(streams, self.first, of_first, "first")
        if self.repeated:
            units = self.repeated, of_repeated
            streams, repeated = lax.scan(run_unit, streams, units)
        streams, last = run_all(streams, self.last, of_last, "last")
        return streams, first, repeated, last

    def init_cache(
        self, batch: int, capacity: int, dtype: DTypeLike
    ) -> tuple[AttentionCache, ...]:
        """The state of each block of `first`, then of `repeated`, then of `last`.

        Arrays of a repeated block's state have a dimension for the repetitions, which
        comes after that of the rows.

        **Arguments, raises:** as for `Attention.init_cache`.
        """

        def state(block: Block) -> AttentionCache:
            return block.attention.init_cache(batch, capacity, dtype)

        def stacked(block: Block) -> AttentionCache:
            shapes = eqx.filter_eval_shape(
                lambda part: state(jax.tree.map(lambda x: x[0], part)), block
            )

            def zeros(x: jax.ShapeDtypeStruct) -> Array:
                return jnp.zeros((batch, self.num_repeats, *x.shape[1:]), x.dtype)

            return jax.tree.map(zeros, shapes)

        return (
            *map(state, self.first),
            *map(stacked, self.repeated),
            *map(state, self.last),
        )

    @compiled_once
    def extend(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        cache: tuple[AttentionCache, ...],
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq streams dim"], tuple[AttentionCache, ...]]:
        """Runs new tokens, all of which are kept.

        **Arguments, raises:** as for `Block.extend`, with the state of all layers.

        **Returns:** the streams, and the state of all layers after the new tokens.
        """
        operands = streams, token_ids, cache, start, lengths
        return self._extend(*operands, lambda extended: extended.keep(lengths), 0)

    @compiled_once
    def lookahead(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        cache: tuple[AttentionCache, ...],
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq streams dim"], Extended]:
        """Runs new tokens; how many of them are kept is decided later.

        **Arguments, raises:** as for `extend`.

        **Returns:** the streams, and an `Extended`, whose `keep` gives the next state.
        """
        seq, operands = token_ids.shape[1], (streams, token_ids, cache, start, lengths)
        streams, longer = self._extend(*operands, lambda extended: extended.longer, seq)
        return streams, Extended(longer, seq)

    def _extend(
        self,
        streams: Float[Array, "batch seq streams dim"],
        token_ids: Int[Array, "batch seq"],
        cache: tuple[AttentionCache, ...],
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
        settle: Callable[[Extended], Any],
        room: int,
    ) -> tuple[Float[Array, "batch seq streams dim"], Any]:
        """Runs one block after another; the unit's blocks are scanned.

            carry      streams, states of all repetitions --> the same, after the unit
                         | read_states           ^ write_states
            repeat r   windows, entries  -->  windows with the new tokens, entries
                       (a copy) (in place)     (cut by `settle`)

        `room` is how many tokens longer `settle` makes the windows of a state.
        """

        def run(
            streams: Array, blocks: tuple, states: tuple, name: str
        ) -> tuple[Array, tuple]:
            after = []
            for i, (block, before) in enumerate(zip(blocks, states, strict=True)):
                with jax.named_scope(f"layers.{name}.{i}"):
                    streams, extended = block.extend(
                        streams, token_ids, before, start, lengths
                    )
                    after.append(settle(extended))
            return streams, tuple(after)

        def run_unit(carry: tuple, unit: tuple) -> tuple[tuple, None]:
            (streams, states), (repeat, blocks) = carry, unit
            blocks = experts_in_place(blocks, self.repeated, repeat)
            before = read_states(states, repeat, room)
            streams, after = run(streams, blocks, before, "repeated")
            return (streams, write_states(after, states, repeat)), None

        begin, end = len(self.first), len(cache) - len(self.last)
        repeated = cache[begin:end]
        streams, first = run(streams, self.first, cache[:begin], "first")
        if self.repeated:
            units = jnp.arange(self.num_repeats), self.repeated
            carry = streams, with_room(repeated, room)
            (streams, repeated), _ = lax.scan(run_unit, carry, units)
        streams, last = run(streams, self.last, cache[end:], "last")
        return streams, (*first, *repeated, *last)

    def __len__(self) -> int:
        return len(self.first) + self.num_repeats * len(self.repeated) + len(self.last)

    def __getitem__(self, layer: int) -> Block:
        """One layer's block, unstacked.

        **Raises:** IndexError if there is no such layer; ValueError if it is stacked
        with others and a leaf is neither an array nor a label, as inside `eqx.tree_at`.
        """
        section, index, repeat = self.place(layer)
        block = getattr(self, section)[index]
        if repeat is None:
            return block

        def part(x: Any) -> Any:
            is_shared = isinstance(x, bool | int | float | str)
            if is_shared or getattr(x, "ndim", None) == 0:
                return x  # a label, or a number for all layers in the stack
            if isinstance(x, jax.Array | np.ndarray):
                return x[repeat]
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            raise ValueError(
                f"layer {layer} lies in a stack with others, and cannot be reached "
                f"through layers[{layer}] here: edit the block model.layers[{layer}], "
                f"then dsv4_eqx.replace_layer(model, {layer}, block)."
            )

        return jax.tree.map(part, block)

    def place(self, layer: int) -> tuple[str, int, int | None]:
        """Where a layer is: field, index in the field, and repetition if it is stacked.

        **Raises:** IndexError if there is no such layer.
        """
        if not 0 <= layer < len(self):
            raise IndexError(f"layer {layer} of {len(self)}")
        inner = layer - len(self.first)
        if inner < 0:
            return "first", layer, None
        repeat, index = divmod(inner, max(len(self.repeated), 1))
        if repeat < self.num_repeats:
            return "repeated", index, repeat
        return "last", inner - self.num_repeats * len(self.repeated), None


def _others(segment_ids: Array | None, experts: Array | None) -> tuple:
    """The last arguments of a block; one of one's own need not take what is None."""
    if experts is not None:
        return segment_ids, experts
    return () if segment_ids is None else (segment_ids,)
