"""Operations alone: the parts `attention`, `experts` and `indexer` of `gpu.py`.

Core attention over random keys and entries; the routed experts, and one of their
grouped products by different hands; the indexer, and what finds the best of its scores.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from gpu_cases import (
    KINDS,
    PASSES,
    Case,
    Sizes,
    built,
    indexer_flops,
    keep,
    made,
    num_bytes,
    random,
)
from jax import lax

from dsv4_eqx import Experts, Indexer
from dsv4_eqx.kernels.attend import attend
from dsv4_eqx.kernels.entries import Entries
from dsv4_eqx.kernels.form import FORMS, use_kernels
from dsv4_eqx.kernels.grouped_products import product
from dsv4_eqx.kernels.select import highest, listed
from dsv4_eqx.model.parts import make_experts, make_indexer


class CoreAttention:
    """Attention of one kind over one sequence: between projections, with its data."""

    def __init__(self, sizes: Sizes, kind: str, tokens: int):
        self.config, self.dtype = sizes.config, sizes.dtype
        self.tokens, self.ratio = tokens, KINDS[kind][1]
        self.entries = tokens // self.ratio if self.ratio else 0
        is_csa = kind == "CSA"
        self.chosen = min(self.config.index_topk, self.entries) if is_csa else 0

    def forward(self, queries, keys, values, sinks, selection, seed):
        del seed
        positions = jnp.arange(queries.shape[1], dtype=jnp.int32)[None]
        if values is None:
            return attend(queries, positions, keys, sinks)[0]
        last = jnp.arange(1, values.shape[1] + 1, dtype=jnp.int32) * self.ratio - 1
        entries = Entries(values, last[None])
        return attend(queries, positions, keys, sinks, entries, selection)[0]

    def backward(self, *operands):
        *floats, selection, seed = operands

        def loss(floats):
            queries, keys, values, sinks = floats
            out = self.forward(queries, keys, values, sinks, selection, seed)
            out = out.astype(jnp.float32)
            return jnp.sum(out * seed.astype(jnp.float32))

        return jax.grad(loss)(floats)

    def operands(self) -> tuple:
        """Queries, keys, entries, sinks, selection, and the output's gradient."""
        heads, dim = self.config.num_attention_heads, self.config.head_dim
        num_keys = self.tokens + self.config.sliding_window - 1
        queries = random(1, (1, self.tokens, heads, dim), self.dtype)
        keys = random(2, (1, num_keys, dim), self.dtype)
        values = None
        if self.entries:
            values = random(3, (1, self.entries, dim), self.dtype)
        sinks = random(4, (heads,), jnp.float32)
        selection = random_selection(self.tokens, self.entries, self.ratio, self.chosen)
        seed = random(5, queries.shape, self.dtype)
        return queries, keys, values, sinks, selection, seed

    def num_seen(self) -> int:
        """Keys and entries of all queries."""
        window, most = self.config.sliding_window, self.chosen or self.entries
        seen = sum(min(t + 1, window) for t in range(self.tokens))
        if self.entries:
            seen += sum(min((t + 1) // self.ratio, most) for t in range(self.tokens))
        return seen


def attention(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """Core attention over random entries; gradients of queries and keys."""
    for kind in KINDS:
        for tokens in sizes.lengths:
            core = CoreAttention(sizes, kind, tokens)
            for form in forms:
                for direction in PASSES:
                    yield attention_case(core, kind, direction, form)


def attention_case(core: CoreAttention, kind: str, direction: str, form: str) -> Case:
    index, config = PASSES.index(direction), core.config
    shapes = jax.eval_shape(core.operands)
    width = config.num_attention_heads * config.head_dim
    return Case(
        dict(kind=kind, tokens=core.tokens, pass_=direction, form=form),
        (core.forward, core.backward)[index],
        lambda kept: keep(kept, "data", core.operands),
        shapes,
        group=f"{kind} {core.tokens}",
        # Two products forward, five backward.
        flops=4 * width * core.num_seen() * (1, 3.5)[index],
        bytes=num_bytes(shapes[:3]) * (2, 5)[index],
        compare=f"{kind} {core.tokens} {direction}",
        form=form,
    )


def random_selection(tokens: int, entries: int, ratio: int, chosen: int):
    """Random entries among those that each query sees, as the indexer gives them."""
    if not chosen:
        return None

    @jax.jit
    def choose():
        scores = jax.random.normal(jax.random.key(6), (1, tokens, entries))
        seen = (jnp.arange(tokens)[:, None] + 1) // ratio > jnp.arange(entries)
        with use_kernels("gpu"):
            marks = highest(jnp.where(seen, scores, -jnp.inf), chosen) & seen
            return listed(marks, chosen)

    return choose()


class RoutedExperts:
    """The module of all experts, and random rows for random ones of them."""

    def __init__(self, sizes: Sizes):
        self.config, self.dtype = sizes.config, sizes.dtype
        self.arrays, self.module_of = built(self.make)

    def make(self) -> Experts:
        return make_experts(self.config, key=jax.random.key(0), dtype=self.dtype)

    def forward(self, arrays, x, chosen, weights):
        return self.module_of(arrays)(x, chosen, weights)

    def backward(self, arrays, x, chosen, weights):
        def loss(arrays, x):
            out = self.forward(arrays, x, chosen, weights)
            return jnp.sum(out * x.astype(jnp.float32))

        d_arrays, d_x = jax.grad(loss, (0, 1))(arrays, x)
        return d_x, d_arrays

    def routed(self, rows: int) -> tuple:
        """Rows, their experts, and the experts' weights."""
        slots = self.config.num_experts_per_tok
        x = random(1, (rows, self.config.hidden_size), self.dtype)
        scores = random(2, (rows, self.config.n_routed_experts), jnp.float32)
        chosen = lax.top_k(scores, slots)[1]
        return x, chosen, jnp.full((rows, slots), 1 / slots)

    def arguments(self, kept: dict, rows: int) -> tuple:
        weights = keep(kept, "module", lambda: made(self.make))
        return weights, *self.routed(rows)

    def grouped(self, kept: dict, rows: int) -> tuple:
        """What one grouped product takes: a row for each slot, matrices, counts."""
        module, x, chosen, _ = self.arguments(kept, rows)
        num = self.config.n_routed_experts
        counts = jnp.bincount(chosen.reshape(-1), length=num).astype(jnp.int32)
        return jnp.repeat(x, chosen.shape[1], axis=0), module.gate_up, counts

    def work(self, rows: int) -> tuple[float, float]:
        """Operations and bytes, forward."""
        config = self.config
        slots = rows * config.num_experts_per_tok
        flops = 6.0 * slots * config.hidden_size * config.moe_intermediate_size
        share = min(1.0, slots / config.n_routed_experts)
        return flops, share * num_bytes(self.arrays)


def experts(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """The routed experts: the module, and one grouped product."""
    routed = RoutedExperts(sizes)
    for rows in sizes.rows:
        for form in ("tpu", *forms):  # which is lax.ragged_dot_general
            for direction in PASSES:
                yield experts_case(routed, rows, direction, form)
        for label, function in grouped_products(forms).items():
            yield product_case(routed, rows, label, function)


def experts_case(routed: RoutedExperts, rows: int, direction: str, form: str) -> Case:
    index, (flops, moved) = PASSES.index(direction), routed.work(rows)
    label = "lax.ragged_dot" if form == "tpu" else form
    return Case(
        dict(what="experts", tokens=rows, pass_=direction, form=label),
        (routed.forward, routed.backward)[index],
        lambda kept: routed.arguments(kept, rows),
        (routed.arrays, *jax.eval_shape(lambda: routed.routed(rows))),
        flops=flops * (1, 3)[index],
        bytes=moved * (1, 3)[index],
        compare=f"experts {rows} {direction}",
        form=form,
    )


def product_case(
    routed: RoutedExperts, rows: int, label: str, function: Callable[..., Any]
) -> Case:
    config, (flops, moved) = routed.config, routed.work(rows)
    shape = (rows * config.num_experts_per_tok, config.hidden_size)
    counts = jax.ShapeDtypeStruct((config.n_routed_experts,), jnp.int32)
    return Case(
        dict(what="one product", tokens=rows, pass_="forward", form=label),
        function,
        lambda kept: routed.grouped(kept, rows),
        (jax.ShapeDtypeStruct(shape, routed.dtype), routed.arrays.gate_up, counts),
        flops=flops * 2 / 3,
        bytes=moved * 2 / 3,
        compare=f"product {rows}",
    )


def grouped_products(forms: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Rows through matrices [groups, 2, hidden, dim], by different hands."""

    def flat(matrices):
        return matrices.reshape(len(matrices), -1, matrices.shape[-1])

    def of_form(form):
        return lambda rows, matrices, counts: product(
            rows, flat(matrices), counts, form=FORMS[form]
        )

    def of_jax(rows, matrices, counts):
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

        return ragged_dot(
            rows,
            flat(matrices),
            group_sizes=counts,
            block_m=64,
            block_n=128,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=1,
            transpose_rhs=True,
        )

    if "hopper" not in forms:
        return {"lax.ragged_dot": of_form("tpu")}
    return {"jax's ragged_dot_mgpu": of_jax, "hopper": of_form("hopper")}


class IndexerAlone:
    """The indexer of a CSA layer, with its data."""

    def __init__(self, sizes: Sizes):
        self.config, self.dtype = sizes.config, sizes.dtype
        self.ratio = KINDS["CSA"][1]
        self.arrays, self.module_of = built(self.make)

    def make(self) -> Indexer:
        key = jax.random.key(0)
        return make_indexer(self.config, self.ratio, key=key, dtype=self.dtype)

    def select(self, arrays, x, latent, positions):
        selection = self.module_of(arrays)(x, latent, positions)
        return jnp.zeros(()) if selection is None else selection

    def data(self, tokens: int) -> tuple:
        x = random(1, (1, tokens, self.config.hidden_size), self.dtype)
        latent = random(2, (1, tokens, self.config.q_lora_rank), self.dtype)
        return x, latent, jnp.arange(tokens)[None]

    def arguments(self, kept: dict, tokens: int) -> tuple:
        return keep(kept, "module", lambda: made(self.make)), *self.data(tokens)

    def scores(self, tokens: int) -> jax.Array:
        return random(3, (1, tokens, tokens // self.ratio), jnp.float32)


def indexer(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """Scores and selection, and what finds the best of given scores."""
    alone = IndexerAlone(sizes)
    for tokens in sizes.lengths:
        for form in forms:
            yield indexer_case(alone, tokens, form)
        count = min(alone.config.index_topk, tokens // alone.ratio)
        for what, function in finders(count).items():
            yield finder_case(alone, tokens, what, function)


def indexer_case(alone: IndexerAlone, tokens: int, form: str) -> Case:
    data = jax.eval_shape(lambda: alone.data(tokens))
    return Case(
        dict(what="indexer", tokens=tokens, form=form),
        alone.select,
        lambda kept: alone.arguments(kept, tokens),
        (alone.arrays, *data),
        flops=indexer_flops(alone.config, tokens),
        bytes=num_bytes(data) + 4 * tokens * alone.config.index_topk,
        form=form,
    )


def finders(count: int) -> dict[str, Callable[..., Any]]:
    """Ways to find the `count` highest scores."""
    return {
        "top_k": lambda x: lax.top_k(x, count)[1],
        "threshold": lambda x: highest(x, count),
        "threshold, listed": lambda x: listed(highest(x, count), count),
    }


def finder_case(
    alone: IndexerAlone, tokens: int, what: str, function: Callable[..., Any]
) -> Case:
    shape = jax.eval_shape(lambda: alone.scores(tokens))
    return Case(
        dict(what=what, tokens=tokens, form=""),
        function,
        lambda kept: (alone.scores(tokens),),
        (shape,),
        bytes=num_bytes(shape),
        form="" if what.startswith("top_k") else "gpu",
    )
