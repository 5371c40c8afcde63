"""Every form of the kernels gives the same model; the reference has all derivatives."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, TOPK_MOE
from dsv4_eqx.kernels.form import FORMS, current_form, use_kernels
from tests.models import QUICKLY, random_model, random_tokens, relative, small_config
from tests.tiers import tiers

pytestmark = pytest.mark.slow  # the interpreter, or whole models
FIRST = 41  # tokens of the cache: the others complete windows of both kinds


@functools.cache
def small():
    config = small_config(
        num_hidden_layers=2,
        layer_types=(HCA, CSA),
        compress_ratios=(16, 4),
        mlp_layer_types=(HASH_MOE, TOPK_MOE),
        num_nextn_predict_layers=0,
        hc_sinkhorn_iters=2,  # unrolled in the forms for GPU and TPU
    )
    return random_model(config), random_tokens(0, 53, config=config)


@functools.cache
def cache_of_first_tokens():
    model, tokens = small()

    def extend(model, cache):
        return model.extend(tokens[:, :FIRST], cache)[1]

    with use_kernels("reference"):
        extend = jax.jit(extend, compiler_options=QUICKLY)
        return extend(model, model.init_cache(2, 60))


@functools.cache
def result_of(form):
    """Logits and gradients, and the logits of the last tokens, after a cache."""
    model, tokens = small()
    cache = cache_of_first_tokens()

    def loss(model):
        logits = model(tokens)
        return jnp.mean(jnp.sin(logits)), logits

    def run(model, cache):
        gradients, logits = eqx.filter_grad(loss, has_aux=True)(model)
        hidden, _ = model.extend(tokens[:, FIRST:], cache)
        return logits, gradients, model.unembed(hidden)

    with use_kernels(form):
        return jax.jit(run, compiler_options=QUICKLY)(model, cache)


# In float32 the form for Hopper GPUs is made of the others' parts; that for other GPUs
# has the CPU's grouped products and is the TPU's in everything else. The whole model in
# the CPU's form is compared with transformers.
@pytest.mark.parametrize("form", tiers(["cpu", "gpu", "tpu"], in_ci=["tpu"]))
def test_form_gives_the_reference(form):
    logits, gradients, continued = result_of(form)
    expected, others, _ = result_of("reference")
    np.testing.assert_allclose(logits, expected, 1e-5, 1e-5)
    np.testing.assert_allclose(continued, expected[:, FIRST:], 1e-5, 1e-5)
    one, other = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree) if x.dtype == "f4"])
        for tree in (gradients, others)
    )
    assert relative(one, other) < 1e-5


def test_reference_has_forward_mode_and_second_derivatives():
    model, tokens = small()
    block = model.layers[1]  # compressed sparse attention
    tokens = jnp.asarray(tokens[:1, :23])
    positions = jnp.arange(23)[None]
    size = 1, 23, *block.attention_connection.weight.shape[1:]
    streams, direction = jax.random.normal(jax.random.key(0), (2, *size))

    def loss(streams):
        return jnp.mean(jnp.sin(block(streams, tokens, positions)))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def derivatives(streams, direction):
        gradient, product = jax.jvp(jax.grad(loss), (streams,), (direction,))
        _, slope = jax.jvp(loss, (streams,), (direction,))
        along = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction))
        return jnp.vdot(gradient, direction), slope, product, along(streams)

    with use_kernels("reference"):
        expected, slope, product, reverse_twice = derivatives(streams, direction)
    assert slope == pytest.approx(float(expected), rel=1e-4)
    assert relative(product, reverse_twice) < 1e-4
    assert jnp.any(product != 0)


def test_form_is_that_of_the_default_device():
    assert current_form() is FORMS["cpu"]
    with use_kernels("gpu"):
        assert current_form() is FORMS["gpu"]
        with use_kernels("tpu"):
            assert current_form() is FORMS["tpu"]
        assert current_form() is FORMS["gpu"]
    assert current_form() is FORMS["cpu"]


def test_a_compiled_program_is_made_again_for_another_form():
    names = []

    @jax.jit
    def function(x):
        names.append(current_form().name)
        return x

    for form in ("gpu", "tpu", "gpu"):
        with use_kernels(form):
            function(1.0)
    assert names == ["gpu", "tpu"]


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'ampere'.*'cpu', 'gpu'"):
        with use_kernels("ampere"):
            pass
