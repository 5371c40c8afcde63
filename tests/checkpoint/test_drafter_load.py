"""The drafter of a checkpoint: every tensor by name, all or none."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.drafter_load import abstract_drafter
from dsv4_eqx.checkpoint.faults import FaultyCheckpoint
from dsv4_eqx.checkpoint.names import drafter_sources
from dsv4_eqx.model.model import count_params
from tests.config.raw import RELEASES
from tests.drafters import CONFIG, SIZES, drafter_tensors, write_drafter
from tests.official import BFLOAT16, QUANTISED, meanings
from tests.sharded import assert_same_bits

TENSORS = drafter_tensors()
EMBEDDING = {"embed.weight": np.zeros((102, 150), BFLOAT16)}


@pytest.mark.filterwarnings("ignore:Config.from_hf")
@pytest.mark.parametrize(
    "name, counts, num_bytes, params",
    [
        ("Flash-0731", (1568, 1565, 1572), 10_862_838_300, 19.846e9),
        ("Flash-DSpark", (1568, 1565, 1572), 10_862_838_300, 19.846e9),
        ("Pro-0813", (2336, 2333, 2340), 41_979_375_900, 77.498e9),
        ("Pro-DSpark", (2336, 2333, 2340), 41_979_375_900, 77.498e9),
    ],
)
def test_the_tensors_of_a_release_are_those_of_its_inventory(
    name, counts, num_bytes, params
):
    """Names and bytes, from shapes alone."""
    raw = RELEASES[name]
    sizes = dsv4.DSparkConfig.from_hf(raw)
    drafter = abstract_drafter(dsv4.Config.from_hf(raw), sizes, jnp.bfloat16)
    found, total = {}, 0
    for source, leaf in drafter_sources(drafter):
        *_, rows, columns = (1, *source.tensor_shape)
        size = math.prod(source.tensor_shape)
        per_tensor, scales = size * leaf.dtype.itemsize, 0
        if "norm.weight" in source.path:  # float32 here alone
            per_tensor = 2 * size
        elif ".moe.experts." in source.path:
            per_tensor, scales = size // 2, rows * columns // 32
        elif source.path.endswith((*QUANTISED, "main_in")):
            per_tensor, scales = size, -(-rows // 128) * -(-columns // 128)
        for tensor in source.names.flat:
            assert tensor not in found
            found[tensor] = 2 if scales else 1
            total += per_tensor + scales
    for stage, count in enumerate(counts):
        of_stage = [n for t, n in found.items() if t.startswith(f"mtp.{stage}.")]
        assert sum(of_stage) == count
    assert sum(counts) == sum(found.values())
    assert total == num_bytes
    assert math.isclose(count_params(drafter), params, rel_tol=5e-5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("drafter")
    write_drafter(directory, TENSORS | EMBEDDING)
    return directory, dsv4.load_dspark(directory)


def test_every_weight_is_where_its_name_says(loaded):
    _, drafter = loaded
    weights, used = meanings(TENSORS), set()
    for source, leaf in drafter_sources(drafter):
        assert leaf.dtype in (jnp.bfloat16, jnp.float32)
        parts = np.asarray(leaf).reshape(*source.names.shape, *source.part_shape)
        for index in np.ndindex(source.names.shape):
            name = str(source.names[index])
            expected = weights[name].astype(leaf.dtype).reshape(source.part_shape)
            np.testing.assert_array_equal(parts[index], expected, err_msg=name)
            used.add(name)
    assert used == weights.keys()
    assert drafter.config == CONFIG.__class__(
        **vars(CONFIG) | {"num_nextn_predict_layers": 1}
    )
    assert drafter.sizes == SIZES
    # In the order of the layers that it reads.
    joined = weights["mtp.0.main_proj.weight"].astype(BFLOAT16)
    dim = CONFIG.hidden_size
    np.testing.assert_array_equal(drafter.main_in[:, 1], joined[:, dim:])


def test_quantised_weights_may_stay_and_mean_the_same(loaded):
    directory, drafter = loaded
    packed = dsv4.load_dspark(directory, keep_quantized=True)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(d)) for d in (packed, drafter)]
    assert sizes[0] < 0.7 * sizes[1]
    means = jnp.asarray(
        np.random.default_rng(1).normal(size=(2, 4, 2, 150)), "bfloat16"
    )
    keys = [
        jax.jit(lambda d: d.read(means, d.init_context(2, "bfloat16")).keys)(d)
        for d in (packed, drafter)
    ]
    np.testing.assert_array_equal(*keys)


def test_a_dtype_is_that_which_is_asked_for(loaded):
    directory, drafter = loaded
    wide = dsv4.load_dspark(directory, dtype="float32")
    narrow = jax.tree.map(lambda x, y: x.astype(y.dtype), wide, drafter)
    assert_same_bits(narrow, drafter)
    assert wide.markov_in.dtype == jnp.float32


def without(*starts):
    return {n: t for n, t in TENSORS.items() if not n.startswith(starts)}


FAULTY = {
    "a block": (without("mtp.1."), {}, "mtp.1.attn.wkv.weight is missing"),
    "more blocks": (
        TENSORS,
        {"compress_ratios": [0, 16, 4, 0, 0, 0]},
        "mtp.2.attn_norm.weight is missing",
    ),
    "fewer blocks": (
        TENSORS,
        {"compress_ratios": [0, 16, 4, 0]},
        "mtp.1.attn_norm.weight is not part of the model",
    ),
    "the corrections": (
        without("mtp.1.markov_head"),
        {},
        "mtp.1.markov_head.markov_w1.weight is missing",
    ),
    "the confidence": (
        without("mtp.1.confidence_head"),
        {},
        "confidence_head.proj.weight is missing",
    ),
    "another rank": (
        TENSORS,
        {"dspark_markov_rank": 11},
        "has the shape (102, 10), not",
    ),
    "fewer layers": (
        TENSORS,
        {"dspark_target_layer_ids": [0]},
        "has the shape (150, 300) of float8_e4m3fn, not (150, 150)",
    ),
    "a scale": (without("mtp.0.main_proj.scale"), {}, "mtp.0.main_proj.weight"),
    "a prediction block": (
        TENSORS | {"mtp.0.e_proj.weight": np.zeros((150, 150), np.float32)},
        {},
        "mtp.0.e_proj.weight is not part of the model",
    ),
    "an embedding": (
        TENSORS | {"mtp.0.embed.weight": np.zeros((102, 150), np.float32)},
        {},
        "mtp.0.embed.weight is not part of the model",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_what_is_missing_or_extra_is_one_error(case, tmp_path):
    tensors, changes, fault = FAULTY[case]
    write_drafter(tmp_path, tensors, **changes)
    with pytest.raises(FaultyCheckpoint) as error:
        dsv4.load_dspark(tmp_path)
    assert any(fault in line for line in error.value.faults), error.value.faults


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict.fromkeys(SIZES.to_hf()), "there is no drafter"),
        ({"dspark_block_size": 0}, "there is no drafter"),
        ({"dspark_block_size": -5}, "dspark_block_size=-5"),
        ({"dspark_markov_rank": None}, r"lacks \['dspark_markov_rank'\]"),
        ({"dspark_target_layer_ids": [0, 3]}, "below num_hidden_layers=3"),
        ({"compress_ratios": [0, 16, 4, 0, 4]}, r"\[0, 4\] does"),
        ({"model_type": "deepseek_v41"}, "DeepSeek-V4.1"),
    ],
)
def test_a_configuration_without_its_drafter_is_refused(changes, match, tmp_path):
    write_drafter(tmp_path, {})
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=match):
        dsv4.load_dspark(tmp_path)
