"""The indexers' loss: their scores learn what attention gives to the entries.

DeepSeek-V3.2 (arXiv 2512.02556) section 2.1.1; `attention/divergence.py` has the
formula. In the first of two stages attention is dense, and an indexer learns from all
entries that a query sees; in the second it learns from those that it selects. No other
loss reaches an indexer, and this one reaches nothing else.
"""

from collections.abc import Sequence
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_eqx.attention.documents import validate_segment_ids
from dsv4_eqx.attention.indexer import Indexer
from dsv4_eqx.attention.values import AttentionValues, IndexerDivergence
from dsv4_eqx.model.inputs import SegmentIds
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.numerics.validation import invalid_argument, validate_number

_ALL_ENTRIES: Final = 1 << 30  # more than any sequence has


class IndexerParts(eqx.Module):
    """What `indexer_loss` consists of, for logging: of each layer with an indexer.

    Means over queries, in nats. Without queries that see an entry all are 0.
    """

    kl: Float[Array, " layers"]  # of attention from the indexer
    kl_uniform: Float[Array, " layers"]  # of attention from equal scores
    captured: Float[Array, " layers"]  # 1 - kl / kl_uniform: 1 is best


def indexer_loss(
    layers: Sequence[LayerValues],
    segment_ids: SegmentIds = None,
    *,
    coefficient: float = 1e-2,
) -> tuple[Float[Array, ""], IndexerParts]:
    r"""How far indexers are from attention: a mean over queries, a sum over layers.

    $L = \alpha \sum_{\mathrm{layers}} \frac1N \sum_t \mathrm{KL}(T_t \,\|\,
    \mathrm{softmax}(I_t))$ over the N queries that see an entry and are no padding. T
    is what attention's heads give to the entries, I the index scores.

    Its gradient is zero everywhere but in the indexers, which `trainable` leaves out
    unless it is asked for them. It works under `jit` and on what a model over a mesh
    shows, too. Beside the other losses, with what was selected:

        streams, layers = model.observe_streams(tokens, segment_ids, remat=True)
        loss, parts = next_token_loss(model, tokens, segment_ids, streams=streams)
        indexer, indexer_parts = indexer_loss(layers, segment_ids)

    To warm up indexers alone, with all entries:

        trained, rest = eqx.partition(model, indexer_mask(model))
        ...
        model = attend_densely(eqx.combine(trained, rest))  # inside of the loss
        loss, parts = indexer_loss(model.observe_streams(tokens)[1], coefficient=1.0)

    **Arguments:**

    - `layers`: what `observe` or `observe_streams` shows; layers without an `Indexer`
        take no part.
    - `segment_ids`: the number of each token's document, as the model was given them;
        below 0 it is padding, which takes no part.
    - `coefficient`: the weight of the loss. An optimizer that normalises its steps
        hardly depends on it; a clipped global norm does.

    **Returns:** the loss and its `IndexerParts`.

    **Raises:** ValueError if no layer shows an indexer's divergence, the segment ids
    are not those of the tokens, or `coefficient` is no number of at least 0.
    """
    call = "indexer_loss"
    coefficient = validate_number(call, "coefficient", coefficient)
    found = [x for x in map(_divergence_of, layers) if x is not None]
    if not found:
        shown = f"{len(layers)} layers without an Indexer"
        raise invalid_argument(call, "layers", shown, "what observe shows of indexers")
    is_token = None
    if segment_ids is not None:
        validate_segment_ids(call, segment_ids, found[0].kl.shape)
        # Compared as they are: JAX would cut numpy's 64 bits.
        is_token = jnp.asarray(segment_ids >= 0)
    parts = [_means(divergence, is_token) for divergence in found]
    kl, kl_uniform = (jnp.stack(part) for part in zip(*parts, strict=True))
    is_uniform = kl_uniform <= 0  # nothing to learn
    captured = 1 - kl / jnp.where(is_uniform, 1, kl_uniform)
    parts = IndexerParts(kl, kl_uniform, jnp.where(is_uniform, 0, captured))
    return coefficient * jnp.sum(kl), jax.lax.stop_gradient(parts)


def attend_densely(model: Any) -> Any:
    """The model with indexers that select all entries: for the first stage of training.

    The arrays are the same. Attention then costs as much as the square of the sequence.
    Call it inside of the loss, so that gradients have the tree of the model itself.

    **Arguments:**

    - `model`: a model, or a part of one.
    """

    def dense(node: Any) -> Any:
        return node.with_topk(_ALL_ENTRIES) if isinstance(node, Indexer) else node

    return jax.tree.map(dense, model, is_leaf=lambda x: isinstance(x, Indexer))


def _divergence_of(layer: Any) -> IndexerDivergence | None:
    """What a layer shows of its indexer; None for parts of one's own."""
    attention = getattr(layer, "attention", None)
    return attention.divergence if isinstance(attention, AttentionValues) else None


def _means(
    divergence: IndexerDivergence, is_token: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A layer's two divergences over the queries that see an entry."""
    counts = divergence.num_entries > 0
    counts = counts if is_token is None else counts & is_token
    num_queries = jnp.maximum(jnp.sum(counts), 1)

    def mean(x: Array) -> Array:
        return jnp.sum(x, where=counts) / num_queries.astype(x.dtype)

    return mean(divergence.kl), mean(divergence.kl_uniform)
