r"""How far the indexer is from attention, query by query: what trains the indexer.

DeepSeek-V3.2 (arXiv 2512.02556) section 2.1.1, eq. 3 and 4. In DeepSeek-V4, the heads'
softmax is over the window and the sink too, of which each head gives its entries
another share. Query t attends to entries j, all it sees or those it selected, with
heads h and logits c:

    p_hj = exp(c_hj - log_sum_exp_h)                  attention's weights
    T_j  = sum_h p_hj / sum_j sum_h p_hj              what the indexer is to learn
    L_t  = sum_j T_j (log T_j - log softmax_j(I_t))   I_t: its scores, eq. 16

The gradient in the scores is softmax(I_t) - T. Nothing but the indexer has a gradient.
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float

from dsv4_eqx.attention.values import IndexerDivergence
from dsv4_eqx.kernels.chosen import is_chosen, over_heads
from dsv4_eqx.kernels.entries import Entries, Selection, is_index
from dsv4_eqx.kernels.form import current_form
from dsv4_eqx.kernels.query_blocks import KEPT, map_blocks
from dsv4_eqx.numerics.precision import at_least_float32

# Finite, so that a softmax over nothing but such scores is not NaN.
_NO_SCORE: Final = -1e30
_MOST_QUERIES: Final = 256  # at a time

# Adds up numbers of some heads over the devices that have the others.
SumHeads = Callable[[Array], Array]


def same(sums: Array) -> Array:
    """The sums over heads where one device has all of them."""
    return sums


def divergence_by_blocks(
    attention: Any,
    per_query: tuple,
    entries: Entries | None,
    keys: Entries | None,
    sum_heads: SumHeads = same,
) -> IndexerDivergence:
    """The divergence of all queries of an `Attention`, one block of them at a time.

    `per_query` has latents, positions, log-sum-exps, head weights of the indexer, its
    selection and, where a row has several, documents. `keys` are the indexer's entries.
    They and the head weights are to be made of activations without gradient.
    """
    if entries is None or keys is None or entries.shape[1] == 0:
        return no_divergence(per_query[0])
    latent, positions, log_sum_exp, *others = per_query
    latent, log_sum_exp, entries = lax.stop_gradient((latent, log_sum_exp, entries))
    indexer, teacher = attention.indexer, lax.stop_gradient(attention)

    def run_block(per_query: tuple) -> IndexerDivergence:
        latent, positions, log_sum_exp, weights, selection, *documents = per_query
        queries = teacher.project_queries(latent, positions)
        sums = sum_heads(head_sums(queries, log_sum_exp, entries, selection))
        if selection is not None and is_index(selection):
            sums = checkpoint_name(sums, KEPT)  # few, for each query its own
        scores = indexer.score_chosen(latent, weights, positions, keys, selection)
        chosen = is_chosen(entries, positions, selection, *documents)
        return divergence(sums, scores, chosen)

    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    block = min(current_form().query_block, _MOST_QUERIES)
    run = jax.checkpoint(run_block, policy=policy)
    return map_blocks(run, (latent, positions, log_sum_exp, *others), block)


def head_sums(
    queries: Float[Array, "batch block heads head_dim"],
    log_sum_exp: Float[Array, "batch block heads"],
    entries: Entries,
    selection: Selection = None,
) -> Float[Array, "batch block chosen"]:
    """Attention's weights of each entry, added up over the heads."""
    scale = queries.shape[-1] ** -0.5

    def weights(products: Array) -> Array:
        return jnp.sum(jnp.exp(products * scale - log_sum_exp[..., None]), axis=2)

    return over_heads(weights, queries, entries, selection)


def divergence(
    sums: Float[Array, "batch block chosen"],
    scores: Float[Array, "batch block chosen"],
    is_chosen: Bool[Array, "batch block chosen"],
) -> IndexerDivergence:
    """L_t, from the sums over heads and the indexer's scores of the same entries."""
    sums = lax.stop_gradient(jnp.where(is_chosen, sums, 0))
    total = jnp.sum(sums, axis=-1, keepdims=True)
    target = sums / jnp.maximum(total, jnp.finfo(sums.dtype).tiny)
    scores = at_least_float32(scores)
    log_softmax = jax.nn.log_softmax(jnp.where(is_chosen, scores, _NO_SCORE), axis=-1)
    negative_entropy = jnp.sum(xlogy(target, target), axis=-1)
    kl = negative_entropy - jnp.sum(target * log_softmax, axis=-1)
    num_entries = jnp.sum(is_chosen, axis=-1, dtype=jnp.int32)
    log_num = jnp.log(jnp.maximum(num_entries, 1).astype(target.dtype))
    kl_uniform = negative_entropy + jnp.sum(target, axis=-1) * log_num
    return IndexerDivergence(kl, kl_uniform, num_entries)


def no_divergence(latent: Float[Array, "batch seq q_rank"]) -> IndexerDivergence:
    """That of sequences too short for an entry."""
    zeros = jnp.zeros_like(at_least_float32(latent[..., 0]))
    return IndexerDivergence(zeros, zeros, zeros.astype(jnp.int32))
