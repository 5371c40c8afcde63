"""Whether every form of the kernels computes the same: the part `correctness`.

Small layers, of sizes that all kernels take, are compared with the plain form in
float32 at the highest precision on the same device: output and gradients, each group of
weights by its norm. The weights are such as bfloat16 has. A rounded score would choose
other experts or entries, and then nothing could be compared: experts are looked up by
token, and entries are all selected or chosen beforehand. How often choices agree is
told apart. The nano release comes with the logits of DeepSeek's own code.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import KINDS, Case, built, check_config, one_layer, random
from gpu_child import begin_compiling, emit, end_if_fatal, error_text, wanted
from gpu_operations import random_selection

from dsv4_eqx import Attention, Block, Config, from_pretrained
from dsv4_eqx.config.kinds import HASH_MOE, TOPK_MOE
from dsv4_eqx.kernels.entries import is_index
from dsv4_eqx.model.parts import make_attention, make_router

NANO: Final = pathlib.Path(__file__).parent.parent / "tests" / "data" / "nano-release"
# Gradients that are told together, by how their path begins; the first that fits.
GROUPS: Final = {
    "streams": (".x",),
    "connections": (".attention_connection", ".moe_connection"),
    "norms": (".attention_norm", ".moe_norm", ".query_norm", ".key_value_norm"),
    "queries": (".query",),
    "keys": (".key_value",),
    "sinks": (".sinks",),
    "output": (".output",),
    "compressor": (".compressor",),
    "router": (".moe.router",),
    "experts": (".moe.experts",),
    "shared": (".moe.shared",),
}
DTYPES: Final = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_COMPILING: Final = 150  # seconds that all programs have to compile


class Both(eqx.Module):
    """What is differentiated: the arrays of a module, and its input."""

    module: Any
    x: jax.Array


def precisely(function: Callable[..., Any], dtype: str) -> Callable[..., Any]:
    """The same with products of float32 that are float32's, if that is the dtype."""

    def precise(*operands: Any) -> Any:
        precision = "highest" if dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            return function(*operands)

    return precise


def with_gradients(call: Callable[..., Any], module_of: Callable) -> Callable[..., Any]:
    """Output and gradients from arrays, input, the output's gradient and the rest."""

    def function(arrays: Any, x: jax.Array, seed: jax.Array, *rest: Any) -> Any:
        floats, others = eqx.partition(arrays, eqx.is_inexact_array)

        def loss(both: Both) -> tuple[jax.Array, jax.Array]:
            out = call(module_of(eqx.combine(both.module, others)), both.x, *rest)
            return jnp.sum(out.astype(jnp.float32) * seed), out

        gradients, out = jax.grad(loss, has_aux=True)(Both(floats, x))
        return out, gradients

    return function


def shapes_of_module(make: Callable[..., Any], dtype: Any) -> tuple[Any, Callable]:
    return built(lambda: make(jax.random.key(0), dtype))


def weights(make: Callable[..., Any], name: str, dtype: str, kept: dict) -> Any:
    """A module's arrays with random numbers everywhere, such as bfloat16 has."""
    half = shapes_of_module(make, jnp.bfloat16)[0]

    def draw(key: jax.Array) -> Any:
        arrays = eqx.filter(make(key, jnp.float32), eqx.is_array)
        places, structure = jax.tree_util.tree_flatten_with_path(arrays)
        leaves = []
        for path, leaf in places:
            if leaf.ndim == 1 or jax.tree_util.keystr(path).endswith("position_bias"):
                key, own = jax.random.split(key)
                leaf += 0.2 * jax.random.normal(own, leaf.shape, leaf.dtype)
            leaves.append(leaf)
        arrays = jax.tree.unflatten(structure, leaves)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), arrays, half)

    if name not in kept:
        kept[name] = jax.jit(draw)(jax.random.key(len(name)))
    wide = shapes_of_module(make, DTYPES[dtype])[0]
    return jax.tree.map(lambda x, like: x.astype(like.dtype), kept[name], wide)


def data(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    """An input, and a float32 gradient of the output; bfloat16's numbers both."""
    x, seed = (random(i, shape, jnp.bfloat16) for i in range(2))
    return x.astype(DTYPES[dtype]), seed.astype(jnp.float32)


def in_forms(
    columns: dict[str, Any],
    function: Callable[..., Any],
    make: Callable[[str, dict], tuple],
    variants: list[tuple[str, str]],
) -> Iterator[Case]:
    """A case for each dtype and form; the first is the reference of the others."""
    for dtype, form in [("float32", "cpu"), *variants]:
        yield Case(
            columns | dict(dtype=dtype, form=form),
            precisely(function, dtype),
            lambda kept, dtype=dtype: make(dtype, kept),
            jax.eval_shape(lambda dtype=dtype: make(dtype, {})),
            group=" ".join(map(str, columns.values())),
            form=form,
        )


def layers(config: Config, tokens: int, forms: tuple[str, ...]) -> Iterator[Case]:
    """A layer of each kind; experts by token, all visible entries selected."""
    variants = [(dtype, form) for dtype in DTYPES for form in forms]
    config = dataclasses.replace(config, index_topk=tokens)
    for kind in KINDS:
        own = dataclasses.replace(one_layer(config, kind), mlp_layer_types=(HASH_MOE,))

        def make_block(key, dtype, own=own):
            return Block(own, 0, key=key, dtype=dtype)

        def make(dtype, kept, kind=kind, own=own, make_block=make_block):
            shape = (1, tokens, own.hc_mult, own.hidden_size)
            positions = jnp.arange(tokens)[None]
            ids = positions * 7 % own.vocab_size
            arrays = weights(make_block, f"layer {kind}", dtype, kept)
            return arrays, *data(shape, dtype), ids, positions

        module_of = shapes_of_module(make_block, jnp.float32)[1]
        columns = dict(what="layer", kind=kind, tokens=tokens)
        function = with_gradients(lambda block, *rest: block(*rest), module_of)
        yield from in_forms(columns, function, make, variants)


def attention_of(config: Config, kind: str) -> Callable[..., Attention]:
    return lambda key, dtype: make_attention(config, *KINDS[kind], key=key, dtype=dtype)


def attend_chosen(module: Attention, x: jax.Array, selection: Any) -> jax.Array:
    """Attention whose entries somebody has selected."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    keys = module.project_keys(x, positions)
    keys = jnp.pad(keys, ((0, 0), (module.window - 1, 0), (0, 0)))
    entries = None if module.compressor is None else module.compressor(x)
    latent = module.project_latent(x)
    return module.attend(latent, positions, keys, entries, selection)


def extended(module: Attention, x: jax.Array) -> jax.Array:
    """The last three tokens after the others, as when a draft is verified."""
    seq, last = x.shape[1], 3
    cache = module.init_cache(1, seq, x.dtype)
    none, before = jnp.zeros(1, jnp.int32), jnp.full(1, seq - last, jnp.int32)
    _, cache = module.extend(x[:, :-last], cache, none, before)
    cache = cache.keep(before)
    return module.extend(x[:, -last:], cache, before, none + last)[0]


def attention(config: Config, tokens: int, forms: tuple[str, ...]) -> Iterator[Case]:
    """Attention of each kind with entries chosen beforehand, and from a cache."""
    half = [("bfloat16", form) for form in forms]
    wide = [("float32", form) for form in forms[:1]]
    for kind, (_, ratio) in KINDS.items():
        own = one_layer(config, kind)
        all_own = dataclasses.replace(own, index_topk=tokens)
        shape = (1, tokens, config.hidden_size)
        chosen = config.index_topk if kind == "CSA" else 0

        def make(dtype, kept, kind=kind, own=own, chosen=chosen, ratio=ratio):
            module = weights(attention_of(own, kind), f"attention {kind}", dtype, kept)
            entries = tokens // (ratio or 1)
            selection = random_selection(tokens, entries, ratio, chosen)
            return module, *data(shape, dtype), selection

        def make_all(dtype, kept, kind=kind, own=all_own):
            module = weights(attention_of(own, kind), f"extended {kind}", dtype, kept)
            return module, data(shape, dtype)[0]

        module_of = shapes_of_module(attention_of(own, kind), jnp.float32)[1]
        columns = dict(what="attention", kind=kind, tokens=tokens)
        function = with_gradients(attend_chosen, module_of)
        yield from in_forms(columns, function, make, wide + half)
        module_of = shapes_of_module(attention_of(all_own, kind), jnp.float32)[1]

        def extend(arrays, x, module_of=module_of):
            return extended(module_of(arrays), x), None

        yield from in_forms(columns | dict(what="cache"), extend, make_all, half)


def choices(config: Config, tokens: int, forms: tuple[str, ...]) -> Iterator[Case]:
    """What indexer and router choose, as marks."""
    variants = [(dtype, form) for dtype in DTYPES for form in forms]
    own = one_layer(config, "CSA")

    def make_indexer(key, dtype):
        return attention_of(own, "CSA")(key, dtype).indexer

    def make_own_router(key, dtype):
        return make_router(own, TOPK_MOE, key=key, dtype=dtype)

    def of_indexer(arrays, x, latent, positions):
        selection = indexer_of(arrays)(x, latent, positions)
        return marks(selection, tokens // KINDS["CSA"][1])

    def of_router(arrays, x):
        routing = router_of(arrays)(x[0], jnp.zeros(tokens, jnp.int32))
        return marks(routing.experts[None], own.n_routed_experts)

    def make(dtype, kept):
        x = data((1, tokens, own.hidden_size), dtype)[0]
        latent = data((1, tokens, own.q_lora_rank), dtype)[0]
        arrays = weights(make_indexer, "indexer", dtype, kept)
        return arrays, x, latent, jnp.arange(tokens)[None]

    def make_routing(dtype, kept):
        x = data((1, tokens, own.hidden_size), dtype)[0]
        return weights(make_own_router, "router", dtype, kept), x

    indexer_of = shapes_of_module(make_indexer, jnp.float32)[1]
    router_of = shapes_of_module(make_own_router, jnp.float32)[1]
    columns = dict(what="indexer's choice", kind="CSA", tokens=tokens)
    yield from in_forms(columns, of_indexer, make, variants)
    columns = dict(what="router's choice", kind="", tokens=tokens)
    yield from in_forms(columns, of_router, make_routing, variants[-1:])


def marks(selection: jax.Array, num: int) -> jax.Array:
    """A selection as marks of the `num` that there are."""
    if not is_index(selection):
        return selection
    return jnp.any(jax.nn.one_hot(selection, num, dtype=bool), axis=-2)


def nano_release(forms: tuple[str, ...]) -> Iterator[Case]:
    """The model of every kind of layer in the released format, in float32."""
    arrays, rest = eqx.partition(from_pretrained(NANO, dtype=jnp.float32), eqx.is_array)
    ids = official()["tokens"]

    def call(arrays, ids):
        return eqx.combine(arrays, rest).multi_token_logits(ids)

    for form in forms:
        yield Case(
            dict(what="nano release", kind="all", tokens=ids.size, dtype="float32")
            | dict(form=form),
            precisely(call, "float32"),
            lambda kept: (arrays, ids),
            jax.eval_shape(lambda: (arrays, ids)),
            group="nano",
            form=form,
        )


def official() -> dict[str, np.ndarray]:
    """Tokens of the nano release and what DeepSeek's own code gives for them."""
    raw = (NANO / "expected.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, about in json.loads(raw[8:begin]).items():
        first, last = (begin + offset for offset in about["data_offsets"])
        dtype = dict(F32=np.float32, I32=np.int32)[about["dtype"]]
        found[name] = np.frombuffer(raw[first:last], dtype).reshape(about["shape"])
    return found


@jax.jit
def _distance(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum((x - y) ** 2), jnp.sum(y**2)


def relative(found: list[Any], expected: list[Any]) -> float:
    """Distance between arrays over the size of the second ones."""
    pairs = [_distance(x, y) for x, y in zip(found, expected, strict=True)]
    distance, size = (float(sum(part)) for part in zip(*pairs))
    return (distance / size) ** 0.5 if size else distance**0.5


def grouped(gradients: Any) -> dict[str, list[Any]]:
    """The gradients by group; the indexer has none."""
    groups: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path).removeprefix(".module")
        if name.startswith(".attention."):
            name = name.removeprefix(".attention")
        for group, beginnings in GROUPS.items():
            if name.startswith(beginnings):
                groups.setdefault(group, []).append(leaf)
                break
    return groups


def errors(case: Case, found: Any, expected: Any) -> dict[str, Any]:
    """The columns that say how near a result is."""
    if case.group == "nano":
        names = zip(found, ("logits", "mtp_logits"))
        return {
            f"{name}, at most": float(np.abs(np.asarray(x) - official()[name]).max())
            for x, name in names
        }
    if not isinstance(found, tuple):
        return dict(alike=float(jnp.sum(found & expected) / jnp.sum(expected)))
    row = dict(forward=relative([found[0]], [expected[0]]))
    groups, wanted_groups = grouped(found[1]), grouped(expected[1])
    return row | {
        name: relative(groups[name], wanted_groups[name])
        for name in GROUPS
        if name in groups
    }


def run_checks(cases: list[Case], args: argparse.Namespace) -> None:
    """Runs each group's reference, then compares what is wanted of the group."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    asked: list[Case] = []
    for own in groups.values():
        first = 0 if own[0].group == "nano" else 1  # which has its reference elsewhere
        chosen = [case for case in own[first:] if wanted(case.columns, args)]
        asked += own[:first] * bool(chosen) + chosen
    deadline = time.monotonic() + _COMPILING
    programs = begin_compiling(asked)
    kept: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for case in asked:
        emit(begin=case.name)
        try:
            late = max(deadline - time.monotonic(), 0)
            program, compile_seconds = programs.pop(case.name).result(timeout=late)
            found = jax.block_until_ready(program(*case.make(kept)))
            if case.group != "nano" and case.group not in expected:
                expected[case.group] = found
                continue
            row = errors(case, found, expected.get(case.group))
            row["compile_s"] = compile_seconds
        except TimeoutError:
            row = dict(error="not compiled in time")
        except Exception as error:
            row = dict(error=error_text(error))
        emit(case=case.name, **case.columns, **row)
        end_if_fatal(row.get("error", ""))


def tiny_config() -> Config:
    """For a rehearsal on a CPU, narrower than the kernels take."""
    small = dict(hidden_size=64, moe_intermediate_size=32, q_lora_rank=32)
    small |= dict(num_attention_heads=8, head_dim=64, qk_rope_head_dim=32)
    small |= dict(index_n_heads=16, index_head_dim=32, hc_sinkhorn_iters=3)
    return dataclasses.replace(check_config(), **small)


def correctness(args: argparse.Namespace) -> None:
    """Every form against the reference."""
    config = check_config()
    short, long = 333, 1200
    if args.tiny:
        config, short, long = tiny_config(), 150, 300
    cases = [
        *layers(config, short, args.forms),
        *attention(config, long, args.forms),
        *choices(config, long, args.forms),
        *nano_release(args.forms[:1]),
    ]
    run_checks(cases, args)
