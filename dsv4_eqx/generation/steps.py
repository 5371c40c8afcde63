"""The steps of generation: one new token a row, or up to two with speculation.

Speculative decoding: the prediction block drafts the token after next. The model reads
the next token and the draft together, which costs hardly more than reading one, and
keeps the draft if it would have chosen it (Leviathan et al. 2023; DeepSeek-V3 section
2.2).

A step has two halves. `look` reads tokens and chooses the tokens after them; `settle`
decides how many are kept. Between the two the host may end rows, as at a stop string.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PRNGKeyArray

from dsv4_eqx.generation.prompt import Caches, last_of
from dsv4_eqx.generation.sampling import Sampling
from dsv4_eqx.model.abstract import AbstractModel, Cache, Lookahead
from dsv4_eqx.model.mtp import MTPCache

# From logits, the tokens of each row so far, and their number, to new logits.
LogitsFn = Callable[
    [Float[Array, "batch vocab"], Int[Array, "batch room"], Int[Array, " batch"]],
    Float[Array, "batch vocab"],
]


class Rows(eqx.Module):
    """The tokens of each row: its prompt, and what was chosen after it."""

    tokens: Int32[Array, "batch room"]  # then zeros
    log_probabilities: Float32[Array, "batch room"]  # of chosen tokens
    prompt_lengths: Int32[Array, " batch"]
    lengths: Int32[Array, " batch"]  # prompt included
    is_done: Bool[Array, " batch"]
    num_drafted: Int32[Array, " batch"]  # drafts that the model has verified
    num_accepted: Int32[Array, " batch"]

    @property
    def last_tokens(self) -> Int32[Array, " batch"]:
        """Each row's last token, which the model has not read yet."""
        return last_of(self.tokens, self.lengths)

    def append(
        self,
        tokens: Int[Array, "batch new"],
        log_probabilities: Float[Array, "batch new"],
        counts: Int[Array, " batch"],
    ) -> "Rows":
        """The rows, each with the first `counts` of its new tokens at its end."""
        size, index = self.tokens.shape[1], jnp.arange(tokens.shape[1])[None]
        is_taken = index < counts[:, None]
        place = jnp.where(is_taken, self.lengths[:, None] + index, size)
        put = jax.vmap(lambda row, place, new: row.at[place].set(new, mode="drop"))
        return dataclasses.replace(
            self,
            tokens=put(self.tokens, place, tokens),
            log_probabilities=put(self.log_probabilities, place, log_probabilities),
            lengths=self.lengths + counts,
        )


class Draft(eqx.Module):
    """The token that the prediction block expects after each row's last token."""

    cache: MTPCache
    token: Int32[Array, " batch"]
    logits: Float[Array, "batch vocab"] | None  # that the token was drawn from


class State(eqx.Module):
    """The state between steps; the cache has all tokens of a row but the last."""

    cache: Cache
    rows: Rows
    draft: Draft | None
    key: Key[Array, ""] | None


class Rules(eqx.Module):
    """How tokens are chosen, and when a row ends."""

    sampling: Sampling
    eos_ids: Int[Array, " ids"]
    limit: Int[Array, ""]  # new tokens of each row
    logits_fn: Callable | None = eqx.field(static=True)  # a `LogitsFn`

    def adjust(
        self, logits: Float[Array, "batch vocab"], rows: Rows
    ) -> Float[Array, "batch vocab"]:
        """The logits that tokens are chosen from, given the model's."""
        if self.logits_fn is None:
            return logits
        adjusted = self.logits_fn(logits, rows.tokens, rows.lengths)
        if jnp.shape(adjusted) != logits.shape:
            raise ValueError(
                f"logits_fn gave the shape {jnp.shape(adjusted)} for logits of the "
                f"shape {logits.shape}: it must give the same shape."
            )
        return jnp.asarray(adjusted, logits.dtype)

    def are_eos(self, tokens: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        """Whether these tokens, one of each row, end their rows."""
        return jnp.any(tokens[:, None] == self.eos_ids[None], axis=1)

    def room(self, rows: Rows) -> Int[Array, " batch"]:
        """How many more tokens each row may get."""
        new = rows.lengths - rows.prompt_lengths
        return jnp.where(rows.is_done, 0, self.limit - new)


class Chosen(eqx.Module):
    """New tokens of a step; `settle` keeps the first `counts` of each row."""

    tokens: Int32[Array, "batch new"]
    log_probabilities: Float32[Array, "batch new"]
    counts: Int32[Array, " batch"]
    is_last: Bool[Array, " batch"]  # whether the row ends with them
    streams: Float[Array, "batch new streams dim"]  # at the token before each
    num_drafted: Int32[Array, " batch"]
    num_accepted: Int32[Array, " batch"]


def begin(
    model: AbstractModel,
    caches: Caches,
    streams: Float[Array, "batch streams dim"],
    rows: Rows,
    key: PRNGKeyArray | None,
    rules: Rules,
) -> tuple[State, Chosen]:
    """The state after the prompts, and the first new token, for `settle`."""
    draft = None
    if caches.mtp is not None:
        unused = rows.last_tokens  # `settle` drafts before a draft is read
        draft = Draft(caches.mtp, unused, None)
    _, choice_key, _ = _split(key)
    counts = jnp.ones_like(rows.lengths)
    chosen = _choose(model, streams[:, None], rows, counts, rules, choice_key)
    return State(caches.model, rows, draft, key), chosen


def step(model: AbstractModel, state: State, rules: Rules) -> tuple[State, Chosen]:
    """The state after another step, and the tokens that it gave."""
    rows, draft, key = state.rows, state.draft, state.key
    chosen, after = look(model, state.cache, rows, draft, key, rules)
    return settle(model, after, rows, draft, key, chosen, rules), chosen


def look(
    model: AbstractModel,
    cache: Cache,
    rows: Rows,
    draft: Draft | None,
    key: PRNGKeyArray | None,
    rules: Rules,
) -> tuple[Chosen, Cache | Lookahead]:
    """The next tokens, and the cache after each row's last token and its draft, if any.

    Of the state, the cache alone may be donated: `settle` needs the rest.
    """
    _, choice_key, _ = _split(key)
    if draft is not None:
        return _look_ahead(model, cache, rows, draft, choice_key, rules)
    counts = (~rows.is_done).astype(jnp.int32)
    last = rows.last_tokens[:, None]
    streams, cache = model.extend_streams(last, cache, counts)
    return _choose(model, streams, rows, counts, rules, choice_key), cache


def settle(
    model: AbstractModel,
    after: Cache | Lookahead,
    rows: Rows,
    draft: Draft | None,
    key: PRNGKeyArray | None,
    chosen: Chosen,
    rules: Rules,
) -> State:
    """The state with the new tokens that are kept, and with the next draft.

    `after` and `chosen` are from `look` or `begin`; the rest is of the state before.
    """
    key, _, draft_key = _split(key)
    counts = chosen.counts
    cache = after if isinstance(after, Cache) else after.keep(counts)
    rows = rows.append(chosen.tokens, chosen.log_probabilities, counts)
    rows = dataclasses.replace(
        rows,
        is_done=rows.is_done | chosen.is_last,
        num_drafted=rows.num_drafted + chosen.num_drafted,
        num_accepted=rows.num_accepted + chosen.num_accepted,
    )
    if draft is not None:
        draft = _redraft(model, draft, chosen, rows, rules, draft_key)
    return State(cache, rows, draft, key)


def _choose(
    model: AbstractModel,
    streams: Float[Array, "batch 1 streams dim"],
    rows: Rows,
    counts: Int[Array, " batch"],
    rules: Rules,
    key: PRNGKeyArray | None,
) -> Chosen:
    """The next token of each row."""
    logits = _logits(model, streams)
    token = rules.sampling(rules.adjust(logits[:, 0], rows), key)
    is_last = rules.are_eos(token) | (rules.room(rows) <= 1)
    log_probabilities = _log_probabilities(logits, token[:, None])
    zeros = jnp.zeros_like(counts)
    return Chosen(
        token[:, None], log_probabilities, counts, is_last, streams, zeros, zeros
    )


def _look_ahead(
    model: AbstractModel,
    cache: Cache,
    rows: Rows,
    draft: Draft,
    key: PRNGKeyArray | None,
    rules: Rules,
) -> tuple[Chosen, Lookahead]:
    """Up to two tokens of each row:

    | the row | its draft | new tokens |
    |---|---|---|
    | is done | | none |
    | goes on | is rejected | another token in its place |
    | goes on | is accepted, and ends the row | the draft |
    | goes on | is accepted, and does not end it | the draft and the token after it |
    """
    room = rules.room(rows)
    read = jnp.minimum(room, 2)  # no draft where only one token is allowed
    tokens = jnp.stack([rows.last_tokens, draft.token], axis=1)
    streams, lookahead = model.lookahead(tokens, cache, read)
    logits = _logits(model, streams)
    ones = jnp.ones_like(room)
    unused = jnp.zeros_like(logits[:, :1, 0])  # no rule reads log-probabilities
    with_draft = rows.append(draft.token[:, None], unused, ones)
    adjusted = jnp.stack(
        [rules.adjust(logits[:, 0], rows), rules.adjust(logits[:, 1], with_draft)],
        axis=1,
    )
    is_accepted, following = rules.sampling.verify(
        adjusted, draft.token, draft.logits, key
    )
    first = jnp.where(is_accepted, draft.token, following)
    takes_two = is_accepted & ~rules.are_eos(draft.token) & (room >= 2)
    counts = jnp.where(takes_two, 2, jnp.minimum(room, 1))
    last = jnp.where(takes_two, following, first)
    tokens = jnp.stack([first, following], axis=1)
    is_verified = room >= 2
    chosen = Chosen(
        tokens,
        _log_probabilities(logits, tokens),
        counts,
        rules.are_eos(last) | (counts >= room),
        streams,
        is_verified.astype(jnp.int32),
        (is_verified & is_accepted).astype(jnp.int32),
    )
    return chosen, lookahead


def _redraft(
    model: AbstractModel,
    draft: Draft,
    chosen: Chosen,
    rows: Rows,
    rules: Rules,
    key: PRNGKeyArray | None,
) -> Draft:
    """The prediction block's draft for the token after the rows' new tokens."""
    counts = chosen.counts
    hidden, cache = model.extend_mtp(chosen.streams, chosen.tokens, draft.cache, counts)
    logits = rules.adjust(model.unembed(last_of(hidden, counts)), rows)
    if key is None:
        return Draft(cache, rules.sampling(logits, None), None)
    logits = rules.sampling.cut(logits)
    token = jax.random.categorical(key, logits).astype(jnp.int32)
    return Draft(cache, token, logits)


def _logits(
    model: AbstractModel, streams: Float[Array, "*batch streams dim"]
) -> Float[Array, "*batch vocab"]:
    return model.unembed(model.collapse(streams))


def _log_probabilities(
    logits: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]
) -> Float32[Array, "*batch"]:
    """Natural logarithms of the model's probabilities, at temperature 1."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return chosen[..., 0].astype(jnp.float32)


def _split(key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, ...]:
    """A key to keep and two to use, if there is one."""
    return (None, None, None) if key is None else tuple(jax.random.split(key, 3))
