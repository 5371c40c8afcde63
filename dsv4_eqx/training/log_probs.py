"""Log-probabilities of given tokens, as reinforcement learning needs them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_eqx.model.abstract import AbstractModel
from dsv4_eqx.model.given_experts import GivenExperts
from dsv4_eqx.model.inputs import (
    SegmentIds,
    TokenIds,
    token_places,
    validate_streams,
    validate_token_ids,
    validate_two_tokens,
)
from dsv4_eqx.numerics.validation import validate_size


def token_log_probs(
    model: AbstractModel,
    tokens: TokenIds,
    segment_ids: SegmentIds = None,
    *,
    streams: Float[Array, "batch seq streams dim"] | None = None,
    experts: GivenExperts = None,
    chunk: int = 256,
    remat: bool = False,
) -> Float[Array, "batch seq-1"]:
    r"""$\log P(t_{p+1} \mid t_0 \ldots t_p)$ of each token but the first, float32.

    They are those of decoding at temperature 1, `Generated.log_probabilities`, and have
    gradients. Logits of few tokens are held at a time. It works on a model of one
    device and over a mesh, where the model runs on all `seq` tokens: give a multiple of
    `context`.

    A document's first token has nothing before it: its log-probability is 0, and so is
    that of padding.

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`.
    - `tokens`: the token ids, prompt and completion; at least two a row.
    - `segment_ids`: the number of each token's document; below 0 it is padding. Without
        it, each row is one document.
    - `streams`: from `model.streams` or `observe_streams` of the same tokens; by
        default they are computed.
    - `experts`: as for calling the model, where streams are computed: those of the
        model that sampled the tokens.
    - `chunk`: as for `model.cross_entropy`.
    - `remat`: as for calling the model.

    **Returns:** log-probabilities; index p is of token p + 1.

    **Raises:** ValueError if tokens, segment ids or experts do not fit, as for calling
    the model, there is a single token, `streams` have another shape, or `chunk` is not
    a positive integer.
    """
    call = "token_log_probs"
    token_ids = validate_token_ids(call, tokens, model.config.vocab_size)
    validate_two_tokens(call, token_ids)
    _, starts = token_places(call, token_ids, segment_ids)
    chunk = validate_size(call, "chunk", chunk)
    if streams is None:
        options = {} if experts is None else {"experts": experts}
        streams = model.streams(token_ids, segment_ids, remat=remat, **options)
    validate_streams(call, streams, token_ids)
    # All positions, so that a mesh splits them as it does the streams.
    targets = jnp.pad(token_ids[:, 1:], ((0, 0), (0, 1)))
    is_target = jnp.ones(token_ids.shape, bool).at[:, -1].set(False)
    if starts is not None and segment_ids is not None:
        following = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)))
        # Compared as they are: JAX would cut numpy's 64 bits.
        is_target &= (following == starts) & jnp.asarray(segment_ids >= 0)
    hidden = model.collapse(streams)
    return -model.cross_entropy(hidden, targets, is_target, chunk=chunk)[:, :-1]
