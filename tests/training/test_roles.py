"""Which array is optimized how, and which of its dimensions are a matrix."""

import functools
import math
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float

import dsv4_eqx as dsv4
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.training.roles import DIMENSION_ROLES, Kind, leaf_roles
from tests.models import T

# Of an array that is not stacked: number of matrices, rows and columns. The compressor
# of the lightly compressed layers has two series.
MATRICES = {
    "connection.weight": (1, 24, 240),
    "head.weight": (1, 4, 240),
    "attention.query_down": (1, 22, 60),
    "attention.query_up": (6, 20, 22),
    "attention.key_value": (1, 20, 60),
    "output_down.weight": (3, 14, 40),
    "attention.output_up": (1, 60, 42),
    "attention.compressor.value": (None, 20, 60),
    "attention.compressor.gate": (None, 20, 60),
    "indexer.query_up": (16, 12, 22),
    "indexer.head_weights": (1, 16, 60),
    "indexer.compressor.value": (2, 12, 60),
    "indexer.compressor.gate": (2, 12, 60),
    "router.weight": (1, 7, 60),
    "experts.gate_up": (14, 28, 60),
    "experts.down": (7, 60, 28),
    "shared.gate_up": (2, 28, 60),
    "shared.down": (1, 60, 28),
    "mtp[0].embedding_in": (1, 60, 60),
    "mtp[0].streams_in": (1, 60, 60),
}


def floats(model):
    """All that could be trained."""
    is_float = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), model)
    return eqx.filter(model, is_float)


@functools.cache
def flash():
    model = abstract_model(dsv4.Config.flash(), jnp.bfloat16)
    return eqx.filter(model, dsv4.trainable(model))


def test_every_dimension_of_the_glossary_has_a_role():
    of_tables = {"hashed_vocab", "slots"}  # of integers, which are not trained
    assert DIMENSION_ROLES.keys() == dsv4.DIMENSIONS.keys() - of_tables


def test_heads_groups_experts_halves_and_layers_have_matrices_of_their_own():
    found = set()
    for role in leaf_roles("test", floats(abstract_model(T, jnp.float32))):
        if role.kind != Kind.MUON:
            continue
        (name,) = [name for name in MATRICES if role.name.endswith(name)]
        count, rows, columns = MATRICES[name]
        count = role.shape[-3] if count is None else count
        layers = role.shape[0] if ".repeated" in role.name else 1
        assert role.matrices == (layers * count, rows, columns), role
        assert math.prod(role.matrices) == math.prod(role.shape)
        found.add(name)
    assert found == MATRICES.keys()


def test_the_rest_is_for_adamw():
    roles = leaf_roles("test", floats(abstract_model(T, jnp.float32)))
    decayed = {role.name for role in roles if role.kind == Kind.DECAYED}
    assert decayed == {".embedding", ".unembedding"}
    others = {role.name for role in roles if role.kind == Kind.NOT_DECAYED}
    endings = {name.rpartition(".")[2] for name in others}
    assert endings == {"weight", "base", "scale", "sinks", "position_bias", "bias"}
    weights = {name for name in others if name.endswith(".weight")}
    assert all(name.endswith("norm.weight") for name in weights)


@pytest.mark.parametrize("make", [dsv4.Config.tiny, dsv4.Config.flash, lambda: T])
def test_what_is_decayed_is_what_the_mask_says(make):
    trained = floats(abstract_model(make(), jnp.bfloat16))
    decayed = [x.kind != Kind.NOT_DECAYED for x in leaf_roles("test", trained)]
    assert decayed == jax.tree.leaves(dsv4.decay_mask(trained))


def test_flash_has_the_matrices_that_its_sizes_give():
    found = Counter()
    for role in leaf_roles("test", flash()):
        if role.kind == Kind.MUON:
            count, *sides = role.matrices
            found[tuple(sides)] += count
    # 43 layers: two slide, 21 are lightly and 20 heavily compressed.
    assert found == {
        (2048, 4096): 43 * 2 * (256 + 1),  # experts, gate and up
        (4096, 2048): 43 * (256 + 1),  # experts, down
        (256, 4096): 43,  # routers
        (1024, 4096): 43 + 43 * 8,  # queries down, groups' outputs down
        (512, 1024): 43 * 64,  # queries up
        (512, 4096): 43 + 2 * (21 * 2 + 20),  # keys and values, and compressors
        (4096, 8192): 43,  # outputs up
        (24, 16384): 2 * 43,  # hyper-connections
        (4, 16384): 1,  # the last one
    }


def test_table_has_a_line_for_each_array_and_the_sums():
    lines = dsv4.describe_optimizer(flash()).splitlines()
    leaves = jax.tree.leaves(flash())
    assert len(lines) == len(leaves) + 3
    words = [line.split("  ") for line in lines]
    table = {name: [x.strip() for x in rest if x.strip()] for name, *rest in words}
    assert table[".embedding"] == ["129280 x 4096", "AdamW, decayed"]
    name = ".layers.repeated[1].attention.query_up"
    muon = "Muon, decayed, 1,280 matrices of 512 x 1024"
    assert table[name] == ["20 x 64 x 512 x 1024", muon]
    name = ".layers.repeated[1].attention.sinks"
    assert table[name] == ["20 x 64", "AdamW, not decayed"]
    assert table[".head.weight"][1] == "Muon, decayed, 1 matrix of 4 x 16384"
    assert table[".norm.weight"][1] == "AdamW, not decayed"
    sums = [int(line.split()[-2].replace(",", "")) for line in lines[-3:]]
    assert sum(sums) == sum(map(math.prod, (x.shape for x in leaves)))
    assert "AdamW, decayed: 1,059,061,760 parameters" in lines[-3:]


class Adapter(eqx.Module):
    down: Float[Array, "lora_rank dim"]
    gain: Float[Array, " lora_rank"]


class Bare(eqx.Module):
    weight: Array


def adapted():
    """A part with dimensions and arrays that the table does not know."""
    adapter = Adapter(jnp.ones((3, 5)), jnp.ones(3))
    return {"norm": dsv4.RMSNorm(5), "lora": adapter, "bare": Bare(jnp.ones((3, 5)))}


@pytest.mark.parametrize(
    "part, message",
    [
        ("lora", r"\.down has the dimensions 'lora_rank dim', and 'lora_rank' .*own="),
        ("bare", r"\.weight has no shape annotation; .*own=\{'bare.weight'"),
    ],
)
def test_unknown_arrays_are_refused_by_name(part, message):
    with pytest.raises(ValueError, match=f"describe_optimizer: .*{part}.*{message}"):
        dsv4.describe_optimizer({part: adapted()[part]})


def test_what_is_not_trained_is_refused():
    model = abstract_model(T, jnp.float32)
    with pytest.raises(ValueError, match=r"router\.table is int32, .*trainable\(model"):
        dsv4.describe_optimizer(model)


def test_unknown_arrays_may_have_a_transformation_of_their_own():
    table = dsv4.describe_optimizer(adapted(), own={"lora": None, "bare.weight": None})
    kinds = [line.rpartition("  ")[2] for line in table.splitlines()[:4]]
    # In the order of the keys: a dict's are sorted.
    assert kinds == ["own bare.weight", "own lora", "own lora", "AdamW, not decayed"]


@pytest.mark.parametrize(
    "own, message",
    [
        ({"lora": None, "bare": None, "shared.down": None}, "key 'shared.down'"),
        ({"lor": None, "bare": None}, "key 'lor'"),
        ({"": None}, "key ''"),
        ({"lora": None, "down": None, "bare": None}, r"\['lora', 'down'\]"),
        ([("lora", None)], r"must be a mapping"),
        ({3: None}, r"must be a mapping"),
    ],
)
def test_keys_for_nothing_or_for_the_same_are_refused(
    own, message, without_shape_checks
):
    with pytest.raises(ValueError, match=f"describe_optimizer.*{message}"):
        dsv4.describe_optimizer(adapted(), own=own)
