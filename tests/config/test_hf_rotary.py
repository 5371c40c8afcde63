"""Rotary values of a `config.json`: read in every form, refused if they disagree."""

import pytest

from dsv4_eqx import Config
from tests.config.raw import RAW, nested, refused, yarn

# The type checker of the test run would answer before ours does.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

FLAT = RAW["rope_scaling"]


def flat(**changes):
    return {"rope_scaling": None, "rope_parameters": FLAT | changes}


TWICE = {
    "flat base": (
        flat(rope_theta=12345),
        ("compress_rope_theta is 160000", "12345 by"),
    ),
    "flat fraction": (flat(partial_rotary_factor=0.25), ("head_dim is 64", "0.25")),
    "flat fractions": (
        flat(partial_rotary_factor=0.25) | {"partial_rotary_factor": 0.5},
        ("is 64 by", "and 32 by partial_rotary_factor=0.25 in rope_parameters"),
    ),
    "main": (
        nested({"rope_theta": 5e5}),
        ("rope_theta is 10000 by", "500000 by rope_parameters['main']"),
    ),
    "compress": (
        nested({}, rope_theta=5e5),
        ("compress_rope_theta is 160000", "500000 by rope_parameters['compress']"),
    ),
    "fraction": (
        nested({"partial_rotary_factor": 0.25}) | {"partial_rotary_factor": 0.5},
        ("is 64 by", "and 32 by partial_rotary_factor=0.25 in rope_parameters['main']"),
    ),
    "fractions": (
        nested({"partial_rotary_factor": 0.5}, partial_rotary_factor=0.25),
        ("is 64 by", "and 32 by partial_rotary_factor=0.25 in rope_parameters['comp"),
    ),
    "scaling base": (
        yarn(rope_theta=10000),
        ("compress_rope_theta is 160000", "10000 by rope_scaling"),
    ),
    "scaling fraction": (yarn(partial_rotary_factor=0.25), ("_dim is 64", "0.25")),
    "scaling and nested": (
        nested({}) | yarn(rope_theta=5e5),
        ("compress_rope_theta is 160000", "500000 by rope_scaling"),
    ),
    "types": (yarn(rope_type="yarn", type="default"), ("rope_scaling", "'default'")),
    "half a position": (
        yarn(original_max_position_embeddings=64.5),
        ("original_max_position_embeddings=64.5", "an integer"),
    ),
    "temperature": (yarn(attention_factor=True), ("attention_factor=True", "1 or")),
    "base": (yarn(rope_theta="a"), ("rope_theta='a'", "number")),
}


@pytest.mark.parametrize("case", TWICE)
def test_rotary_values_that_contradict_each_other_are_refused(case):
    changes, parts = TWICE[case]
    refused(parts, changes)


@pytest.mark.parametrize("changes", [flat(rope_theta=16e4), yarn(rope_theta=16e4)])
def test_a_base_that_transformers_does_not_read_is_refused_alone(changes):
    refused(
        ("compress_rope_theta=None", "160000"),
        changes,
        without=("compress_rope_theta",),
    )


@pytest.mark.parametrize(
    "changes",
    [
        flat(),
        flat(rope_theta=160000, partial_rotary_factor=0.5),
        yarn(rope_theta=160000, partial_rotary_factor=0.5, attention_factor=1),
        yarn(rope_type="yarn"),
        nested({"rope_theta": 10000.0}),
        nested({"partial_rotary_factor": 0.5}, partial_rotary_factor=0.5),
    ],
)
def test_rotary_values_that_agree_are_read(changes):
    assert Config.from_hf(RAW | changes) == Config.from_hf(RAW)


def test_nested_bases_alone_are_read():
    changes = nested({"rope_theta": 5e5}, rope_theta=7e5)["rope_parameters"]
    alone = dict.fromkeys(("rope_theta", "compress_rope_theta", "rope_scaling"))
    config = Config.from_hf(RAW | alone | {"rope_parameters": changes})
    assert (config.rope_theta, config.compress_rope_theta) == (5e5, 7e5)
    assert config.rope_scaling == Config.from_hf(RAW).rope_scaling


BAD = {
    "rope type": ({"rope_scaling": {"type": "linear"}}, ("'linear'", "yarn")),
    "rope no mapping": ({"rope_scaling": [16]}, ("rope_scaling", "[16]")),
    "rope lacks": ({"rope_scaling": {"type": "yarn", "factor": 2}}, ("original_max",)),
    "rope factor": (yarn(factor="16"), ("factor", "'16'")),
    "rope beta": (yarn(beta_fast=0), ("beta_fast", "0")),
    "rope length": (yarn(original_max_position_embeddings=True), ("True",)),
    "rope temperature": (yarn(attention_factor=1.277), ("attention_factor", "1.277")),
    "rope unknown": (yarn(short_factor=1.0), ("rope_scaling", "['short_factor']")),
    "rope mscale": (yarn(mscale=0.707), ("mscale=0.707", "1 or left out")),
    "rope softmax": (yarn(mscale_all_dim=0.5), ("mscale_all_dim=0.5", "1 or left out")),
    "rope ramp": (yarn(truncate=False), ("truncate=False", "True or left out")),
    "rope untyped": (yarn(type="default"), ("rope_scaling", "'default'", "yarn")),
    "rope twice": (nested({}, factor=8), ("rope_scaling", "factor=8.0", "factor=16.0")),
    "rope main": (
        nested(RAW["rope_scaling"]),
        ("['main']", "without a"),
    ),
    "rope half": ({"rope_parameters": {"main": {}}}, ("rope_parameters", "'compress'")),
    "rotary twice": (
        {"partial_rotary_factor": 0.25},
        ("qk_rope_head_dim is 64", "and 32 by partial_rotary_factor=0.25"),
    ),
    "rotary part": ({"partial_rotary_factor": 0.3}, ("factor=0.3", "head_dim=128")),
    "rope theta": ({"rope_theta": "a"}, ("rope_theta", "'a'")),
}


@pytest.mark.parametrize("case", BAD)
def test_rotary_values_that_are_none_are_refused(case):
    changes, parts = BAD[case]
    refused(parts, changes)


@pytest.mark.parametrize("head_dim", [20, 49, 98, 100, 512])
def test_from_hf_reads_the_rotary_size_as_a_fraction(head_dim):
    for rotary in range(2, head_dim + 1, 2):
        raw = RAW | {"head_dim": head_dim, "partial_rotary_factor": rotary / head_dim}
        raw |= {"qk_rope_head_dim": None, "index_head_dim": 512}
        assert Config.from_hf(raw).qk_rope_head_dim == rotary
