"""What a model over a mesh shows of its layers, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.models import QUICKLY, random_model, random_tokens, small_config
from tests.sharded import make_mesh

pytestmark = pytest.mark.slow
# A layer of each kind; sizes that two devices divide.
CONFIG = small_config(
    vocab_size=96,
    n_routed_experts=6,
    num_attention_heads=4,
    o_groups=2,
    o_lora_rank=14,
    num_nextn_predict_layers=0,
)
quick_jit = functools.partial(jax.jit, compiler_options=QUICKLY)
observe = quick_jit(lambda model, *args: model.observe(*args))


@functools.cache
def model():
    return random_model(CONFIG, seed=6)


@pytest.mark.parametrize(
    "sizes, seq, fsdp, has_documents",
    [
        (dict(data=2, context=2, tensor=2), 48, False, False),
        (dict(context=2, tensor=2), 20, False, True),
        (dict(expert=2, context=2), 6, False, False),  # no window is complete
        (dict(expert=2, tensor=2), 47, True, False),  # tensor does not split tokens
    ],
    ids=["all-tokens", "documents", "short", "odd"],
)
def test_values_over_a_mesh_equal_those_of_one_device(sizes, seq, fsdp, has_documents):
    tokens = random_tokens(1, seq, batch=4, config=CONFIG)
    segment_ids = ()
    if has_documents:
        segment_ids = (np.repeat([[2, 0, 5]], [11, 2, seq - 13], axis=1).repeat(4, 0),)
    expected = observe(model(), tokens, *segment_ids)
    sharded = dsv4.shard(model(), make_mesh(**sizes), fsdp=fsdp)
    found = observe(sharded, tokens, *segment_ids)
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def check(found, expected):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if jnp.issubdtype(found.dtype, jnp.integer):
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, 2e-5, 2e-5)

    jax.tree.map(check, found, expected)
    for one, other in zip(found[1], expected[1]):
        np.testing.assert_array_equal(one.routing.counts, other.routing.counts)
