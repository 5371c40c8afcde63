"""What attention and its indexer can show of a call: the results of `observe`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class IndexerValues(eqx.Module):
    """The compressed entries that each query selected; they have no gradient.

    An entry is named by its window: entry w has the tokens from `ratio * w` to
    `ratio * w + ratio - 1` of the query's document. Each query's windows ascend, then
    come -1.
    """

    windows: Int[Array, "batch seq selected"]  # -1 where it sees fewer entries
    scores: Float[Array, "batch seq selected"]  # eq. 16; minus infinity there


def no_selected(batch: int, seq: int) -> IndexerValues:
    """What the indexer shows of sequences too short for an entry."""
    shape = (batch, seq, 0)
    return IndexerValues(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


class IndexerDivergence(eqx.Module):
    """How far each query's index scores are from attention, for `indexer_loss`.

    In nats, over the entries that it attends to; 0 where there is none. The gradient
    of `kl` reaches the indexer's weights alone.
    """

    kl: Float[Array, "batch seq"]  # of attention from the softmax of the scores
    kl_uniform: Float[Array, "batch seq"]  # of attention from equal scores
    num_entries: Int[Array, "batch seq"]


class AttentionValues(eqx.Module):
    """What attention computed beside its output."""

    # Logarithm of the sum of the exponentials of all logits of a query, the sink's too.
    log_sum_exp: Float[Array, "batch seq heads"]
    indexer: IndexerValues | None  # None without an indexer
    divergence: IndexerDivergence | None = None  # None without an `Indexer`


def observed(part: Any, *args: Any) -> tuple[Any, Any]:
    """A part's output, and what its `observe` shows, or None if it has none.

    The first argument begins with the dimensions batch and seq; so must what it shows.
    """
    if not hasattr(part, "observe"):
        return part(*args), None
    out, values = part.observe(*args)
    for x in jax.tree.leaves(values):
        if jnp.shape(x)[:2] != args[0].shape[:2]:
            raise ValueError(
                f"{type(part).__name__}.observe shows an array of shape {jnp.shape(x)}:"
                " each must begin with the dimensions batch and seq of its input, "
                f"{args[0].shape[:2]}."
            )
    return out, values
