"""`jax.vmap` of the whole model under `jit`: over rows, over models, over gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx import DeepSeekV4
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from tests.models import (
    QUICKLY,
    forward_once,
    random_model,
    random_tokens,
    relative,
    small_config,
)
from tests.sharded import assert_equal_gradients

pytestmark = pytest.mark.slow
SMALL = small_config(num_nextn_predict_layers=0)
# The program of one layer, scanned over two.
REPEATING = small_config(
    num_hidden_layers=2,
    layer_types=(CSA, CSA),
    compress_ratios=(4, 4),
    mlp_layer_types=(TOPK_MOE, TOPK_MOE),
    num_nextn_predict_layers=0,
)


def test_vmap_over_rows_is_the_batch():
    """In Equinox's way, where the model is the function, and each row has its batch."""
    model = random_model(SMALL)
    tokens = jnp.asarray(random_tokens(0, batch=3))
    call = eqx.filter_jit(eqx.filter_vmap(model), compiler_options=QUICKLY)
    found = call(tokens[:, None])
    assert relative(found, forward_once(model, tokens)) <= 1e-5


def test_vmap_over_models_is_each_model():
    keys = jax.random.split(jax.random.key(5), 2)
    make = eqx.filter_vmap(lambda key: DeepSeekV4(REPEATING, key=key))
    models = eqx.filter_jit(make, compiler_options=QUICKLY)(keys)
    tokens = jnp.asarray(random_tokens(1, batch=3))
    over_rows = jax.vmap(lambda model, row: model(row[None])[0], (None, 0))
    over_models = jax.vmap(over_rows, (0, None))
    found = jax.jit(over_models, compiler_options=QUICKLY)(models, tokens)
    for i, logits in enumerate(found):
        model = jax.tree.map(lambda x: x[i], models)
        assert relative(logits, forward_once(model, tokens)) <= 1e-5


def test_vmap_of_gradients_is_the_gradient_of_each_row():
    model = random_model(REPEATING, seed=2)
    tokens = jnp.asarray(random_tokens(2))

    def loss(model, row):
        hidden = model.hidden(row[None, :-1])
        return model.cross_entropy(hidden, row[None, 1:]).mean()

    of_row = jax.grad(loss, allow_int=True)
    of_rows = jax.jit(jax.vmap(of_row, (None, 0)), compiler_options=QUICKLY)
    found = of_rows(model, tokens)
    of_row = jax.jit(of_row, compiler_options=QUICKLY)
    for i, row in enumerate(tokens):
        # Of a few mixing scales the gradient all but cancels.
        own = jax.tree.map(lambda x: np.asarray(x)[i], found)
        assert_equal_gradients(own, of_row(model, row), 1e-5, floor=1e-3)
