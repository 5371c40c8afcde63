"""Where documents lie in packed rows, and parts of attention over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_eqx.attention.documents import (
    document_starts,
    last_tokens,
    local_positions,
)
from dsv4_eqx.config.kinds import CSA, HCA, SLIDING
from dsv4_eqx.kernels.form import use_kernels
from tests.attention.test_attention import activations, attend, small_attention
from tests.attention.test_compressor import compressor, normal
from tests.models import quick_jit, relative

SEQ = 31


def ids_of(lengths):
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return jnp.asarray(ids)


def row_of(draws):
    """Lengths that add up to SEQ, from as many as it takes."""
    ends = np.minimum(np.cumsum([*draws, SEQ]), SEQ)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0]


@functools.partial(quick_jit, static_argnames=("ratio", "room"))
def found_of(ids, ratio, room):
    positions = local_positions(ids)
    return document_starts(ids), positions, last_tokens(positions, ratio, room)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=SEQ), st.sampled_from([1, 3, 4]))
def test_starts_positions_and_windows_are_those_of_a_loop(draws, ratio):
    lengths = row_of(draws)
    starts, positions, last, start = [], [], [], 0
    for length in lengths:
        starts += [start] * length
        positions += range(length)
        last += range(start + ratio - 1, start + length, ratio)
        start += length
    room = SEQ // ratio
    last += [SEQ] * (room - len(last))
    found = found_of(ids_of(lengths)[None], ratio, room)
    for one, other in zip(found, (starts, positions, last), strict=True):
        assert one.dtype == jnp.int32
        np.testing.assert_array_equal(one[0], other)
    np.testing.assert_array_equal(document_starts(found[0]), found[0])


def test_ids_may_be_any_integers_and_come_back():
    far = 1 << 32  # the same 32 bits
    ids = np.array([[5, 5, 5 + far, 5 + far, -1, 5], [0, far, 2 * far, 0, 0, -far]])
    starts = [[0, 0, 2, 2, 4, 5], [0, 1, 2, 3, 3, 5]]
    np.testing.assert_array_equal(document_starts(ids), starts)
    low, high = np.iinfo("i4").min, np.iinfo("i4").max
    ids = jnp.array([[high, low, low, 0, high, high]])
    np.testing.assert_array_equal(document_starts(ids), [[0, 1, 1, 3, 4, 4]])


def documents_of(x, rows):
    """Each document of each row on its own."""
    for row, lengths in zip(x, rows, strict=True):
        yield from (part[None] for part in jnp.split(row, np.cumsum(lengths)[:-1]))


@pytest.mark.parametrize("ratio, overlap", [(1, True), (3, False), (4, True)])
def test_entries_of_packed_documents_are_those_of_each_alone(ratio, overlap):
    rows = [row_of((1, ratio, ratio - 1, ratio + 1, 2 * ratio - 1)), row_of((2, 9))]
    ids, x = jnp.stack(list(map(ids_of, rows))), normal((2, SEQ, 7))
    made = compressor(ratio, overlap)

    def loss(made, x, ids):
        entries = made(x, ids)
        total = jnp.sum(jnp.cos(3 * entries.values), axis=-1)
        return jnp.sum(jnp.where(entries.segment_ids < 0, 0, total)), entries

    def loss_alone(made, x):
        entries = [made(part) for part in documents_of(x, rows)]
        joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *entries)
        return jnp.sum(jnp.cos(3 * joined.values)), joined

    def gradients(loss, *args):
        return quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*args)

    grads, entries = gradients(loss, made, x, ids)
    expected_grads, expected = gradients(loss_alone, made, x)
    is_entry = np.asarray(entries.segment_ids) >= 0
    assert is_entry.shape == (2, SEQ // ratio)
    np.testing.assert_allclose(entries.values[is_entry], expected.values[0], 1e-5, 1e-5)
    last = entries.last_positions[is_entry]
    np.testing.assert_array_equal(last, expected.last_positions[0])
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        assert relative(one, other) < 1e-5


def test_a_row_without_a_whole_window_has_no_entry_that_is_seen():
    run = quick_jit(lambda made, *args: made(*args))
    entries = run(compressor(4, True), normal((1, 9, 7)), ids_of((3, 3, 3))[None])
    assert entries.values.shape == (1, 2, 5)
    np.testing.assert_array_equal(entries.segment_ids, [[-1, -1]])
    assert jnp.isfinite(entries.values).all()
    entries = run(compressor(4, True), normal((1, 3, 7)), ids_of((2, 1))[None])
    assert entries.values.shape == (1, 0, 5)


# Of 171 tokens each selects some entries by index, of 80 by a mask.
LONG, SHORT = (19, 100, 30, 1, 5, 16), (19, 1, 30, 5, 16, 9)


@pytest.mark.parametrize(
    "kind, form, lengths",
    [
        (SLIDING, "cpu", LONG),
        (HCA, "cpu", LONG),
        (HCA, "gpu", SHORT),
        (CSA, "cpu", LONG),
        (CSA, "cpu", SHORT),
        (CSA, "gpu", LONG),
        (CSA, "reference", SHORT),
    ],
)
def test_attention_of_packed_documents_is_that_of_each_alone(kind, form, lengths):
    ours, x = small_attention(kind), activations(sum(lengths), batch=1)
    starts = np.cumsum([0, *lengths[:-1]])
    alone = jnp.stack(
        [
            jnp.pad(part[0], ((0, 100 - part.shape[1]), (0, 0)))
            for part in documents_of(x, [lengths])
        ]
    )
    expected = attend(ours, alone)
    ids = 7 - ids_of(lengths)[None]
    with use_kernels(form):
        run = quick_jit(lambda ours, x: ours(x, local_positions(ids), ids))
        out = run(ours, x)
    for own, start, length in zip(expected, starts, lengths, strict=True):
        found = out[0, start : start + length]
        np.testing.assert_allclose(found, own[:length], 1e-5, 1e-5)


def test_positions_and_ids_that_do_not_fit_are_refused(without_shape_checks):
    ours, x = small_attention(SLIDING), activations(6, batch=1)
    ids = jnp.array([[0, 0, 1, 1, 1, 2]])
    for positions, segment_ids, message in (
        (jnp.arange(6)[None], ids, r"position 2 at \[0, 2\] is not .* 0, 1, 2, "),
        (local_positions(ids), ids[:, :5], r"segment_ids of shape \(1, 5\)"),
        (local_positions(ids), ids.astype(float), "segment_ids .* float32"),
    ):
        with pytest.raises(ValueError, match=f"Attention.*{message}"):
            ours(x, positions, segment_ids)
    made = compressor(3, False)
    with pytest.raises(
        ValueError, match=r"Compressor .* segment_ids of shape \(1, 5\)"
    ):
        made(normal((1, 6, 7)), ids[:, :5])
