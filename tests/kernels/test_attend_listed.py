"""Lists of keys: attention over them is attention over window, entries and sink.

The kernels for Hopper GPUs are replaced by a few lines over the same lists; the kernels
themselves are compared with such lines in `test_hopper_attention*.py`.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_eqx.kernels import attend_listed as module
from dsv4_eqx.kernels import hopper_attention, hopper_attention_backward
from dsv4_eqx.kernels.attend import attend_reference
from dsv4_eqx.kernels.attend_listed import attend_listed, key_lists
from dsv4_eqx.kernels.entries import LAYERS, Entries, visible
from dsv4_eqx.numerics.slice import Slice
from tests.kernels.test_attend import operands, packed_operands, selections
from tests.models import QUICKLY
from tests.tiers import tiers

pytestmark = pytest.mark.slow  # the interpreter, or whole models

KINDS = ("none", "all", "mask", "index")


def plain(queries, window, rows, lists, num_keys, *, scale, splits=1):
    """Softmax over the listed keys, and the logarithm of its total."""
    used = jnp.arange(lists.shape[1])[None] < num_keys[:, None]
    is_key = (lists >= 0) & used
    keys = jnp.concatenate([window, rows])[jnp.maximum(lists, 0)]
    logits = scale * jnp.einsum("qhc,qkc->qhk", queries, keys)
    logits = jnp.where(is_key[:, None], logits, -jnp.inf)
    log_total = jax.nn.logsumexp(logits, axis=2)
    weights = jnp.exp(logits - jnp.maximum(log_total, -1e30)[..., None])
    return jnp.einsum("qhk,qkc->qhc", weights, keys), log_total


def plain_backward(
    queries, window, rows, lists, num_keys, out, log_total, d_out, d_log_total, *, scale
):
    """Gradients of queries, window keys and entries, from what was kept."""

    def attention(queries, window, rows):
        used = (jnp.arange(lists.shape[1])[None] < num_keys[:, None]) & (lists >= 0)
        keys = jnp.concatenate([window, rows])[jnp.maximum(lists, 0)]
        logits = scale * jnp.einsum("qhc,qkc->qhk", queries, keys)
        # The total, with the sink, is given; its own derivative is subtracted.
        weights = jnp.where(used[:, None], jnp.exp(logits - log_total[..., None]), 0)
        mean = (jnp.sum(out * d_out, axis=-1) - d_log_total)[..., None]
        fixed = jax.lax.stop_gradient(weights)
        values = jnp.einsum("qhk,qkc->qhc", fixed, keys)
        return jnp.sum(values * d_out), jnp.sum(
            jax.lax.stop_gradient(
                weights * (jnp.einsum("qhc,qkc->qhk", d_out, keys) - mean)
            )
            * logits
        )

    total = jax.grad(lambda *x: sum(attention(*x)), argnums=(0, 1, 2))
    return total(queries, window, rows)


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(hopper_attention, "attend_lists", plain)
    monkeypatch.setattr(
        hopper_attention_backward, "attend_lists_backward", plain_backward
    )


def attention_operands(seq, kind, start=0):
    """What `attend` takes, for one kind of selection; of documents without a `seq`."""
    given = packed_operands() if seq is None else operands(seq, start=start)
    given = {name: jnp.asarray(value) for name, value in given.items()}
    mask, index = selections(given)
    entries = Entries(given["values"], given["last"], given.get("entry_ids"))
    selection = {"mask": jnp.asarray(mask), "index": jnp.asarray(index)}.get(kind)
    if kind == "none" or given["values"].shape[1] == 0:
        entries = selection = None
    arrays = (given[name] for name in ("queries", "positions", "keys", "sinks"))
    return *arrays, entries, selection, given.get("segment_ids")


STARTS = (1, 40), (7, 0), (30, 3), (67, 0), (None, 0)


@pytest.mark.parametrize(
    "seq, start, kind",
    tiers(
        [(*at, kind) for at in STARTS for kind in KINDS],
        in_ci=[
            (1, 40, "index"),
            (7, 0, "all"),
            (None, 0, "all"),
            (None, 0, "index"),
            *((67, 0, kind) for kind in KINDS),
        ],
    ),
)
def test_listed_attention_equals_the_reference(seq, start, kind, plain_kernels):
    given = attention_operands(seq, kind, start)
    floats, others = eqx.partition(given, eqx.is_inexact_array)
    d_out = jax.random.normal(jax.random.key(0), given[0].shape)
    d_out = d_out, d_out[..., 0]  # of the output and of the log-sum-exp

    def listed(floats):
        queries, positions, keys, sinks, *rest = eqx.combine(floats, others)
        entries, selection, segment_ids = rest
        parts = queries, keys, sinks, entries, positions, segment_ids, selection
        return attend_listed(*eqx.partition(parts, eqx.is_inexact_array))

    def reference(floats):
        return attend_reference(*eqx.combine(floats, others))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
    def with_gradients(attention, floats):
        out, pullback = jax.vjp(attention, floats)
        return out, pullback(d_out)

    found = jax.tree.leaves(with_gradients(listed, floats))
    expected = jax.tree.leaves(with_gradients(reference, floats))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, 3e-5, 3e-5)


def test_a_list_has_no_place_for_other_documents_entries():
    _, positions, keys, _, entries, _, ids = attention_operands(None, "all")
    _, used = key_lists(positions, keys.shape[1], entries, None, ids)
    window = keys.shape[1] - positions.shape[1] + 1
    seen = np.asarray(visible(entries, positions, ids)).sum(axis=2)
    np.testing.assert_array_equal(used, window + seen.reshape(-1))


def test_entries_are_listed_where_they_lie_in_a_stack():
    _, positions, keys, _, entries, *_ = attention_operands(30, "all")
    lists, used = key_lists(positions, keys.shape[1], entries, None, None)
    batch, count, _ = entries.shape
    stack = jnp.stack([jnp.zeros_like(entries.values)] * 2 + [entries.values], LAYERS)
    stacked = Entries(Slice(stack, jnp.array(2), LAYERS), entries.last_positions)
    others, also_used = key_lists(positions, keys.shape[1], stacked, None, None)
    first = batch * keys.shape[1]
    row, at = np.divmod(lists - first, count)
    shifted = np.where(lists >= first, first + (row * 3 + 2) * count + at, lists)
    np.testing.assert_array_equal(others, shifted)
    np.testing.assert_array_equal(used, also_used)


@pytest.mark.parametrize(
    "queries, heads, keys, splits",
    [(1, 64, 640, 5), (32, 64, 640, 4), (1, 128, 8192, 64), (4096, 64, 640, 1)],
)
def test_lists_of_few_queries_are_split(queries, heads, keys, splits):
    assert module._num_splits(queries, heads, keys) == splits
