"""Models, tokens and compiled calls that several test files share."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_eqx import from_state_dict
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.primitives.rotary import YarnScaling
from tests.compiling import OPTIMIZED, QUICKLY
from tests.tiny import tiny_config

T = tiny_config()
LENGTH = 41  # ten CSA entries for an index_topk of 5, two HCA entries and a rest
# Configuration M, the real rates, window and index_topk at tiny widths: from token
# 2,052 on, CSA sees more entries than it selects.
M = tiny_config(
    num_hidden_layers=4,
    sliding_window=128,
    layer_types=(SLIDING, HCA, CSA, CSA),
    compress_ratios=(0, 128, 4, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE, TOPK_MOE),
    index_n_heads=32,
    index_topk=512,
    rope_scaling=YarnScaling(16.0, 256),
    max_position_embeddings=4096,
    num_nextn_predict_layers=0,
)

# Sizes that a mesh of two devices along any axis divides.
DIVISIBLE = dict(vocab_size=96, n_routed_experts=6, num_attention_heads=4, o_groups=2)

quick_jit = functools.partial(jax.jit, compiler_options=QUICKLY)
forward = jax.jit(lambda model, tokens: model(tokens), compiler_options=OPTIMIZED)
forward_once = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICKLY)


@functools.cache
def pair(seed, config=T):
    """transformers' model and ours with the same weights."""
    from tests.reference import ours, reference_model  # needs torch

    reference = reference_model(config, seed)
    return reference, ours(config, reference)


def small_config(**changes):
    """Three layers, one of each kind: compiles in half of T's time."""
    fields = dict(
        num_hidden_layers=3,
        layer_types=(SLIDING, HCA, CSA),
        compress_ratios=(0, 16, 4),
        mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
    )
    return tiny_config(**(fields | changes))


def random_tokens(seed, length=LENGTH, batch=2, config=T):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, config.vocab_size, (batch, length))
    return tokens.astype(np.int32)


def streams_by_layer(model, tokens):
    """The streams after each layer, which runs on its own."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    num_streams = model.head.base.shape[0]
    streams = jnp.repeat(model.embedding[tokens][:, :, None], num_streams, axis=2)
    outputs = []
    for layer in range(len(model.layers)):
        streams = model.layers[layer](streams, tokens, positions)
        outputs.append(streams)
    return outputs


def random_tensors(config, seed=0):
    """A state dict under the official names."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for source, leaf in sources(abstract_model(config, jnp.float32), official=True):
        for name in source.names.flat:
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                high = config.n_routed_experts
                tensors[name] = generator.integers(0, high, source.tensor_shape)
                continue
            value = generator.normal(size=source.tensor_shape)
            value = value / np.sqrt(source.tensor_shape[-1])
            tensors[name] = value.astype(np.float32)
    return tensors


def random_model(config, seed=0):
    """A model, prediction block included, without waiting for JAX to make one."""
    return from_state_dict(config, random_tensors(config, seed))


def relative(actual, expected):
    """Relative L2 error, shapes apart; zeros must be zeros."""
    actual, expected = np.asarray(actual, "f8"), np.asarray(expected, "f8")
    size = np.linalg.norm(expected)
    error = actual - expected.reshape(actual.shape)
    return np.linalg.norm(error) / size if size else np.abs(actual).max()


@contextlib.contextmanager
def compilations():
    """Notes the programs that XLA compiles."""
    found, is_open = [], True

    def note(event, duration, **_):
        if is_open and event.endswith("backend_compile_duration"):
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    is_open = False
