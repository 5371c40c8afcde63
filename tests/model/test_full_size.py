"""Flash and Pro at their full sizes, without a single number in them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from dsv4_eqx import Config
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.model.model import abstract_model, count_params

CONFIGS = {"flash": Config.flash(), "pro": Config.pro()}
both = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def released(name):
    return abstract_model(CONFIGS[name], jnp.bfloat16)


@functools.cache
def official_shapes(name):
    """Shape of every tensor; none may be named twice."""
    shapes = {}
    for source, _ in sources(released(name), official=True):
        for tensor in source.names.flat:
            assert tensor not in shapes, tensor
            shapes[tensor] = source.tensor_shape
    return shapes


@both
def test_parameters_are_as_many_as_in_the_release(name):
    main, mtp = {
        "flash": (284332240471, 6610048891),
        "pro": (1572997201763, 25840145979),
    }[name]
    assert released(name).num_params() == main
    assert count_params(released(name).mtp) == mtp


@both
def test_layers_are_scanned_in_pairs(name):
    layers = released(name).layers
    sections = tuple(map(len, (layers.first, layers.repeated, layers.last)))
    # Flash: sliding, sliding and a hashed CSA; Pro: two HCA and a CSA, all hashed.
    expected = {"flash": ((3, 2, 0), 20, 43), "pro": ((3, 2, 0), 29, 61)}[name]
    assert (sections, layers.num_repeats, len(layers)) == expected


@both
def test_tensors_are_as_many_as_in_the_release(name):
    # The release's counts less the `.scale` tensors: 69,187 - 34,167 of Flash.
    count, mtp, scales = {
        "flash": (35020, 1575, 34167),
        "pro": (73164, 2343, 71952),
    }[name]
    shapes = official_shapes(name)
    assert len(shapes) == count
    experts = [tensor for tensor in shapes if ".ffn.experts." in tensor]
    config = CONFIGS[name]
    blocks = config.num_hidden_layers + 1
    assert len(experts) == 3 * config.n_routed_experts * blocks
    in_mtp = [tensor for tensor in shapes if tensor.startswith("mtp.0.")]
    quantised = 3 * config.n_routed_experts + 3 + 5 + 2
    assert len(in_mtp) == mtp - quantised
    sparse = config.compress_ratios.count(4)
    assert blocks * (quantised - 2) + 2 + sparse == scales


@both
@pytest.mark.parametrize("layer, kind", [(2, "csa"), (3, "hca"), (-1, "csa")])
def test_tensor_shapes_are_those_of_the_release(name, layer, kind):
    dim, heads, rank, groups, hidden, experts = {
        "flash": (4096, 64, 1024, 8, 2048, 256),
        "pro": (7168, 128, 1536, 16, 3072, 384),
    }[name]
    entry, ratio = {"csa": (1024, 4), "hca": (512, 128)}[kind]
    expected = {
        "attn_norm.weight": (dim,),
        "attn.attn_sink": (heads,),
        "attn.wq_a.weight": (rank, dim),
        "attn.wq_b.weight": (heads * 512, rank),
        "attn.wkv.weight": (512, dim),
        "attn.wo_a.weight": (groups * 1024, 4096),
        "attn.wo_b.weight": (dim, groups * 1024),
        "attn.compressor.ape": (ratio, entry),
        "attn.compressor.wkv.weight": (entry, dim),
        "attn.compressor.norm.weight": (512,),
        "hc_attn_fn": (24, 4 * dim),
        "hc_ffn_base": (24,),
        "hc_ffn_scale": (3,),
        "ffn.gate.weight": (experts, dim),
        "ffn.shared_experts.w1.weight": (hidden, dim),
        "ffn.shared_experts.w2.weight": (dim, hidden),
        f"ffn.experts.{experts - 1}.w3.weight": (hidden, dim),
        f"ffn.experts.{experts - 1}.w2.weight": (dim, hidden),
    }
    if kind == "csa":
        expected |= {
            "attn.indexer.wq_b.weight": (8192, rank),
            "attn.indexer.weights_proj.weight": (64, dim),
            "attn.indexer.compressor.ape": (4, 256),
            "attn.indexer.compressor.wgate.weight": (256, dim),
            "attn.indexer.compressor.norm.weight": (128,),
        }
    shapes = official_shapes(name)
    layer %= CONFIGS[name].num_hidden_layers
    found = {tensor: shapes[f"layers.{layer}.{tensor}"] for tensor in expected}
    assert found == expected
    assert (f"layers.{layer}.attn.indexer.wq_b.weight" in shapes) == (kind == "csa")
    hashed, scored = f"layers.{layer}.ffn.gate.tid2eid", f"layers.{layer}.ffn.gate.bias"
    assert shapes.get(hashed) == ((129280, 6) if layer < 3 else None)
    assert shapes.get(scored) == (None if layer < 3 else (experts,))


@both
def test_tensor_shapes_outside_the_layers_are_those_of_the_release(name):
    dim = CONFIGS[name].hidden_size
    shapes = official_shapes(name)
    outside = {k: v for k, v in shapes.items() if not k.startswith(("layers.", "mtp."))}
    assert outside == {
        "embed.weight": (129280, dim),
        "head.weight": (129280, dim),
        "norm.weight": (dim,),
        "hc_head_fn": (4, 4 * dim),
        "hc_head_base": (4,),
        "hc_head_scale": (1,),
    }
    assert shapes["mtp.0.e_proj.weight"] == shapes["mtp.0.h_proj.weight"] == (dim, dim)
    assert "mtp.0.attn.compressor.ape" not in shapes
    assert shapes["mtp.0.ffn.gate.bias"] == (CONFIGS[name].n_routed_experts,)


@both
def test_first_layers_kind_is_that_of_the_release(name):
    shapes = official_shapes(name)
    for layer in (0, 1):
        compressor = shapes.get(f"layers.{layer}.attn.compressor.ape")
        assert compressor == {"flash": None, "pro": (128, 512)}[name]


@both
def test_a_cache_takes_the_bytes_that_decoding_needs(name):
    # The entries of a token; the rest of the released code's state; all there may be.
    a_token, states, most = {
        "flash": (6880, 12.2e6, 7.3e9),
        "pro": (9848, 18.7e6, 10.4e9),
    }[name]
    config, tokens = CONFIGS[name], 2**20

    def num_bytes(capacity):
        model = released(name)
        cache = eqx.filter_eval_shape(lambda x: x.init_cache(1, capacity), model)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    total = num_bytes(tokens)
    assert total - num_bytes(tokens // 2) == a_token * tokens // 2
    windows = config.num_hidden_layers * config.sliding_window * config.head_dim * 2
    assert 0 < total - a_token * tokens <= windows + states
    assert total <= most
