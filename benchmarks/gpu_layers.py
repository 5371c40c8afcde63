"""Whole layers: the parts `layers` and `decoding` of `gpu.py`.

A layer of each kind, routed by score, runs over one sequence, forward and forward +
backward; and it takes steps of decoding, a token for each row, after contexts of random
numbers. What a step reads of the experts is counted from what the router chose.
"""

from collections.abc import Iterator
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import (
    KINDS,
    PASSES,
    Case,
    Sizes,
    built,
    keep,
    layer_bytes,
    layer_flops,
    made,
    num_bytes,
    one_layer,
    random,
)
from jax import lax

from dsv4_eqx import Block

_STEPS: Final = 16  # decoding steps in a program


class Layer:
    """A layer of one kind: its arrays, what is timed of it, and over which data."""

    def __init__(self, sizes: Sizes, kind: str):
        self.kind, self.dtype = kind, sizes.dtype
        self.config = one_layer(sizes.config, kind)
        self.arrays, self.block_of = built(self.make)

    def make(self) -> Block:
        return Block(self.config, 0, key=jax.random.key(0), dtype=self.dtype)

    def weights(self, kept: dict) -> Any:
        return keep(kept, "block", lambda: made(self.make))

    def forward(self, arrays, streams, ids, positions, seed):
        del seed
        return self.block_of(arrays)(streams, ids, positions)

    def backward(self, arrays, streams, ids, positions, seed):
        def loss(floats, streams):
            merged = eqx.combine(floats, rest)
            out = self.forward(merged, streams, ids, positions, seed)
            return jnp.sum(out.astype(jnp.float32) * seed.astype(jnp.float32))

        floats, rest = eqx.partition(arrays, eqx.is_inexact_array)
        d_floats, d_streams = jax.grad(loss, (0, 1))(floats, streams)
        return d_streams, d_floats

    def sequence(self, tokens: int) -> tuple:
        """Streams, ids, positions, and the output's gradient."""
        positions = jnp.arange(tokens)[None]
        shape = (1, tokens, self.config.hc_mult, self.config.hidden_size)
        streams, seed = (random(i, shape, self.dtype) for i in (1, 2))
        return streams, positions % self.config.vocab_size, positions, seed

    def steps(self, arrays, cache, streams, start):
        """Several steps in one program, and the experts that each of them chose."""
        block, chosen = watched(self.block_of(arrays))
        ones = jnp.ones_like(start)
        ids = jnp.zeros(streams.shape[:2], jnp.int32)

        def step(state, i):
            streams, cache = state
            # A token a step, again and again the ones after the same context.
            out, cache = block.extend(streams, ids, cache, start + i, ones)
            return (out, cache.keep(ones)), chosen.pop()

        state, experts = lax.scan(step, (streams, cache), jnp.arange(_STEPS))
        return *state, experts

    def empty_cache(self, batch: int, context: int) -> Any:
        attention = self.make().attention
        return attention.init_cache(batch, context + _STEPS, self.dtype)

    def decoded(self, batch: int, context: int) -> tuple:
        """A cache of random numbers, streams, and where each row begins."""
        cache = eqx.filter_eval_shape(self.empty_cache, batch, context)
        leaves, structure = jax.tree.flatten(cache)
        leaves = [random(i, x.shape, x.dtype) for i, x in enumerate(leaves)]
        shape = (batch, 1, self.config.hc_mult, self.config.hidden_size)
        start = jnp.full(batch, context, jnp.int32)
        filled = jax.tree.unflatten(structure, leaves)
        return filled, random(99, shape, self.dtype), start


def watched(block: Block) -> tuple[Block, list[jax.Array]]:
    """The block, and a list that gets the experts chosen whenever it is traced."""
    chosen: list[jax.Array] = []
    experts = block.moe.experts

    def run(x, own, weights):
        chosen.append(own)
        return experts(x, own, weights)

    return eqx.tree_at(lambda block: block.moe.experts, block, run), chosen


def layers(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """Forward + backward, then forward; CSA first, which takes longest to compile."""
    for kind in sorted(KINDS, key=lambda kind: kind != "CSA"):
        layer = Layer(sizes, kind)
        for tokens in sizes.lengths:
            for direction in reversed(PASSES):
                for form in forms:
                    yield layer_case(layer, tokens, direction, form)


def layer_case(layer: Layer, tokens: int, direction: str, form: str) -> Case:
    def arguments(kept):
        name = f"sequence {tokens}"
        for other in [n for n in kept if n.startswith("sequence") and n != name]:
            del kept[other]
        sequence = keep(kept, name, lambda: layer.sequence(tokens))
        return layer.weights(kept), *sequence

    index = PASSES.index(direction)
    sequence = jax.eval_shape(lambda: layer.sequence(tokens))
    weights, streams = num_bytes(layer.arrays), num_bytes(sequence[0])
    return Case(
        dict(kind=layer.kind, tokens=tokens, pass_=direction, form=form),
        (layer.forward, layer.backward)[index],
        arguments,
        (layer.arrays, *sequence),
        group=layer.kind,
        flops=layer_flops(layer.config, layer.kind, tokens)[index],
        bytes=layer_bytes(weights, streams)[index],
        compare=f"{layer.kind} {tokens} {direction}",
        form=form,
    )


def decoding(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """A token for each row, after a context."""
    for kind in KINDS:
        layer = Layer(sizes, kind)
        for context in sizes.contexts:
            for batch in sizes.batches:
                for form in forms:
                    yield decoding_case(layer, context, batch, form)


def decoding_case(layer: Layer, context: int, batch: int, form: str) -> Case:
    def arguments(kept):
        return layer.weights(kept), *layer.decoded(batch, context)

    data = jax.eval_shape(lambda: layer.decoded(batch, context))
    return Case(
        dict(kind=layer.kind, context=context, rows=batch, form=form),
        layer.steps,
        arguments,
        (layer.arrays, *data),
        group=layer.kind,
        bytes=lambda out: step_bytes(layer, data[0], num_distinct(out[2])),
        divide=_STEPS,
        donated=(1,),
        compare=f"{layer.kind} {context} {batch}",
        form=form,
    )


def num_distinct(experts: jax.Array) -> float:
    """How many different experts a step's rows choose, on average."""
    return float(np.mean([len(np.unique(step)) for step in np.asarray(experts)]))


def step_bytes(layer: Layer, cache: Any, experts: float) -> float:
    """What a step has to read: weights, of so many of the experts, and of the cache."""
    config, routed = layer.config, num_bytes(layer.arrays.moe.experts)
    read = num_bytes(layer.arrays) - routed
    read += experts / config.n_routed_experts * routed
    read += num_bytes(cache.window_keys)
    if layer.kind == "HCA":
        read += num_bytes(cache.compressor.entries)
    if layer.kind == "CSA":
        entries = cache.compressor.entries
        chosen = min(1.0, config.index_topk / entries.shape[1])
        read += chosen * num_bytes(entries) + num_bytes(cache.indexer.entries)
    return read
