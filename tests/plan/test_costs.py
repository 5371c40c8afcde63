"""Costs from a configuration against the arrays of a model and loops over positions."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from dsv4_eqx import Block, Config, flops_per_token
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.tiny import tiny_config

CONFIGS = {
    "every kind": tiny_config(),
    "no prediction block": tiny_config(num_nextn_predict_layers=0),
    "other sizes": tiny_config(
        num_hidden_layers=3,
        layer_types=(HCA, CSA, CSA),
        compress_ratios=(7, 3, 5),
        mlp_layer_types=(TOPK_MOE, HASH_MOE, TOPK_MOE),
        num_experts_per_tok=7,
        hc_mult=3,
        sliding_window=1,
        index_topk=1,
    ),
    "tiny": Config.tiny(),
}
FULL = {"flash": Config.flash(), "pro": Config.pro()}


def leaves(tree):
    """Path and array of every leaf."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in found]


def used_params(config):
    """Elements of the main model's arrays, of routed experts only those that run."""
    total = 0
    for path, leaf in leaves(abstract_model(config, jnp.bfloat16)):
        if path.startswith("mtp.") or path.endswith(".table"):
            continue
        is_routed = ".moe.experts." in path
        share = (config.num_experts_per_tok, config.n_routed_experts)
        total += leaf.size * share[0] // share[1] if is_routed else leaf.size
    return total


def attention_sums(shapes, config, kind, ratio, seq):
    """Multiply-adds of a layer's attention over a sequence, counted key by key."""
    total = 0
    windows = seq // ratio if ratio else 0
    is_scored = kind == CSA and windows > config.index_topk
    heads, head_dim, _ = shapes["attention.query_up"]
    for query in range(seq):
        keys = sum(query - key < config.sliding_window for key in range(query + 1))
        visible = sum((w + 1) * ratio - 1 <= query for w in range(windows))
        chosen = min(visible, config.index_topk) if kind == CSA else visible
        total += 2 * heads * head_dim * (keys + chosen)  # logits, then weighted values
        if is_scored:
            index_heads, index_dim, _ = shapes["attention.indexer.query_up"]
            total += visible * (index_heads * index_dim + index_heads)
    for path, shape in shapes.items():
        is_idle = "indexer" in path and not is_scored
        if path.endswith("compressor.value") and not is_idle:
            total += windows * ratio * math.prod(shape[:2])  # the pooling
    return total


def matrix_sums(shapes, config, kind, ratio, seq):
    """Multiply-adds of a layer's products with its matrices over a sequence."""
    total = 0
    windows = seq // ratio if ratio else 0
    for path, shape in shapes.items():
        if len(shape) < 2 or path.endswith(("position_bias", "table")):
            continue
        if "indexer" in path and windows <= config.index_topk:
            continue
        tokens = windows * ratio if "compressor" in path else seq
        size = math.prod(shape)
        if path.startswith("moe.experts."):
            size = size // shape[0] * config.num_experts_per_tok
        total += tokens * size
    return total


def mixing_sums(shapes, seq):
    """Multiply-adds of reading and writing the streams over a sequence."""
    total = 0
    for site in ("attention_connection", "moe_connection"):
        _, streams, dim = shapes[f"{site}.weight"]
        read, write, mix = streams * dim, streams * dim, streams * streams * dim
        total += seq * (read + write + mix)
    return total


@functools.cache
def shapes_of(config):
    """Shapes of each layer's arrays, and multiply-adds outside of the layers."""
    model = abstract_model(config, jnp.float32)
    outside = model.unembedding.size + model.head.weight.size
    outside += math.prod(model.head.weight.shape[1:])
    blocks = (
        eqx.filter_eval_shape(Block, config, layer, key=jax.random.key(0))
        for layer in range(config.num_hidden_layers)
    )
    return [{path: x.shape for path, x in leaves(block)} for block in blocks], outside


def counted_flops(config, seq):
    layers, outside = shapes_of(config)
    total = seq * outside
    for layer, shapes in enumerate(layers):
        kind, ratio, _ = config.layer_kind(layer)
        total += attention_sums(shapes, config, kind, ratio, seq)
        total += matrix_sums(shapes, config, kind, ratio, seq)
        total += mixing_sums(shapes, seq)
    return 2 * total / seq


# 24 is the first with more entries than index_topk in T.
@pytest.mark.parametrize("seq", [1, 2, 3, 4, 7, 8, 9, 10, 16, 23, 24, 31, 41, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_counted_one_by_one(name, seq):
    expected = counted_flops(CONFIGS[name], seq)
    assert flops_per_token(CONFIGS[name], seq) == pytest.approx(expected, rel=1e-13)


def test_flops_of_one_token_are_twice_the_params_it_multiplies():
    flash = FULL["flash"]
    matrices = used_params(flash) - flash.vocab_size * flash.hidden_size
    # One token fills no window: compressors and indexers, 0.4e9 parameters, rest.
    assert 0.95 * 2 * matrices < flops_per_token(flash, 1) < 2 * matrices


def test_flops_at_a_million_tokens_do_not_grow_with_the_square():
    for config in FULL.values():
        short, long = flops_per_token(config, 2**16), flops_per_token(config, 2**20)
        assert short < long < 3 * short


@pytest.mark.parametrize("seq", [0, -1, True, 2.0, math.nan, "8", None])
def test_flops_of_lengths_that_are_none_are_refused(seq):
    # Users run without jaxtyping's checks, which would answer before ours do.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"flops_per_token\(seq=.*at least 1"):
            flops_per_token(tiny_config(), seq)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
