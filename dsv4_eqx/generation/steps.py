"""The steps of generation: one new token a row, or up to two with speculation.

Speculative decoding: the prediction block drafts the token after next; the model reads
the next token and the draft at once, which costs hardly more than one, and keeps the
draft where it would have chosen it (Leviathan et al. 2023; DeepSeek-V3 section 2.2).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PRNGKeyArray

from dsv4_eqx.generation.prompt import Caches, last_of
from dsv4_eqx.generation.sampling import Sampling
from dsv4_eqx.model.abstract import AbstractModel, Cache
from dsv4_eqx.model.mtp import MTPCache


class Draft(eqx.Module):
    """What the prediction block expects after the next token."""

    cache: MTPCache
    token: Int32[Array, " batch"]
    log_weights: Float[Array, "batch vocab"] | None  # that it was drawn from
    num_drafted: Int32[Array, " batch"]
    num_accepted: Int32[Array, " batch"]


class State(eqx.Module):
    """A generation under way: each row has a next token, or is done."""

    cache: Cache
    token: Int32[Array, " batch"]  # chosen, not read yet
    lengths: Int32[Array, " batch"]  # chosen so far
    is_done: Bool[Array, " batch"]
    key: Key[Array, ""] | None
    draft: Draft | None


class Chosen(NamedTuple):
    """Tokens that a step gave; what is beyond a row's count means nothing."""

    tokens: Int32[Array, "batch most"]
    log_probabilities: Float32[Array, "batch most"]
    counts: Int32[Array, " batch"]


class Rules(NamedTuple):
    """How tokens are chosen, and when a row ends."""

    sampling: Sampling
    stops: Int[Array, " ids"]
    limit: int | Int[Array, ""]  # tokens of each row

    def end(
        self, tokens: Int[Array, " batch"], lengths: Int[Array, " batch"]
    ) -> Bool[Array, " batch"]:
        """Whether rows end with these tokens.

        **Arguments:**

        - `tokens`: the last token of each row.
        - `lengths`: tokens of each row, with it.
        """
        return self.are_stops(tokens) | (lengths >= self.limit)

    def are_stops(self, tokens: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        """Whether these tokens end their rows wherever they come.

        **Arguments:**

        - `tokens`: one of each row.
        """
        return jnp.any(tokens[:, None] == self.stops, axis=1)


def start(
    model: AbstractModel,
    caches: Caches,
    streams: Float[Array, "batch streams dim"],
    key: PRNGKeyArray | None,
    rules: Rules,
) -> tuple[State, Chosen]:
    """The first token after the prompts.

    **Arguments:**

    - `model`: the model.
    - `caches`, `streams`: from `read_prompt`.
    - `key`: randomness, if tokens are drawn.
    - `rules`: how tokens are chosen.
    """
    key, now, draft_key = _split(key)
    logits = _logits(model, streams)
    token = rules.sampling(logits, now)
    ones = jnp.ones_like(token)
    draft = None
    if caches.mtp is not None:
        draft = Draft(caches.mtp, token, None, 0 * ones, 0 * ones)
        draft = _redraft(
            model, draft, streams[:, None], token[:, None], ones, rules, draft_key
        )
    is_done = rules.end(token, ones)
    state = State(caches.model, token, ones, is_done, key, draft)
    chosen = _log_probability(logits, token)
    return state, Chosen(token[:, None], chosen[:, None], ones)


def step(model: AbstractModel, state: State, rules: Rules) -> tuple[State, Chosen]:
    """The next tokens of the rows that are not done.

    **Arguments:**

    - `model`: the model.
    - `state`: from `start` or another step.
    - `rules`: how tokens are chosen.
    """
    if state.draft is not None:
        return _speculative_step(model, state, state.draft, rules)
    key, now, _ = _split(state.key)
    counts = (~state.is_done).astype(jnp.int32)
    streams, cache = model.extend_streams(state.token[:, None], state.cache, counts)
    logits = _logits(model, streams[:, 0])
    token = jnp.where(state.is_done, state.token, rules.sampling(logits, now))
    lengths = state.lengths + counts
    is_done = state.is_done | rules.end(token, lengths)
    chosen = _log_probability(logits, token)
    state = State(cache, token, lengths, is_done, key, None)
    return state, Chosen(token[:, None], chosen[:, None], counts)


def _speculative_step(
    model: AbstractModel, state: State, draft: Draft, rules: Rules
) -> tuple[State, Chosen]:
    key, now, draft_key = _split(state.key)
    room = jnp.where(state.is_done, 0, rules.limit - state.lengths)
    read = jnp.minimum(room, 2)
    tokens = jnp.stack([state.token, draft.token], axis=1)
    streams, lookahead = model.lookahead(tokens, state.cache, read)
    logits = _logits(model, streams)
    is_accepted, following = rules.sampling.verify(
        logits, draft.token, draft.log_weights, now
    )
    first = jnp.where(is_accepted, draft.token, following)
    goes_on = is_accepted & ~rules.are_stops(first)
    counts = jnp.where(goes_on, read, jnp.minimum(read, 1))
    token = jnp.where(
        counts == 2, following, jnp.where(counts == 1, first, state.token)
    )
    tokens = jnp.stack([first, following], axis=1)
    chosen = Chosen(tokens, _log_probability(logits, tokens), counts)
    lengths = state.lengths + counts
    is_judged = room >= 2
    draft = Draft(
        draft.cache,
        draft.token,
        draft.log_weights,
        draft.num_drafted + is_judged.astype(jnp.int32),
        draft.num_accepted + (is_judged & is_accepted).astype(jnp.int32),
    )
    draft = _redraft(model, draft, streams, tokens, counts, rules, draft_key)
    is_done = state.is_done | rules.end(token, lengths)
    cache = lookahead.keep(counts)
    return State(cache, token, lengths, is_done, key, draft), chosen


def _redraft(
    model: AbstractModel,
    draft: Draft,
    streams: Float[Array, "batch seq streams dim"],
    tokens: Int[Array, "batch seq"],
    counts: Int[Array, " batch"],
    rules: Rules,
    key: PRNGKeyArray | None,
) -> Draft:
    """Another draft.

    **Arguments:**

    - `model`, `draft`: so far.
    - `streams`: of the tokens that the model has read since.
    - `tokens`: their successors.
    - `counts`: how many of each row.
    - `rules`: how tokens are chosen.
    - `key`: randomness, if they are drawn.
    """
    hidden, cache = model.extend_mtp(streams, tokens, draft.cache, counts)
    logits = model.unembed(last_of(hidden, counts))
    log_weights = None if key is None else rules.sampling.cut(logits)
    token = rules.sampling(logits, key)
    return Draft(cache, token, log_weights, draft.num_drafted, draft.num_accepted)


def _logits(
    model: AbstractModel, streams: Float[Array, "*batch streams dim"]
) -> Float[Array, "*batch vocab"]:
    return model.unembed(model.collapse(streams))


def _log_probability(
    logits: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]
) -> Float32[Array, "*batch"]:
    """Natural, at temperature 1."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return chosen[..., 0].astype(jnp.float32)


def _split(key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, ...]:
    """A key to keep and two to use, if there is one."""
    return (None, None, None) if key is None else tuple(jax.random.split(key, 3))
