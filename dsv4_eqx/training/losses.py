"""The loss over the next token, and over the token after next, of rows of documents.

Paper section 2; the weight of the prediction block is in section 4.2.2.
"""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv4_eqx.model.abstract import AbstractModel
from dsv4_eqx.model.inputs import (
    SegmentIds,
    TokenIds,
    token_places,
    validate_mask,
    validate_prediction_block,
    validate_streams,
    validate_token_ids,
    validate_two_tokens,
)
from dsv4_eqx.numerics.validation import validate_number, validate_size


class NextTokenParts(eqx.Module):
    """What `next_token_loss` consists of, for logging: nats are means over targets."""

    next_token: Float[Array, ""]  # nats
    num_targets: Int[Array, ""]
    # Of the prediction block, None if it takes no part.
    ahead: Float[Array, ""] | None
    num_ahead: Int[Array, ""] | None


def next_token_loss(
    model: AbstractModel,
    tokens: TokenIds,
    segment_ids: SegmentIds = None,
    mask: Bool[Array | np.ndarray, "batch seq"] | None = None,
    *,
    streams: Float[Array, "batch seq streams dim"] | None = None,
    mtp_weight: float | Float[Array, ""] = 0.0,
    chunk: int = 256,
    remat: bool = False,
) -> tuple[Float[Array, ""], NextTokenParts]:
    r"""The mean cross-entropy of the next token, and of the token after next.

    $L = -\frac1N \sum_p \log P_p(t_{p+1}) - \frac\lambda{N'} \sum_p \log P'_p(t_{p+2})$

    over the positions p whose target is in the same document, is not masked and is no
    padding. Without any target a mean is 0. It works on a model of one device and over
    a mesh, in `eqx.filter_value_and_grad(has_aux=True)`.

    The model runs on all `seq` tokens: over a mesh, give a multiple of `context`. To
    have other losses of the same run, run it yourself:

        streams, layers = model.observe_streams(tokens, segment_ids, remat=True)
        loss, parts = next_token_loss(model, tokens, segment_ids, streams=streams)
        balance, _ = balance_loss(scored_routings(model, layers), segment_ids)

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`.
    - `tokens`: the token ids; each is the target of the position before it.
    - `segment_ids`: the number of each token's document; below 0 it is padding, which
        is no target. Without it, each row is one document.
    - `mask`: which tokens are targets, as those of a completion; all by default.
    - `streams`: from `model.streams` or `observe_streams` of the same tokens; by
        default they are computed.
    - `mtp_weight`: weight of the prediction block's loss, 0.3 and later 0.1 in the
        paper. The block does not run if it is 0, unless it is traced.
    - `chunk`: as for `model.cross_entropy`: the most tokens whose logits are held at
        once. More need more memory, and less time.
    - `remat`: as for calling the model.

    **Returns:** the loss and its `NextTokenParts`. To add up microbatches with
    different numbers of targets, weigh each by `parts.num_targets`.

    **Raises:** ValueError if tokens, segment ids or mask do not fit, as for calling
    the model, there is a single token, `streams` have another shape, a number is not as
    described, or the model has no prediction block that the weight needs.
    """
    call = "next_token_loss"
    token_ids = validate_token_ids(call, tokens, model.config.vocab_size)
    validate_two_tokens(call, token_ids)
    _, starts = token_places(call, token_ids, segment_ids)
    if mask is not None:
        validate_mask(call, mask, token_ids.shape)
    chunk = validate_size(call, "chunk", chunk)
    if not isinstance(mtp_weight, jax.core.Tracer):
        mtp_weight = validate_number(call, "mtp_weight", mtp_weight)
    has_ahead = isinstance(mtp_weight, jax.core.Tracer) or mtp_weight > 0
    if has_ahead:
        validate_prediction_block(call, model.num_mtp)
    if streams is None:
        streams = model.streams(token_ids, segment_ids, remat=remat)
    validate_streams(call, streams, token_ids)
    may_count = _may_count(token_ids, segment_ids, mask)

    def mean_nats(hidden: Array, steps: int) -> tuple[Array, Array]:
        """The mean of the targets so many steps ahead, and their number."""
        is_target = _ahead(may_count, steps)
        if starts is not None:
            is_target = is_target & (_ahead(starts, steps) == starts)
        targets = _ahead(token_ids, steps)
        nats = model.cross_entropy(hidden, targets, is_target, chunk=chunk)
        num_targets = jnp.sum(is_target, dtype=jnp.int32)
        divisor = jnp.maximum(num_targets, 1).astype(nats.dtype)
        return jnp.sum(nats) / divisor, num_targets

    loss, num_targets = mean_nats(model.collapse(streams), 1)
    if not has_ahead:
        return loss, NextTokenParts(loss, num_targets, None, None)
    hidden = model.hidden_ahead(streams, token_ids, segment_ids)
    ahead, num_ahead = mean_nats(hidden, 2)
    parts = NextTokenParts(loss, num_targets, ahead, num_ahead)
    return loss + jnp.asarray(mtp_weight, ahead.dtype) * ahead, parts


def _may_count(
    token_ids: Int[Array, "batch seq"], segment_ids: Any, mask: Any
) -> Bool[Array, "batch seq"]:
    """Which tokens may be targets, of whatever position before them."""
    may_count = jnp.ones(token_ids.shape, bool) if mask is None else jnp.asarray(mask)
    # Compared as they are: JAX would cut numpy's 64 bits.
    return may_count if segment_ids is None else may_count & (segment_ids >= 0)


def _ahead(x: Array, steps: int) -> Array:
    """Of each position, what stands so many steps after it; zeros at the end."""
    return jnp.pad(x[:, steps:], ((0, 0), (0, steps)))
