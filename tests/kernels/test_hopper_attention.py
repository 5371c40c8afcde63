"""The forward kernel for Hopper, run by Pallas's interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dsv4_eqx.kernels.hopper_attention import attend_lists

pytestmark = pytest.mark.slow  # the interpreter, or whole models

WINDOW, ENTRIES = 40, 30
QUICKLY = {"xla_backend_optimization_level": 0}


def operands(num_queries, heads, head_dim, keys, num_entries=ENTRIES):
    """Lists with gaps; the second query has no key, the third's list ends early.

    No list names the first row, which is NaN.
    """
    rng = np.random.default_rng(keys)
    shapes = (num_queries, heads, head_dim), (WINDOW, head_dim), (num_entries, head_dim)
    arrays = [rng.standard_normal(shape).astype("f4") for shape in shapes]
    lists = rng.integers(-1, WINDOW + num_entries, (num_queries, keys)).astype("i4")
    arrays[1][0] = np.nan
    lists[(lists == 0) | (rng.random(lists.shape) < 0.3)] = -1
    num_keys = np.full(num_queries, keys, "i4")
    lists[1], num_keys[1] = -1, 0
    lists[2, keys // 2 :], num_keys[2] = -1, keys // 2
    return arrays, lists, num_keys


def exact(arrays, lists, stored=lambda x: x):
    """`stored` changes the weights that keys are multiplied by, and the result."""
    queries, window, entries = (np.asarray(x, "f8") for x in arrays)
    own = np.concatenate([window, entries])[np.where(lists >= 0, lists, 1)]
    scores = np.einsum("qhc,qkc->qhk", queries, own) * queries.shape[-1] ** -0.5
    scores = np.where(lists[:, None] >= 0, scores, -np.inf)
    top = np.maximum(scores.max(axis=2, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    out = np.einsum("qhk,qkc->qhc", stored(weights), own) / np.maximum(total, 1e-300)
    with np.errstate(divide="ignore"):
        return stored(out), (top + np.log(total))[..., 0]


def ours(arrays, lists, num_keys, **options):
    run = functools.partial(
        attend_lists,
        scale=arrays[0].shape[-1] ** -0.5,
        interpret=InterpretGPUParams(detect_races=options.pop("detect_races", False)),
        **options,
    )
    run = jax.jit(run, compiler_options=QUICKLY)
    return jax.block_until_ready(run(*arrays, lists, num_keys))


# Odd sizes; programs that take several tiles, in turn with few and many blocks.
CASES = {
    "two tiles": ((3, 128, 64, 131), dict(num_programs=1)),
    "all channels": ((3, 64, 512, 200), dict(num_programs=1)),
    "splits": ((3, 5, 128, 200), dict(num_programs=1, splits=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_a_dense_softmax(case):
    sizes, options = CASES[case]
    given = operands(*sizes)
    out, log_total = ours(*given, **options)
    expected, expected_total = exact(*given[:2])
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)
    np.testing.assert_allclose(log_total, expected_total, 1e-5, 1e-5)
    assert (out[1] == 0).all() and np.isneginf(log_total[1]).all()


def test_bfloat16_rounds_only_weights_and_result():
    arrays, lists, num_keys = operands(4, 1, 64, 64, num_entries=0)
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    out, log_total = ours(low, lists, num_keys, num_programs=1)
    assert out.dtype == jnp.bfloat16 and log_total.dtype == jnp.float32
    wide = [np.asarray(x, "f4") for x in low]
    expected, expected_total = exact(wide, lists)
    rounded, _ = exact(wide, lists, lambda x: np.asarray(x, jnp.bfloat16).astype("f8"))
    allowed = np.linalg.norm(rounded - expected)
    assert np.linalg.norm(np.asarray(out, "f8") - expected) <= 1.1 * allowed
    np.testing.assert_allclose(log_total, expected_total, 1e-5, 1e-5)


def test_no_warpgroup_reads_what_another_still_writes():
    given = operands(3, 2, 128, 200)
    out, _ = ours(*given, num_programs=2, detect_races=True)
    assert not gpu_callbacks.get_races().races_found
    np.testing.assert_allclose(out, exact(*given[:2])[0], 1e-5, 1e-5)
