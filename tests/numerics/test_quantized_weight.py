"""Packed weights in modules: their properties, and every way to unpack them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import dsv4_eqx as dsv4
from dsv4_eqx.numerics.quantized_weight import (
    QuantizedWeight,
    codes_per_byte,
    dequantize,
    is_quantized,
)
from tests.models import QUICKLY
from tests.sharded import assert_same_bits, make_mesh

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP4 = np.dtype(ml_dtypes.float4_e2m1fn)
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = pytest.mark.parametrize("code_dtype", [FP8, FP4], ids=str)
unpack = jax.jit(dequantize, compiler_options=QUICKLY)


def random_packed(code_dtype, leading=(4, 6), blocks=3, block=10, seed=0, dtype="f4"):
    """A packed weight of three blocks of ten columns, and the array in float64."""
    generator = np.random.default_rng(seed)
    per_byte = codes_per_byte(code_dtype)
    codes = generator.integers(0, 256, (*leading, blocks * block // per_byte), np.uint8)
    scales = generator.integers(110, 134, (*leading, blocks), np.uint8)
    if code_dtype == FP8:
        codes = np.where(codes & 127 == 127, 3, codes).astype(np.uint8)
        values = codes.view(FP8).astype(np.float64)
    else:
        pairs = np.stack([codes & 15, codes >> 4], axis=-1)
        values = np.concatenate([E2M1, -E2M1])[pairs].reshape(*leading, -1)
    exponents = scales.astype(np.int32).repeat(block, axis=-1) - 127
    weight = QuantizedWeight(
        jnp.asarray(codes), jnp.asarray(scales), code_dtype, np.dtype(dtype)
    )
    return weight, np.ldexp(values, exponents)


def test_numpy_makes_no_array_of_it():
    weight, _ = random_packed(FP8)
    for make in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match="dequantize"):
            make(weight)


@CODES
def test_it_has_the_shape_and_dtype_of_the_array_it_stands_for(code_dtype):
    for dtype in ("float32", "bfloat16", "float16"):
        weight, values = random_packed(code_dtype, dtype=dtype)
        array = weight.dequantize()
        for one in (weight, jax.eval_shape(lambda w: w, weight)):
            assert one.shape == array.shape == (4, 6, 30)
            assert one.ndim == array.ndim == 3
            assert one.size == array.size == 720
            assert one.dtype == array.dtype == dtype
        np.testing.assert_array_equal(array, values.astype(dtype))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    assert num_bytes == 720 // codes_per_byte(code_dtype) + 4 * 6 * 3


def test_codes_in_a_byte():
    assert (codes_per_byte(FP8), codes_per_byte(FP4)) == (1, 2)


def test_the_even_column_is_the_low_half_of_a_byte():
    weight = QuantizedWeight(
        jnp.asarray([[0x21, 0xF8]], jnp.uint8),
        jnp.asarray([[128]], jnp.uint8),
        FP4,
        np.dtype(np.float32),
    )
    # The third is minus zero.
    expected = np.asarray([[1.0, 2.0, -0.0, -12.0]], np.float32)
    assert np.asarray(weight.dequantize()).tobytes() == expected.tobytes()


class Pair(eqx.Module):
    """A weight that may be packed, and another that is not."""

    weight: Float[Array, "heads dim head_dim"] | QuantizedWeight
    other: Float[Array, " dim"]
    name: str = eqx.field(static=True)


@CODES
def test_trees_are_unpacked_wherever_a_packed_weight_is(code_dtype):
    weight, values = random_packed(code_dtype)
    other = jnp.arange(6.0)
    tree = {"pair": Pair(weight, other, "a"), "list": [weight, None, (other, 3)]}
    assert is_quantized(weight) and not is_quantized(tree) and not is_quantized(other)
    found = dequantize(tree)
    assert jax.tree.structure(found) == jax.tree.structure(
        {"pair": Pair(other, other, "a"), "list": [other, None, (other, 3)]}
    )
    np.testing.assert_array_equal(found["pair"].weight, values)
    np.testing.assert_array_equal(found["list"][0], values)
    assert found["pair"].other is other and found["list"][2][1] == 3
    again = dequantize(found)  # there is nothing left to do
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found)))


@CODES
def test_jit_gives_the_same_bits(code_dtype):
    for dtype in ("float32", "bfloat16"):
        weight, _ = random_packed(code_dtype, dtype=dtype)
        assert_same_bits(jax.jit(dequantize)(weight), weight.dequantize())


@CODES
def test_equal_ones_compile_once(code_dtype):
    traces = []

    @jax.jit
    def run(weight: Any):
        traces.append(weight)
        return dequantize(weight)

    for seed in (0, 1):
        weight, values = random_packed(code_dtype, seed=seed)
        np.testing.assert_array_equal(run(weight), values)
    assert len(traces) == 1


@CODES
def test_scans_run_over_stacked_ones(code_dtype):
    weight, values = random_packed(code_dtype, leading=(5, 7))
    x = np.random.default_rng(1).standard_normal(30).astype(np.float32)

    @jax.jit
    def run(weight, x):
        def layer(total, matrix):
            assert is_quantized(matrix) and matrix.shape == (7, 30)
            return total + matrix.dequantize() @ x, dequantize(matrix)

        return jax.lax.scan(layer, jnp.zeros(7), weight)

    total, matrices = run(weight, x)
    np.testing.assert_array_equal(matrices, values)
    expected = (values @ x.astype(np.float64)).sum(axis=0)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-3)


def test_there_is_no_gradient_with_respect_to_one():
    weight, values = random_packed(FP8, leading=(6,))
    pair = Pair(weight, jnp.arange(6.0), "a")

    @eqx.filter_grad
    def gradient(pair):
        return jnp.sum(pair.weight.dequantize() * pair.other[:, None])

    found = gradient(pair)
    assert found.weight.codes is None and found.weight.scales is None
    np.testing.assert_allclose(found.other, values.sum(axis=1), rtol=1e-5)


@CODES
def test_it_is_split_over_a_mesh_like_the_array(code_dtype):
    mesh = make_mesh(tensor=3, data=2)
    weight, values = random_packed(code_dtype, leading=(6, 4))
    pair = Pair(weight, jnp.arange(6.0), "a")
    rules = {"heads": "data", "head_dim": "tensor"}
    specs = dsv4.partition_specs(pair, rules, mesh=mesh)
    own = P("data", None, "tensor")
    assert (specs.weight.codes, specs.weight.scales) == (own, own)
    pair = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), pair, specs
    )
    assert unpack(pair).weight.sharding.is_equivalent_to(NamedSharding(mesh, own), 3)

    def local(pair):
        assert pair.weight.shape == (3, 4, 10)  # a block each
        return dequantize(pair).weight

    run = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=own)
    np.testing.assert_array_equal(jax.jit(run)(pair), values)


def test_splitting_within_a_block_is_refused():
    weight, _ = random_packed(FP8)
    pair = Pair(weight, jnp.arange(6.0), "a")
    mesh = make_mesh(tensor=2)
    with pytest.raises(ValueError, match=r"weight\.scales .* does not divide"):
        dsv4.partition_specs(pair, {"head_dim": "tensor"}, mesh=mesh)
