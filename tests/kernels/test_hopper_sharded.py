"""Kernels for Hopper inside `shard_map`, where results must vary as operands do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import PartitionSpec as P

from dsv4_eqx import make_mesh
from dsv4_eqx.kernels.hopper_attention import attend_lists
from dsv4_eqx.kernels.hopper_attention_backward import attend_lists_backward
from dsv4_eqx.kernels.hopper_grouped import grouped_matmul
from dsv4_eqx.kernels.hopper_outer import grouped_outer
from dsv4_eqx.kernels.hopper_scores import index_scores

pytestmark = pytest.mark.slow  # the interpreter, or whole models

QUERIES, HEADS, DIM, KEYS, WINDOW, ENTRIES = 2, 2, 64, 64, 6, 4
SCALE = 0.125
QUICKLY = {"xla_backend_optimization_level": 0}
interpreted = functools.partial(
    attend_lists, scale=SCALE, num_programs=1, interpret=InterpretGPUParams()
)


def operands(window=WINDOW, entries=ENTRIES, queries=QUERIES):
    rng = np.random.default_rng(0)
    shapes = (queries, HEADS, DIM), (window, DIM), (entries, DIM)
    arrays = [rng.standard_normal(shape).astype("f4") for shape in shapes]
    lists = rng.integers(-1, window + entries, (queries, KEYS)).astype("i4")
    return *arrays, lists, np.full(queries, KEYS, "i4")


def exact(queries, window, entries, lists, _):
    keys = np.concatenate([window, entries])[np.maximum(lists, 0)]
    scores = SCALE * np.einsum("qhc,qkc->qhk", queries, keys)
    weights = np.where(lists[:, None] >= 0, np.exp(scores), 0)
    total = weights.sum(axis=2)
    return np.einsum("qhk,qkc->qhc", weights, keys) / total[..., None], np.log(total)


def over_two_devices(f, is_split):
    """`f`, which is to return what varies as the split operands do."""
    mesh = make_mesh(data=2, devices=jax.devices()[:2])

    def checked(*args):
        results = f(*args)
        for x in jax.tree.leaves(results):
            assert jax.typeof(x).manual_axis_type.varying == {"data"}
        return results

    specs = tuple(P("data") if split else P() for split in is_split)
    return jax.shard_map(checked, mesh=mesh, in_specs=specs, out_specs=P("data"))


@pytest.mark.exhaustive  # on few cores the devices' interpreters may wait for ever
def test_each_device_attends_with_its_own_queries():
    given = operands()
    sharded = over_two_devices(interpreted, (True, False, False, True, True))
    ours = jax.jit(sharded, compiler_options=QUICKLY)(*given)
    for x, expected in zip(ours, exact(*given)):
        np.testing.assert_allclose(x, expected, 1e-5, 1e-5)


def backward(*given):
    out, total = given[0], jnp.zeros(given[0].shape[:2], jnp.float32)
    return attend_lists_backward(*given, out, total, out, total, scale=SCALE)


def low(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


SIZES, FIRST = jnp.array([3, 5], jnp.int32), jnp.zeros(1, jnp.int32)
# Lowered for a GPU, not run: kernel, operands, whether each is split.
LOWERED = {
    "forward": (
        lambda *given: attend_lists(*given, scale=SCALE),
        (*map(jnp.bfloat16, operands()[:3]), *operands()[3:]),
        (True, False, False, True, True),
    ),
    "backward": (
        backward,
        (*map(jnp.bfloat16, operands()[:3]), *operands()[3:]),
        (True, False, False, True, True),
    ),
    "matmul": (
        grouped_matmul,
        (low(8, 64), low(2, 64, 64), SIZES),
        (True, False, False),
    ),
    "outer": (grouped_outer, (low(8, 64), low(8, 64), SIZES), (True, True, False)),
    "scores": (
        lambda q, w, k, seen: index_scores(q, w, k, FIRST, 8, seen),
        (
            low(2, 3, 8, 64),
            jnp.zeros((2, 3, 8)),
            low(8, 64),
            jnp.full((2, 3), 8, jnp.int32),
        ),
        (True, True, False, True),
    ),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", LOWERED)
def test_kernels_over_a_mesh_are_programs_for_gpus(name, mapped):
    f, given, is_split = LOWERED[name]
    over_mesh = over_two_devices(f, is_split)
    if mapped:
        over_mesh, given = jax.vmap(over_mesh), [jnp.stack([x] * 3) for x in given]
    traced = jax.jit(over_mesh).trace(*given)
    assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_entries_alone_are_the_rows_from_0():
    given = operands(window=0, entries=8)
    out, log_total = jax.jit(interpreted, compiler_options=QUICKLY)(*given)
    expected, expected_total = exact(*given)
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)
    np.testing.assert_allclose(log_total, expected_total, 1e-5, 1e-5)


@pytest.mark.parametrize("window, entries, queries", [(0, 0, 2), (3, 2, 0)])
def test_no_keys_and_no_queries(window, entries, queries):
    given = operands(window=1, entries=0, queries=queries)
    given = given[0], *operands(window, entries)[1:3], *given[3:]
    given = [jnp.asarray(x) for x in given]
    out, total = attend_lists(*given, scale=SCALE)
    assert out.shape == given[0].shape and total.shape == out.shape[:2]
    assert not out.any() and (total == -jnp.inf).all()
    gradients = attend_lists_backward(
        *given, out, total, out, jnp.zeros_like(total), scale=SCALE
    )
    for x, of in zip(gradients, given):
        assert x.shape == of.shape and not x.any()
