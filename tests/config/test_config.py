"""`Config`: the released values, and every bad field."""

import dataclasses
import itertools
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import Config, YarnScaling
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.tiny import tiny_config

# The type checker of the test run would answer before ours does.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


def test_flash_has_the_released_values():
    flash = Config.flash()
    assert (flash.num_hidden_layers, flash.hidden_size) == (43, 4096)
    kinds = [flash.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)]
    assert kinds == [2, 21, 20] and flash.layer_types[2:4] == (CSA, HCA)
    assert flash.mlp_layer_types == (HASH_MOE,) * 3 + (TOPK_MOE,) * 40
    assert flash.rope_scaling == YarnScaling(16.0, 65536, 32.0, 1.0)
    assert flash.layer_kind(43) == (SLIDING, 0, TOPK_MOE)


def test_pro_has_the_released_values():
    pro = Config.pro()
    assert (pro.num_hidden_layers, pro.hidden_size, pro.index_topk) == (61, 7168, 1024)
    assert [pro.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)] == [0, 30, 31]
    assert (pro.num_attention_heads, pro.q_lora_rank, pro.o_groups) == (128, 1536, 16)
    assert (pro.n_routed_experts, pro.moe_intermediate_size) == (384, 3072)
    assert pro.routed_scaling_factor == 2.5 and pro.swiglu_limit == 10.0
    assert pro.layer_types[:4] == (HCA, HCA, CSA, HCA)


def test_tiny_has_every_kind_and_divides_by_eight():
    tiny = Config.tiny()
    assert set(tiny.layer_types) == {SLIDING, CSA, HCA}
    assert set(tiny.mlp_layer_types) == {HASH_MOE, TOPK_MOE}
    sizes = (tiny.num_attention_heads, tiny.o_groups, tiny.n_routed_experts)
    assert all(size % 8 == 0 for size in (*sizes, tiny.vocab_size))


def test_configs_are_hashable_frozen_and_compare_by_value():
    assert hash(Config.flash()) == hash(Config.flash())
    assert len({Config.flash(), Config.flash(), Config.pro()}) == 2
    listed = tiny_config(layer_types=list(tiny_config().layer_types))
    assert hash(listed) == hash(tiny_config()) and listed == tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.tiny().hidden_size = 3


MAY_BE_ZERO = ("num_nextn_predict_layers",)
INTS = [f.name for f in dataclasses.fields(Config) if f.type is int]
FLOATS = [f.name for f in dataclasses.fields(Config) if f.type is float]
# Of 0, an expert is silent; a base of 1 does not rotate.
ABOVE_ZERO = ("swiglu_limit", "routed_scaling_factor")
ABOVE_ONE = ("rope_theta", "compress_rope_theta")


def test_fields_of_integers_refuse_what_is_none():
    values = [-1, 2**31, 10**30, True, 2.0, math.nan, "8", None, np.float64(2)]
    assert len(INTS) > 15
    for name, value in itertools.product(INTS, values):
        match = re.escape(f"Config({name}={value!r}): must be an integer in [")
        with pytest.raises(ValueError, match=match):
            tiny_config(**{name: value})


def test_fields_of_integers_refuse_zero_where_it_means_nothing():
    for name in set(INTS) - set(MAY_BE_ZERO):
        with pytest.raises(ValueError, match=rf"\({name}=0\).*\[1, 2147483647\]"):
            tiny_config(**{name: 0})
    assert tiny_config(num_nextn_predict_layers=0).num_nextn_predict_layers == 0


def test_fields_of_floats_refuse_what_float32_does_not_hold():
    values = [-1.0, math.nan, math.inf, True, "1", None, 10**400, np.float64(1e39)]
    assert len(FLOATS) > 5
    for name, value in itertools.product(FLOATS, values):
        with pytest.raises(ValueError, match=rf"Config\({name}=.*: must be a number"):
            tiny_config(**{name: value})


def test_fields_of_floats_have_their_own_bounds():
    for name, bound in [*((n, 0) for n in ABOVE_ZERO), *((n, 1) for n in ABOVE_ONE)]:
        for value in (bound, bound / 2):
            with pytest.raises(ValueError, match=f"{name}=.*, above {bound}"):
                tiny_config(**{name: value})
    for name in set(FLOATS) - {*ABOVE_ZERO, *ABOVE_ONE}:
        assert getattr(tiny_config(**{name: 0}), name) == 0


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.array, jnp.array])
def test_numbers_of_numpy_and_jax_are_kept_as_pythons(kind):
    plain = tiny_config(eos_token_id=(1, 7), bos_token_id=2)
    given = {name: kind(getattr(plain, name)) for name in INTS}
    given |= {name: np.float64(getattr(plain, name)) for name in FLOATS}
    given |= {"compress_ratios": [kind(ratio) for ratio in plain.compress_ratios]}
    given |= {"eos_token_id": [kind(1), kind(7)], "bos_token_id": kind(2)}
    config = tiny_config(**given)
    assert config == plain and hash(config) == hash(plain)
    assert config.to_hf() == json.loads(json.dumps(config.to_hf()))
    for field in dataclasses.fields(Config):
        found, wanted = (getattr(c, field.name) for c in (config, plain))
        assert type(found) is type(wanted), field.name
    assert tiny_config(compress_ratios=np.array(plain.compress_ratios)) == tiny_config()


@pytest.mark.parametrize("value", [-1, 97, True, 1.0, "1", [1, 97], [[1]], {1: 2}])
def test_token_ids_that_are_none_are_refused(value):
    for name in ("bos_token_id", "eos_token_id"):
        match = re.escape(f"Config({name}={value!r}): must be a token id in [0, 97)")
        with pytest.raises(ValueError, match=match):
            tiny_config(**{name: value})


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"o_groups": 4}, ("num_attention_heads=6", "multiple of", "o_groups=4")),
        ({"qk_rope_head_dim": 7}, ("qk_rope_head_dim=7", "multiple of 2")),
        ({"qk_rope_head_dim": 22}, ("qk_rope_head_dim=22", "at most", "head_dim=20")),
        ({"index_head_dim": 6}, ("qk_rope_head_dim=8", "at most", "index_head_dim=6")),
        ({"num_experts_per_tok": 8}, ("=8", "at most", "n_routed_experts=7")),
        ({"num_hidden_layers": 5}, ("has 6 layers", "num_hidden_layers is 5")),
        ({"compress_ratios": (0, 16, 4)}, ("compress_ratios has 3 layers", "is 6")),
        ({"mlp_layer_types": ()}, ("mlp_layer_types has 0 layers", "is 6")),
        ({"layer_types": ("full",) * 6}, ("layer_types[0]", SLIDING, CSA, HCA)),
        ({"mlp_layer_types": ("dense",) * 6}, ("[0]", "'dense'", HASH_MOE, TOPK_MOE)),
        ({"compress_ratios": (0, 16, 4, 0, 4, 4)}, ("compress_ratios[3] is 0", HCA)),
        ({"compress_ratios": (4, 16, 4, 16, 4, 4)}, ("ratios[0] is 4", SLIDING)),
        ({"compress_ratios": (0, -4, 4, 16, 4, 4)}, ("compress_ratios[1] is -4",)),
        ({"compress_ratios": (0, True, 4, 16, 4, 4)}, ("compress_ratios[1] is True",)),
        ({"compress_ratios": (0, 16.0, 4, 16, 4, 4)}, ("compress_ratios[1] is 16.0",)),
        ({"compress_ratios": 4}, ("compress_ratios", "4")),
        ({"layer_types": None}, ("layer_types", "None")),
        ({"rope_scaling": {"factor": 16}}, ("rope_scaling",)),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_each_other_are_refused(changes, parts):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("layer", [-1, 7])
def test_layer_kind_refuses_layers_that_are_not_there(layer):
    with pytest.raises(ValueError, match=rf"layer={layer}\): .* 0 to 6"):
        tiny_config().layer_kind(layer)
