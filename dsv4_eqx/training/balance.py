r"""The router's balance loss, document by document.

Paper section 4.2.2, in the form of DeepSeek-V3. A document has T tokens, each of which
goes to K of E experts:

    s'_ti = s_ti / sum_i s_ti                              scores without bias
    f_i   = E / (K T) * (how many tokens chose expert i)   no gradient
    P_i   = 1 / T * sum_t s'_ti
    L     = alpha * sum_i f_i P_i                          alpha where loads are equal
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv4_eqx.attention.documents import document_starts, validate_segment_ids
from dsv4_eqx.model.inputs import SegmentIds
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.moe.router import Routing
from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.validation import invalid_argument, validate_number
from dsv4_eqx.sharding.sharded_model import model_on_device
from dsv4_eqx.training.routers import scoring_routers


class BalanceParts(eqx.Module):
    """What `balance_loss` consists of, layer by layer, for logging."""

    losses: Float[Array, " layers"]
    # How many tokens the most popular expert has, over the mean of all experts.
    largest_load: Float[Array, " layers"]


def balance_loss(
    routings: Routing | Sequence[Routing],
    segment_ids: SegmentIds = None,
    *,
    alpha: float = 1e-4,
) -> tuple[Float[Array, ""], BalanceParts]:
    """The balance loss of each layer, a mean over documents, added up over layers.

    Equal loads give `alpha` for each layer. It works under `jit` on what a model over a
    mesh shows, too.

    **Arguments:**

    - `routings`: one `Routing` or several, as `observe` shows them; those of a model
        from `scored_routings(model, layers)`, without the layers that hash.
    - `segment_ids`: the number of each token's document; below 0 it is padding, which
        takes no part. Without it, each row is one document.
    - `alpha`: the weight of the loss.

    **Returns:** the loss and its `BalanceParts`.

    **Raises:** ValueError if there is no routing, one has no scores or other tokens
    than the segment ids, or `alpha` is no number of at least 0.
    """
    call = "balance_loss"
    routings = (routings,) if isinstance(routings, Routing) else tuple(routings)
    alpha = validate_number(call, "alpha", alpha)
    if not routings:
        raise invalid_argument(call, "routings", routings, "at least one Routing")
    for routing in routings:
        _validate_routing(call, routing, segment_ids)
    starts = is_token = None
    if segment_ids is not None:
        starts = document_starts(segment_ids)
        # Compared as they are: JAX would cut numpy's 64 bits.
        is_token = jnp.asarray(segment_ids >= 0)
    parts = [_of_layer(routing, starts, is_token) for routing in routings]
    losses, loads = (jnp.stack(part) for part in zip(*parts, strict=True))
    losses = alpha * losses
    return jnp.sum(losses), BalanceParts(losses, loads)


def scored_routings(model: Any, layers: Sequence[LayerValues]) -> tuple[Routing, ...]:
    """The routings of the layers that choose experts by score; not of those that hash.

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`.
    - `layers`: what its `observe` or `observe_streams` shows.

    **Raises:** ValueError if the model is another, or has another number of layers.
    """
    call = "scored_routings"
    inner = model_on_device(call, model)
    num_layers = len(inner.layers)
    if len(layers) != num_layers:
        allowed = f"of the model's {num_layers} layers"
        raise invalid_argument(call, "layers", f"{len(layers)} layers", allowed)
    found = sorted(i for placed in scoring_routers(inner) for i in placed.layers)
    return tuple(layers[i].routing for i in found if i < num_layers)


def _of_layer(
    routing: Routing,
    starts: Int[Array, "batch seq"] | None,
    is_token: Bool[Array, "batch seq"] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A layer's loss for an alpha of 1, and its largest load."""
    assert routing.scores is not None
    scores = at_least_float32(routing.scores)
    num_experts, slots = scores.shape[-1], routing.experts.shape[-1]
    total = jnp.sum(scores, axis=-1, keepdims=True)
    share = scores / jnp.where(total > 0, total, 1)  # all scores may underflow
    chosen = _count(routing.experts, num_experts).astype(scores.dtype)
    length = jnp.ones_like(total)
    if is_token is not None:
        share, chosen, length = (
            jnp.where(is_token[..., None], x, 0) for x in (share, chosen, length)
        )
    # [batch, documents, ...]; a document lies where its first token does.
    share, counts, length = (_sum_documents(x, starts) for x in (share, chosen, length))
    tokens = jnp.maximum(length, 1)
    load = counts * num_experts / (slots * tokens)
    losses = jnp.sum(load * (share / tokens), axis=-1)  # 0 where there is no document
    num_documents = jnp.maximum(jnp.sum(length > 0, dtype=losses.dtype), 1)
    counts = jnp.sum(counts, axis=(0, 1))
    largest = jnp.max(counts) / jnp.maximum(jnp.mean(counts), 1e-30)
    return jnp.sum(losses) / num_documents, largest


def _count(
    experts: Int[Array, "batch seq slots"], num_experts: int
) -> Int[Array, "batch seq routes"]:
    """How often each token goes to each expert."""
    every = jnp.arange(num_experts, dtype=experts.dtype)[None, None, None]
    is_chosen = experts[..., None] == every
    return jnp.sum(is_chosen, axis=-2, dtype=jnp.int32)


def _sum_documents(
    x: Float[Array, "batch seq channels"], starts: Int[Array, "batch seq"] | None
) -> Float[Array, "batch documents channels"]:
    """Sums over the tokens of each document, at its first token; zeros elsewhere."""
    if starts is None:
        return jnp.sum(x, axis=1, keepdims=True)
    return jax.vmap(lambda row, at: jnp.zeros_like(row).at[at].add(row))(x, starts)


def _validate_routing(call: str, routing: Any, segment_ids: Any) -> None:
    """Refuses what has no scores, or not those of the tokens of `segment_ids`."""
    if not isinstance(routing, Routing):
        name = type(routing).__name__
        raise invalid_argument(call, "routings", name, "a Routing, or several")
    if routing.scores is None:
        raise ValueError(
            f"{call}: a router gives no scores of experts: leave out its routing, or "
            "return a Routing with scores."
        )
    scores, experts = routing.scores.shape, routing.experts.shape
    if len(scores) != 3 or len(experts) != 3 or scores[:2] != experts[:2]:
        raise ValueError(
            f"{call}: scores of shape {scores} and experts of shape {experts} must "
            "have the dimensions batch and seq, then one more."
        )
    if segment_ids is not None:
        validate_segment_ids(call, segment_ids, scores[:2])
