"""What `gpu.py` times of this library: each case is a program, its data and its work.

A case knows how to trace itself, so that all cases of a part compile side by side, and
how to make its arguments on the device, when it is its turn. Work is what the model
needs, whatever a program does beside it: floating-point operations, and bytes that must
move at least once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from dsv4_eqx import Block, Config, Experts, Indexer, flops_per_token
from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.hf_config import CSA, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.kernels.attend import attend
from dsv4_eqx.kernels.entries import Entries
from dsv4_eqx.kernels.form import FORMS, use_kernels
from dsv4_eqx.kernels.grouped_products import product
from dsv4_eqx.kernels.select import highest, listed

KINDS: Final = {"sliding": (SLIDING, 0), "CSA": (CSA, 4), "HCA": (HCA, 128)}
_STEPS: Final = 16  # decoding steps in a program


def name_of(columns: dict[str, Any]) -> str:
    """A case's name among those of its part."""
    return " ".join(map(str, columns.values()))


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    **Arguments:**

    - `columns`: what tells it from the other cases of its part.
    - `function`: what is timed, under jit.
    - `make`: makes the arguments from `kept`, a dictionary of what the cases of one
        `group` share.
    - `shapes`: of the arguments.
    - `group`: cases of one group stand together.
    - `flops`, `bytes`: the work of a call.
    - `divide`: how often a call does what is to be timed.
    - `compare`: results of cases with the same name here are compared.
    - `donated`: arguments that a call consumes; the results take their place.
    """

    columns: dict[str, Any]
    function: Callable[..., Any]
    make: Callable[[dict], tuple]
    shapes: tuple
    group: str = ""
    flops: float = 0
    bytes: float = 0
    divide: int = 1
    compare: str = ""
    donated: tuple[int, ...] = ()
    form: str = ""

    @property
    def name(self) -> str:
        return name_of(self.columns)

    def compile(self) -> jax.stages.Compiled:
        function = jax.jit(self.function, donate_argnums=self.donated)
        if not self.form:
            return function.lower(*self.shapes).compile()
        with use_kernels(self.form):
            return function.lower(*self.shapes).compile()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes are measured; `tiny` rehearses everything anywhere."""

    config: Config
    dtype: Any
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]

    @classmethod
    def flash(cls) -> "Sizes":
        return cls(
            Config.flash(),
            jnp.bfloat16,
            lengths=(4096, 16384),
            rows=(512, 4096, 32768),
            contexts=(8192, 131072),
            batches=(1, 32),
        )

    @classmethod
    def tiny(cls) -> "Sizes":
        config = dataclasses.replace(
            check_config(),
            hidden_size=256,
            moe_intermediate_size=128,
            q_lora_rank=128,
        )
        return cls(
            config,
            jnp.bfloat16,
            lengths=(300,),
            rows=(64,),
            contexts=(512,),
            batches=(1, 2),
        )


def check_config() -> Config:
    """As narrow as may be, with the heads and widths that the kernels ask for."""
    return dataclasses.replace(
        Config.flash(),
        vocab_size=256,
        hidden_size=512,
        moe_intermediate_size=256,
        q_lora_rank=256,
        o_lora_rank=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        index_topk=64,
        initializer_range=0.1,  # logits that matter
    )


def one_layer(config: Config, kind: str, layers: int = 1) -> Config:
    """Of one layer of a kind, routed by score."""
    layer_type, ratio = KINDS[kind]
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        layer_types=(layer_type,) * layers,
        compress_ratios=(ratio,) * layers,
        mlp_layer_types=(TOPK_MOE,) * layers,
        num_nextn_predict_layers=0,
        max_position_embeddings=1048576,
    )


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def random(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return _normal(jax.random.key(seed), shape, dtype)


# Keys are arguments: XLA would compute what a constant one gives while it compiles.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def built(make: Callable[[], Any]) -> tuple[Any, Any]:
    """Shapes of a module's arrays, and what makes it of arrays of these shapes."""
    arrays, rest = eqx.partition(eqx.filter_eval_shape(make), _is_array)
    return arrays, lambda arrays: eqx.combine(arrays, rest)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def made(make: Callable[[], Any]) -> Any:
    """A module's arrays, in their place without a copy."""
    return jax.jit(lambda: eqx.filter(make(), eqx.is_array))()


def _keep(kept: dict, name: str, make: Callable[[], Any]) -> Any:
    if name not in kept:
        kept[name] = jax.block_until_ready(make())
    return kept[name]


def layer_flops(config: Config, kind: str, tokens: int) -> tuple[float, float]:
    """Operations of a layer over a sequence, forward, and forward + backward.

    The backward pass takes twice the forward one's products; the indexer has none.
    """
    one, two = (
        flops_per_token(one_layer(config, kind, layers), tokens) for layers in (1, 2)
    )
    forward = (two - one) * tokens
    indexer = indexer_flops(config, tokens) if kind == "CSA" else 0
    return forward, 3 * forward - 2 * indexer


def indexer_flops(config: Config, tokens: int) -> float:
    """Operations of the indexer over a sequence; 0 where it has nothing to choose."""
    ratio = KINDS["CSA"][1]
    if tokens // ratio <= config.index_topk:
        return 0
    heads, width = config.index_n_heads, config.index_head_dim
    seen = sum((t + 1) // ratio for t in range(tokens)) / tokens
    sums = heads * (width * config.q_lora_rank + config.hidden_size)
    sums += 2 * width * (2 * config.hidden_size + 1) + heads * (width + 1) * seen
    return 2 * sums * tokens


def layers(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """One layer of each kind, forward and forward + backward."""
    for kind in KINDS:
        config = one_layer(sizes.config, kind)

        def make_block(config=config):
            return Block(config, 0, key=jax.random.key(0), dtype=sizes.dtype)

        arrays, block_of = built(make_block)

        def forward(arrays, streams, ids, positions, seed, block_of=block_of):
            del seed
            return block_of(arrays)(streams, ids, positions)

        def backward(arrays, streams, ids, positions, seed, forward=forward):
            def loss(floats, streams):
                merged = eqx.combine(floats, rest)
                out = forward(merged, streams, ids, positions, seed)
                return jnp.sum(out.astype(jnp.float32) * seed.astype(jnp.float32))

            floats, rest = eqx.partition(arrays, eqx.is_inexact_array)
            d_floats, d_streams = jax.grad(loss, (0, 1))(floats, streams)
            return d_streams, d_floats

        for tokens in sizes.lengths:
            shape = (1, tokens, config.hc_mult, config.hidden_size)

            def data(kept, tokens=tokens, shape=shape, config=config):
                def sequence():
                    ids = jnp.arange(tokens)[None] % config.vocab_size
                    streams = random(1, shape, sizes.dtype)
                    seed = random(2, shape, sizes.dtype)
                    return streams, ids, jnp.arange(tokens)[None], seed

                for name in [n for n in kept if n.startswith("sequence")]:
                    if name != f"sequence {tokens}":
                        del kept[name]
                return _keep(kept, f"sequence {tokens}", sequence)

            def arguments(kept, data=data, make_block=make_block):
                return _keep(kept, "block", lambda: made(make_block)), *data(kept)

            integers = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
            activations = jax.ShapeDtypeStruct(shape, sizes.dtype)
            shapes = (arrays, activations, integers, integers, activations)
            flops = layer_flops(sizes.config, kind, tokens)
            moved = num_bytes(arrays), num_bytes(activations)
            for form in forms:
                for index, direction in enumerate(("forward", "forward + backward")):
                    yield Case(
                        dict(kind=kind, tokens=tokens, pass_=direction, form=form),
                        (forward, backward)[index],
                        arguments,
                        shapes,
                        group=kind,
                        flops=flops[index],
                        # Weights are read in each pass, and their gradients written.
                        bytes=(1, 3)[index] * moved[0] + (2, 4)[index] * moved[1],
                        compare=f"{kind} {tokens} {direction}",
                        form=form,
                    )


def attention(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """Core attention alone, over random entries; gradients of queries and keys."""
    config = sizes.config
    heads, dim, window = (
        config.num_attention_heads,
        config.head_dim,
        config.sliding_window,
    )
    for kind, (_, ratio) in KINDS.items():
        for tokens in sizes.lengths:
            entries = tokens // ratio if ratio else 0
            chosen = min(config.index_topk, entries) if kind == "CSA" else 0

            def forward(queries, keys, values, sinks, selection, seed, ratio=ratio):
                del seed
                positions = jnp.arange(queries.shape[1], dtype=jnp.int32)[None]
                if values is None:
                    return attend(queries, positions, keys, sinks)
                last = (jnp.arange(values.shape[1], dtype=jnp.int32) + 1) * ratio - 1
                return attend(
                    queries, positions, keys, sinks, Entries(values, last[None]),
                    selection,
                )  # fmt: skip

            def backward(*operands, forward=forward):
                *floats, selection, seed = operands

                def loss(floats):
                    out = forward(*floats, selection, seed).astype(jnp.float32)
                    return jnp.sum(out * seed.astype(jnp.float32))

                return jax.grad(loss)(floats)

            def data(tokens=tokens, entries=entries, chosen=chosen, ratio=ratio):
                queries = random(1, (1, tokens, heads, dim), sizes.dtype)
                keys = random(2, (1, tokens + window - 1, dim), sizes.dtype)
                values = random(3, (1, entries, dim), sizes.dtype) if entries else None
                sinks = random(4, (heads,), jnp.float32)
                selection = random_selection(tokens, entries, ratio, chosen)
                seed = random(5, queries.shape, sizes.dtype)
                return queries, keys, values, sinks, selection, seed

            def arguments(kept, data=data):
                return _keep(kept, "data", data)

            seen = sum(min(t + 1, window) for t in range(tokens))
            if entries:
                most = chosen or entries
                seen += sum(min((t + 1) // ratio, most) for t in range(tokens))
            shapes = jax.eval_shape(data)
            moved = num_bytes(shapes[:3])
            for form in forms:
                for index, direction in enumerate(("forward", "forward + backward")):
                    yield Case(
                        dict(kind=kind, tokens=tokens, pass_=direction, form=form),
                        (forward, backward)[index],
                        arguments,
                        shapes,
                        group=f"{kind} {tokens}",
                        # Two products forward, five backward.
                        flops=4 * heads * dim * seen * (1, 3.5)[index],
                        bytes=moved * (2, 5)[index],
                        compare=f"{kind} {tokens} {direction}",
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


def experts(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """The routed experts alone: the module, and one grouped product."""
    config = sizes.config
    num, slots, dim = (
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.hidden_size,
    )
    hidden = config.moe_intermediate_size

    def make_module():
        return Experts(config, key=jax.random.key(0), dtype=sizes.dtype)

    arrays, module_of = built(make_module)

    def forward(arrays, x, chosen, weights):
        return module_of(arrays)(x, chosen, weights)

    def backward(arrays, x, chosen, weights):
        def loss(arrays, x):
            out = forward(arrays, x, chosen, weights)
            return jnp.sum(out * x.astype(jnp.float32))

        d_arrays, d_x = jax.grad(loss, (0, 1))(arrays, x)
        return d_x, d_arrays

    for rows in sizes.rows:

        def data(rows=rows):
            x = random(1, (rows, dim), sizes.dtype)
            scores = random(2, (rows, num), jnp.float32)
            chosen = lax.top_k(scores, slots)[1]
            return x, chosen, jnp.full((rows, slots), 1 / slots)

        def arguments(kept, data=data):
            return _keep(kept, "module", lambda: made(make_module)), *data()

        def sorted_rows(kept, rows=rows, arguments=arguments):
            module, x, chosen, _ = arguments(kept)
            sizes_ = jnp.bincount(chosen.reshape(-1), length=num).astype(jnp.int32)
            return jnp.repeat(x, slots, axis=0), module.gate_up, sizes_

        shapes = (arrays, *jax.eval_shape(data))
        flops = 6.0 * rows * slots * dim * hidden
        moved = min(1.0, rows * slots / num) * num_bytes(arrays)
        for form in ("tpu", *forms):  # which is lax.ragged_dot_general
            label = "lax.ragged_dot" if form == "tpu" else form
            for index, direction in enumerate(("forward", "forward + backward")):
                yield Case(
                    dict(what="experts", tokens=rows, pass_=direction, form=label),
                    (forward, backward)[index],
                    arguments,
                    shapes,
                    flops=flops * (1, 3)[index],
                    bytes=moved * (1, 3)[index],
                    compare=f"experts {rows} {direction}",
                    form=form,
                )
        repeated = jax.ShapeDtypeStruct((rows * slots, dim), sizes.dtype)
        counts = jax.ShapeDtypeStruct((num,), jnp.int32)
        for label, function in grouped_products(forms).items():
            yield Case(
                dict(what="one product", tokens=rows, pass_="forward", form=label),
                function,
                sorted_rows,
                (repeated, arrays.gate_up, counts),
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


def indexer(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """Scores and selection, and what finds the best of given scores."""
    config = sizes.config
    ratio, topk = KINDS["CSA"][1], config.index_topk

    def make_module():
        attention = Attention(
            config, CSA, ratio, key=jax.random.key(0), dtype=sizes.dtype
        )
        return attention.indexer

    arrays, module_of = built(make_module)

    def select(arrays, x, latent, positions):
        module: Indexer = module_of(arrays)
        selection = module(x, latent, positions)
        return jnp.zeros(()) if selection is None else selection

    for tokens in sizes.lengths:
        count = min(topk, tokens // ratio)

        def data(tokens=tokens):
            x = random(1, (1, tokens, config.hidden_size), sizes.dtype)
            latent = random(2, (1, tokens, config.q_lora_rank), sizes.dtype)
            return x, latent, jnp.arange(tokens)[None]

        def arguments(kept, data=data):
            return _keep(kept, "module", lambda: made(make_module)), *data()

        def scores(tokens=tokens):
            return random(3, (1, tokens, tokens // ratio), jnp.float32)

        for form in forms:
            yield Case(
                dict(what="indexer", tokens=tokens, form=form),
                select,
                arguments,
                (arrays, *jax.eval_shape(data)),
                flops=indexer_flops(config, tokens),
                bytes=num_bytes(jax.eval_shape(data)) + 4 * tokens * topk,
                form=form,
            )
        finders = {
            "top_k, stable": lambda x, k=count: lax.top_k(x, k)[1],
            "top_k": lambda x, k=count: lax.top_k(x, k, is_stable=False)[1],
            "threshold": lambda x, k=count: highest(x, k),
            "threshold, listed": lambda x, k=count: listed(highest(x, k), k),
        }
        for what, function in finders.items():
            yield Case(
                dict(what=what, tokens=tokens, form=""),
                function,
                lambda kept, scores=scores: (scores(),),
                (jax.eval_shape(scores),),
                bytes=num_bytes(jax.eval_shape(scores)),
                form="" if what.startswith("top_k") else "gpu",
            )


def decoding(sizes: Sizes, forms: tuple[str, ...]) -> Iterator[Case]:
    """A token for each row, after a context: several steps in one program."""
    for kind in KINDS:
        config = one_layer(sizes.config, kind)

        def make_block(config=config):
            return Block(config, 0, key=jax.random.key(0), dtype=sizes.dtype)

        arrays, block_of = built(make_block)

        def steps(arrays, cache, streams, start, block_of=block_of):
            block, ones = block_of(arrays), jnp.ones_like(start)
            ids = jnp.zeros(streams.shape[:2], jnp.int32)

            def step(i, state):
                streams, cache = state
                # A token a step, again and again the ones after the same context.
                out, cache = block.extend(streams, ids, cache, start + i, ones)
                return out, cache.keep(ones, 1)

            streams, cache = lax.fori_loop(0, _STEPS, step, (streams, cache))
            return streams, cache

        for context in sizes.contexts:
            for batch in sizes.batches:
                capacity = context + _STEPS
                shape = (batch, 1, config.hc_mult, config.hidden_size)

                def empty(batch=batch, capacity=capacity, make_block=make_block):
                    attention = make_block().attention
                    return attention.init_cache(batch, capacity, sizes.dtype)

                cache = eqx.filter_eval_shape(empty)

                def data(cache=cache, batch=batch, context=context, shape=shape):
                    leaves, structure = jax.tree.flatten(cache)
                    leaves = [random(i, x.shape, x.dtype) for i, x in enumerate(leaves)]
                    filled = jax.tree.unflatten(structure, leaves)
                    start = jnp.full(batch, context, jnp.int32)
                    return filled, random(99, shape, sizes.dtype), start

                def arguments(kept, data=data, make_block=make_block):
                    return _keep(kept, "block", lambda: made(make_block)), *data()

                shapes = (arrays, *jax.eval_shape(data))
                moved = step_bytes(config, kind, arrays, cache, batch)
                for form in forms:
                    yield Case(
                        dict(kind=kind, context=context, rows=batch, form=form),
                        steps,
                        arguments,
                        shapes,
                        group=kind,
                        bytes=moved,
                        divide=_STEPS,
                        donated=(1,),
                        compare=f"{kind} {context} {batch}",
                        form=form,
                    )


def step_bytes(config: Config, kind: str, arrays: Any, cache: Any, batch: int) -> float:
    """What a step has to read: weights of the experts it needs, and of the cache."""
    routed = num_bytes(arrays.moe.experts)
    # As many different experts as random choices hit.
    missed = 1 - config.num_experts_per_tok / config.n_routed_experts
    share = 1 - missed**batch
    read = num_bytes(arrays) - routed + share * routed
    read += num_bytes(cache.window_keys)
    if kind == "HCA":
        read += num_bytes(cache.compressor.entries)
    if kind == "CSA":
        entries = cache.compressor.entries
        chosen = min(1.0, config.index_topk / entries.shape[1])
        read += chosen * num_bytes(entries) + num_bytes(cache.indexer.entries)
    return read


PARTS: Final = dict(
    layers=layers,
    attention=attention,
    experts=experts,
    indexer=indexer,
    decoding=decoding,
)
