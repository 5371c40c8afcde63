"""What attention and its indexer can show of a call: the results of `observe`."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class IndexerValues(eqx.Module):
    """The compressed entries that each query selected; they have no gradient.

    An entry is named by its window: entry w has the tokens from `ratio * w` to
    `ratio * w + ratio - 1` of the query's document. Each query's come in this order.
    """

    windows: Int[Array, "batch seq selected"]  # -1 where it sees fewer entries
    scores: Float[Array, "batch seq selected"]  # eq. 16; minus infinity there


def no_selected(batch: int, seq: int) -> IndexerValues:
    """Of sequences without a complete window.

    **Arguments:**

    - `batch`, `seq`: of the queries.
    """
    shape = (batch, seq, 0)
    return IndexerValues(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


class AttentionValues(eqx.Module):
    """What attention computed beside its output."""

    # Logarithm of the sum of the exponentials of all logits of a query, the sink's too.
    log_sum_exp: Float[Array, "batch seq heads"]
    indexer: IndexerValues | None  # None without an indexer
