"""The stack of layers: what repeats is found, and scanning it changes nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_eqx import Block, Config, Layers
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.stacked import repeating_unit
from tests.models import QUICKLY, random_model, random_tensors, small_config

RATIOS = {SLIDING: 0, CSA: 4, HCA: 16}


def stack_config(*kinds, hashed=0, **changes):
    """A configuration of layers of these kinds, without a prediction block."""
    return small_config(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        compress_ratios=tuple(RATIOS[kind] for kind in kinds),
        mlp_layer_types=(HASH_MOE,) * hashed + (TOPK_MOE,) * (len(kinds) - hashed),
        num_nextn_predict_layers=0,
        **changes,
    )


# One layer first, a pair twice, and a rest.
STACK = stack_config(HCA, SLIDING, CSA, SLIDING, CSA, HCA)


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("", (0, 0, 0)),
        ("a", (1, 0, 0)),
        ("abc", (3, 0, 0)),
        ("abca", (4, 0, 0)),
        ("aa", (0, 1, 2)),
        ("aaaa", (0, 1, 4)),
        ("ababab", (0, 2, 3)),
        ("abcabc", (0, 3, 2)),
        ("abababa", (0, 2, 3)),  # the rest begins a unit that does not end
        ("ssCHCHCHC", (2, 2, 3)),
        ("aabbbb", (2, 1, 4)),
        ("xaabaabaabyz", (1, 3, 3)),
        ("aabb", (0, 1, 2)),  # equally good: the earlier
        ("abbbabbb", (0, 4, 2)),
    ],
)
def test_repeating_unit_leaves_least_to_compile(kinds, expected):
    assert repeating_unit(list(kinds)) == expected
    assert repeating_unit(tuple(kinds)) == expected


@pytest.mark.parametrize(
    "config, expected", [(Config.flash(), (3, 2, 20)), (Config.pro(), (3, 2, 29))]
)
def test_repeating_unit_of_a_release_is_a_pair(config, expected):
    kinds = [config.layer_kind(layer) for layer in range(config.num_hidden_layers)]
    assert repeating_unit(kinds) == expected


def every_repetition(kinds):
    """Start, period and count of all that could be scanned, by trying them."""
    for start in range(len(kinds)):
        for period in range(1, len(kinds)):
            for repeats in range(2, len(kinds) // period + 1):
                end = start + period * repeats
                unit = kinds[start : start + period]
                if end <= len(kinds) and unit * repeats == kinds[start:end]:
                    yield start, period, repeats


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=14))
def test_repeating_unit_is_the_best_there_is(kinds):
    start, period, repeats = repeating_unit(kinds)
    candidates = list(every_repetition(kinds))
    if not candidates:
        assert (start, period, repeats) == (len(kinds), 0, 0)
        return
    assert (start, period, repeats) in candidates
    least = max(period * (repeats - 1) for _, period, repeats in candidates)
    assert period * (repeats - 1) == least
    # Deterministic: of equally good ones the earliest, then the shortest unit.
    ties = [c for c in candidates if c[1] * (c[2] - 1) == least]
    assert (start, period, repeats) == min(ties)


@pytest.mark.parametrize(
    "config, sections",
    [
        (STACK, (1, 2, 1, 2)),
        (stack_config(HCA, CSA, SLIDING), (3, 0, 0, 0)),
        (stack_config(CSA, HCA, CSA, HCA), (0, 2, 0, 2)),
        (stack_config(SLIDING, SLIDING, SLIDING, hashed=1), (1, 1, 0, 2)),
    ],
    ids=["all", "nothing repeats", "everything repeats", "hashed"],
)
def test_layers_are_numbered_through_all_sections(config, sections):
    tensors = random_tensors(config)
    layers = random_model(config).layers
    found = (len(layers.first), len(layers.repeated), len(layers.last))
    assert (*found, layers.num_repeats) == sections
    assert len(layers) == config.num_hidden_layers
    assert len(list(layers)) == len(layers)
    for number, block in enumerate(layers):
        sinks = tensors[f"layers.{number}.attn.attn_sink"]
        np.testing.assert_array_equal(block.attention.sinks, sinks)
        kind, ratio, mlp = config.layer_kind(number)
        assert (block.attention.indexer is not None) == (kind == CSA)
        compressor = block.attention.compressor
        assert (compressor is not None) == (kind != SLIDING)
        assert compressor is None or compressor.position_bias.shape[0] == ratio
        assert hasattr(block.moe.router, "table") == (mlp == HASH_MOE)


@pytest.mark.parametrize("layer", [-1, 6, 1000])
def test_layers_that_are_not_there_raise_an_index_error(layer):
    layers = random_model(STACK).layers
    with pytest.raises(IndexError, match=f"layer {layer} of 6"):
        layers[layer]


def test_tree_at_reaches_a_layer_of_its_own_and_says_what_to_call_in_a_stack():
    model = random_model(STACK)
    zeros = jnp.zeros_like(model.layers[0].attention.sinks)
    for layer in (0, 5):
        after = eqx.tree_at(lambda m: m.layers[layer].attention.sinks, model, zeros)
        assert not np.asarray(after.layers[layer].attention.sinks).any()
    with pytest.raises(ValueError, match=r"replace_layer\(model, 2, block\)"):
        eqx.tree_at(lambda m: m.layers[2].attention.sinks, model, zeros)


def test_a_tree_of_anything_in_the_models_shape_has_the_models_structure():
    model = random_model(STACK)
    labels = jax.tree.map(lambda x: "adam" if x.ndim < 2 else "muon", model)
    assert bool(labels.layers) and len(labels.layers) == 6
    assert labels.layers.num_repeats == 2
    assert labels.layers[0].attention.sinks == "adam"
    assert labels.layers[3].attention.query_down == "muon"  # of its stack
    for leaf in (True, None, 1.5):
        assert len(jax.tree.map(lambda x: leaf, model).layers) == 6
    paths = jax.tree_util.tree_map_with_path(lambda path, _: str(path), model)
    assert "'repeated'" in paths.layers[4].moe.experts.down


def test_labels_by_path_are_what_optax_takes():
    optax = pytest.importorskip("optax")
    floats = eqx.filter(random_model(STACK), eqx.is_inexact_array)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "still" if "experts" in str(path) else "moved", floats
    )
    transforms = {"still": optax.set_to_zero(), "moved": optax.scale(-1.0)}
    optimizer = optax.partition(transforms, lambda _: labels)
    ones = jax.tree.map(jnp.ones_like, floats)
    updates, _ = optimizer.update(ones, optimizer.init(floats), floats)
    assert not np.asarray(updates.layers.repeated[0].moe.experts.down).any()
    assert (np.asarray(updates.layers.last[0].moe.shared.down) == -1).all()


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_run_their_blocks_one_after_another(remat):
    layers = random_model(STACK).layers
    generator = np.random.default_rng(0)
    shape = (2, 37, STACK.hc_mult, STACK.hidden_size)
    streams = jnp.asarray(generator.normal(size=shape), jnp.float32)
    token_ids = jnp.asarray(generator.integers(0, 97, shape[:2]), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(37), shape[:2])
    expected = streams
    for block in layers:
        expected = _run(block, expected, token_ids, positions)
    found = _run(layers, streams, token_ids, positions, remat=remat)
    assert float(jnp.abs(expected - streams).max()) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def _call(module, streams, token_ids, positions, **options):
    return module(streams, token_ids, positions, **options)


_run = jax.jit(_call, static_argnames="remat", compiler_options=QUICKLY)


@pytest.mark.slow  # every array's random numbers are a program of their own
def test_layers_begin_with_weights_of_their_own():
    config = stack_config(SLIDING, SLIDING)
    key = jax.random.key(3)
    layers = Layers(config, key=key)
    assert layers.num_repeats == 2
    for number, block_key in enumerate(jax.random.split(key, 2)):
        alone = Block(config, number, key=block_key)
        for a, b in zip(jax.tree.leaves(layers[number]), jax.tree.leaves(alone)):
            np.testing.assert_array_equal(a, b)
    first, second = layers[0].attention, layers[1].attention
    assert (first.query_up != second.query_up).any()
