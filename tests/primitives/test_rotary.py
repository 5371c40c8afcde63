"""RotaryEmbedding against transformers: both of Flash's kinds, bits and angles."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, PartitionSpec
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from dsv4_eqx import RotaryEmbedding, YarnScaling

POSITIONS = [0, 1, 127, 128, 4095, 65535, 65536, 131071, 1048575]
KINDS = ["main", "compress"]


def ours(kind, rotary_dim=64):
    """Flash's embedding of one kind of layer."""
    if kind == "main":
        return RotaryEmbedding(rotary_dim)
    return RotaryEmbedding(rotary_dim, base=160000.0, yarn=YarnScaling(16, 65536))


def theirs(head_dim=512, rotary_dim=64):
    """transformers' embedding of both kinds, with Flash's numbers."""
    yarn = dict(
        rope_type="yarn",
        factor=16.0,
        original_max_position_embeddings=65536,
        beta_fast=32,
        beta_slow=1,
    )
    config = DeepseekV4Config(
        head_dim=head_dim,
        qk_rope_head_dim=rotary_dim,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_parameters=yarn,
    )
    return hf.DeepseekV4RotaryEmbedding(config)


def rotated_by_theirs(x, positions, kind, sign=1, rotary_dim=64):
    """x is `[batch, seq, heads, channels]`."""
    rope = theirs(x.shape[-1], rotary_dim)
    cos, sin = rope(x, torch.tensor(positions), layer_type=kind)
    return hf.apply_rotary_pos_emb(x, cos, sign * sin, unsqueeze_dim=2)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary_dim", [2, 6, 10, 64])
def test_inv_freq_has_the_bits_of_transformers(kind, rotary_dim):
    expected = getattr(theirs(rotary_dim=rotary_dim), f"{kind}_inv_freq").numpy()
    actual = ours(kind, rotary_dim).inv_freq
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain = RotaryEmbedding(64, base=160000.0).inv_freq
    ratio = ours("compress").inv_freq / plain
    assert ratio[0] == 1
    close(ratio[-1], 1 / 16, 1e-6)
    assert (np.diff(ratio) <= 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jit", [False, True])
def test_tables_are_exact_at_far_positions(kind, jit):
    rope = ours(kind)
    tables = jax.jit(rope.tables) if jit else rope.tables
    cos, sin = tables(jnp.array(POSITIONS))
    assert cos.dtype == sin.dtype == jnp.float32
    angles = np.float32(POSITIONS)[:, None] * rope.inv_freq
    assert angles.dtype == np.float32
    angles = angles.astype(np.float64)
    assert np.abs(np.cos(angles) - np.asarray(cos)).max() <= 2e-7
    assert np.abs(np.sin(angles) - np.asarray(sin)).max() <= 2e-7


@pytest.mark.parametrize("kind", KINDS)
def test_tables_as_constants_of_a_program_are_exact(kind):
    # A compiler may fold them with arithmetic of its own.
    rope = ours(kind)
    cos, sin = jax.jit(lambda: rope.tables(jnp.array(POSITIONS)))()
    angles = (np.float32(POSITIONS)[:, None] * rope.inv_freq).astype(np.float64)
    assert np.abs(np.cos(angles) - np.asarray(cos)).max() <= 2e-7
    assert np.abs(np.sin(angles) - np.asarray(sin)).max() <= 2e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 64), (2, 9, 3, 71), (3, 5, 7, 512)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_equals_transformers(kind, sizes, inverse):
    x = normal(sizes)
    positions = np.arange(sizes[1])[None] + 11 * np.arange(sizes[0])[:, None]
    out = ours(kind)(jnp.asarray(x), jnp.asarray(positions)[..., None], inverse=inverse)
    sign = -1 if inverse else 1
    close(out, rotated_by_theirs(torch.tensor(x), positions, kind, sign), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_equals_transformers_at_far_positions(kind):
    x = normal((1, len(POSITIONS), 3, 80))
    out = ours(kind)(jnp.asarray(x), jnp.array(POSITIONS)[:, None])
    close(out, rotated_by_theirs(torch.tensor(x), [POSITIONS], kind), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_transformers(kind):
    x, cotangent = normal((2, 5, 3, 9)), normal((2, 5, 3, 9), seed=1)
    positions = np.array([[0, 1, 2, 3, 4], [70, 71, 72, 73, 74]])
    tensor = torch.tensor(x, requires_grad=True)
    out = rotated_by_theirs(tensor, positions, kind, rotary_dim=6)
    (out * torch.tensor(cotangent)).sum().backward()
    rope = ours(kind, 6)
    grad = jax.grad(
        lambda x: jnp.sum(rope(x, jnp.asarray(positions)[..., None]) * cotangent)
    )(jnp.asarray(x))
    close(grad, tensor.grad, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_undoes_the_rotation(kind):
    x = jnp.asarray(normal((3, len(POSITIONS), 71)))
    positions = jnp.array(POSITIONS)
    rope = ours(kind)
    close(rope(rope(x, positions), positions, inverse=True), x, 1e-6)
    close(rope(rope(x, positions, inverse=True), positions), x, 1e-6)


def test_rotation_turns_neighbouring_channels_of_the_last_ones():
    # Half-split pairs, or the first channels, are another model.
    x = jnp.zeros(7).at[3].set(1.0)
    out = RotaryEmbedding(4)(x, jnp.array(1))
    expected = [0, 0, 0, math.cos(1), math.sin(1), 0, 0]
    close(out, np.array(expected, np.float32), 1e-6)


def test_position_zero_and_the_other_channels_stay_bit_identical():
    x = jnp.asarray(normal((5, 9)))
    rope = RotaryEmbedding(4)
    np.testing.assert_array_equal(rope(x, jnp.zeros(5, jnp.int32)), x)
    np.testing.assert_array_equal(rope(x, jnp.arange(5))[:, :5], x[:, :5])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (1, 5), (3, 5), (1, 1)])
def test_positions_broadcast_against_leading_dimensions(shape):
    rope, x = RotaryEmbedding(4), jnp.asarray(normal((3, 5, 7)))
    positions = jnp.arange(math.prod(shape)).reshape(shape) + 2
    expected = rope(x, jnp.broadcast_to(positions, (3, 5)))
    np.testing.assert_array_equal(rope(x, positions), expected)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.int32])
def test_positions_may_be_any_signed_integer(dtype):
    rope, x = RotaryEmbedding(4), jnp.asarray(normal((5, 7)))
    expected = rope(x, jnp.arange(5))
    np.testing.assert_array_equal(rope(x, jnp.arange(5, dtype=dtype)), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_rounded_once(dtype):
    x = jnp.asarray(normal((3, len(POSITIONS), 71))).astype(dtype)
    positions = jnp.array(POSITIONS)
    rope = ours("compress")
    out = rope(x, positions)
    assert out.dtype == dtype
    assert (out == rope(x.astype(jnp.float32), positions).astype(dtype)).all()


def test_rotary_embedding_has_no_leaves_and_is_hashable():
    assert jax.tree.leaves(ours("compress")) == []
    assert ours("compress") == ours("compress") != ours("main")
    assert hash(ours("compress")) == hash(ours("compress"))


def test_inv_freq_cannot_be_changed():
    # It is shared by all embeddings of the same numbers.
    with pytest.raises(ValueError, match="read-only"):
        ours("main").inv_freq[0] = 2


def test_rotation_works_under_transformations():
    rope, x = ours("compress", 4), jnp.asarray(normal((8, 5, 7)))
    positions = jnp.arange(40).reshape(8, 5)
    expected = rope(x, positions)
    close(jax.jit(rope)(x, positions), expected, 1e-6)
    close(jax.vmap(rope)(x, positions), expected, 1e-6)
    close(jax.vmap(rope, (0, None))(x, positions[0]), rope(x, positions[0]), 1e-6)
    _, scanned = jax.lax.scan(lambda c, xs: (c, rope(*xs)), None, (x, positions))
    close(scanned, expected, 1e-6)
    out = jax.eval_shape(lambda *args: rope(*args), x, positions)
    assert out.shape == x.shape and out.dtype == x.dtype


def test_rotation_works_in_shard_map():
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    rope, x = ours("compress", 4), jnp.asarray(normal((3, 16, 7)))
    positions = jnp.arange(16)
    mapped = jax.shard_map(
        lambda x, positions: rope(x, positions),
        mesh=mesh,
        in_specs=(PartitionSpec(None, "context"), PartitionSpec("context")),
        out_specs=PartitionSpec(None, "context"),
    )
    close(jax.jit(mapped)(x, positions), rope(x, positions), 1e-6)

    def gradient(f):
        return jax.grad(lambda x: jnp.sum(jnp.sin(f(x, positions))))

    close(jax.jit(gradient(mapped))(x), gradient(rope)(x), 1e-5)


@pytest.mark.parametrize("rotary_dim", [-2, 0, 1, 7])
def test_rotary_size_must_be_even_and_positive(rotary_dim):
    match = rf"rotary_dim={rotary_dim}\).*at least [12]"
    with pytest.raises(ValueError, match=match):
        RotaryEmbedding(rotary_dim)


@pytest.mark.parametrize("base", [-1.0, 0.0, 1.0, math.nan, math.inf, 1e40])
def test_base_must_be_above_one_and_finite_in_float32(base):
    with pytest.raises(ValueError, match="base=.*must be .*, above 1"):
        RotaryEmbedding(4, base=base)


def test_neighbours_beyond_float32_are_turned_alike():
    rope, far = RotaryEmbedding(4), 2**24
    cos, _ = rope.tables(jnp.array([far - 1, far, far + 1]))
    assert (cos[0] != cos[1]).any() and (cos[1] == cos[2]).all()


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(factor=0.0), "factor=0.0.*must be .*above 0"),
        (dict(factor=-16.0), "factor=-16.0.*must be .*above 0"),
        (dict(factor=math.nan), "factor=nan.*must be .*above 0"),
        (dict(factor=math.inf), "factor=inf.*must be .*above 0"),
        (dict(factor=0.5), "factor=0.5.*at least 1"),
        (dict(original_max_position=0), "original_max_position=0.*at least 1"),
        (dict(original_max_position=-4), "original_max_position=-4.*at least 1"),
        (dict(beta_fast=0.0), "beta_fast=0.0.*above 0"),
        (dict(beta_slow=-1.0), "beta_slow=-1.0.*above 0"),
        (dict(beta_fast=1.0), "beta_fast must be above beta_slow"),
        (dict(beta_slow=33.0), "beta_fast must be above beta_slow"),
    ],
)
def test_yarn_scaling_refuses_bad_numbers(changes, match):
    with pytest.raises(ValueError, match=match):
        YarnScaling(**(dict(factor=16, original_max_position=65536) | changes))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("value", ["16", None, True, [16]])
def test_yarn_scaling_refuses_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"factor=.*must be a number"):
        YarnScaling(value, 64)
    with pytest.raises(ValueError, match=r"max_position=.*must be an integer"):
        YarnScaling(16, value)


@pytest.mark.usefixtures("without_shape_checks")
def test_rotary_embeddings_take_the_numbers_of_numpy():
    yarn = YarnScaling(np.float32(16), np.int64(64), jnp.array(32), np.array(1.0))
    assert yarn == YarnScaling(16.0, 64) and hash(yarn) == hash(YarnScaling(16, 64))
    assert {type(x) for x in dataclasses.astuple(yarn)} == {int, float}
    ours = RotaryEmbedding(np.int8(4), base=np.float64(100), yarn=yarn)
    assert ours == RotaryEmbedding(4, base=100, yarn=YarnScaling(16, 64))


@pytest.mark.parametrize("shape", [(1,), (5, 3), (4, 0)])
def test_rotary_size_must_not_exceed_the_channels(shape):
    match = r"rotary_dim=4\).*needs at least 4 channels"
    with pytest.raises(ValueError, match=match):
        RotaryEmbedding(4)(jnp.ones(shape), jnp.array(0))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("argument", [dict(yarn={}), dict(base="a"), dict(base=True)])
def test_arguments_of_another_kind_are_refused(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=rf"RotaryEmbedding\({name}="):
        RotaryEmbedding(4, **argument)


X, POSITION = np.ones((3, 5, 6), np.float32), np.arange(5)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "x, positions, text",
    [
        (X.astype(np.int32), POSITION, "x of dtype int32"),
        (X.astype(np.complex64), POSITION, "x of dtype complex64"),
        (X, POSITION.astype(np.float32), "positions of dtype float32"),
        (X, POSITION > 0, "positions of dtype bool"),
        (np.ones((), np.float32), np.array(0), "x of shape ()"),
    ],
)
def test_other_dtypes_and_scalars_are_refused(x, positions, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        RotaryEmbedding(4)(jnp.asarray(x), jnp.asarray(positions))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "shape", [(3,), (4,), (5, 1), (2, 5), (3, 3, 5), (1, 3, 5), (3, 5, 1)]
)
def test_positions_that_do_not_broadcast_are_refused(shape):
    match = re.escape(f"positions of shape {shape}, which do not broadcast")
    with pytest.raises(ValueError, match=match):
        RotaryEmbedding(4)(jnp.asarray(X), jnp.zeros(shape, jnp.int32))
