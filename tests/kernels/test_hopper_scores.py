"""The indexer's scores on Hopper against their reference, in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dsv4_eqx.kernels.hopper_scores import Tiles, index_scores
from dsv4_eqx.kernels.select import score_reference

pytestmark = pytest.mark.slow  # the interpreter, or whole models


@pytest.fixture(autouse=True)
def compile_quickly():
    """The interpreter compiles the kernel for each of its threads."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def operands(shape, num_entries, seed=0):
    """Queries, weights, rows that hold more than the entries, and where these begin."""
    rng = np.random.default_rng(seed)
    batch, _, _, dim = shape
    first = [3 + i * (num_entries + 5) for i in reversed(range(batch))]
    rows = batch * (num_entries + 5)

    def normal(shape, dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return (
        normal(shape, jnp.bfloat16),
        normal(shape[:-1], jnp.float32),
        normal((rows, dim), jnp.bfloat16),
        jnp.asarray(first, jnp.int32),
    )


def scores(given, num_entries, num_seen, tiles, **parameters):
    def run(given, num_seen):
        interpret = InterpretGPUParams(**parameters)
        return index_scores(
            *given, num_entries, num_seen, tiles=tiles, interpret=interpret
        )

    return jax.jit(run)(given, jnp.asarray(num_seen))


def reference(queries, weights, keys, first_rows, num_entries):
    own = jnp.stack([keys[i : i + num_entries] for i in first_rows.tolist()])
    return score_reference(queries, weights, own)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_scores_equal_reference():
    # Four queries a product. Channels come in two chunks.
    shape, num_entries = (1, 7, 16, 128), 50
    tiles = Tiles(queries=8, stages=1, warpgroups=1)
    given = operands(shape, num_entries)
    out = scores(given, num_entries, np.full((1, 7), num_entries), tiles)
    assert out.dtype == jnp.float32
    close(out, reference(*given, num_entries))


def test_only_what_is_seen_is_computed_and_nothing_races():
    shape, num_entries = (2, 3, 96, 64), 150
    tiles = Tiles(queries=2, stages=2, stores=1, warpgroups=2)
    given = operands(shape, num_entries, seed=1)
    num_seen = np.asarray([[0, 65, 0], [150, 1, 64]])
    out = scores(given, num_entries, num_seen, tiles, detect_races=True)
    assert not gpu_callbacks.get_races().races_found
    # Tiles of two queries and of one; blocks of 128 entries.
    computed = np.asarray([[128, 128, 0], [256, 256, 128]])[..., None]
    is_computed = np.arange(num_entries) < computed
    # What the interpreter has not written is not a number.
    np.testing.assert_array_equal(np.isfinite(out), is_computed)
    expected = reference(*given, num_entries)
    close(np.where(is_computed, out, 0), np.where(is_computed, expected, 0))


@pytest.mark.parametrize("heads, queries", [(8, 3), (40, 3), (72, 20), (128, 300)])
def test_scores_are_a_program_for_gpus(heads, queries):
    queries, weights, keys, first_rows = operands((1, queries, heads, 64), 40)
    num_seen = jnp.zeros(queries.shape[:2], jnp.int32)

    @jax.jit
    def run(queries, weights, keys):
        return index_scores(queries, weights, keys, first_rows, 40, num_seen)

    traced = run.trace(queries, weights, keys)
    assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_nothing_to_score():
    queries, weights, keys, first_rows = operands((2, 3, 8, 64), 4)
    num_seen = jnp.zeros((2, 3), jnp.int32)
    out = index_scores(queries, weights, keys, first_rows, 0, num_seen)
    assert out.shape == (2, 3, 0)


@pytest.mark.parametrize("heads, dim", [(12, 64), (136, 64), (8, 96)])
def test_sizes_that_do_not_suit_raise(heads, dim):
    given = operands((1, 2, heads, dim), 4)
    with pytest.raises(ValueError, match="heads must be a multiple of 8"):
        index_scores(*given, 4, jnp.zeros((1, 2), jnp.int32))


def test_dtypes_that_do_not_suit_raise():
    queries, *others = operands((1, 2, 8, 64), 4)
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        queries = queries.astype(jnp.float32)
        index_scores(queries, *others, 4, jnp.zeros((1, 2), jnp.int32))
