"""The steps of generation: one new token a row, or up to two with speculation.

Speculative decoding: the prediction block drafts the token after next; the model reads
the next token and the draft at once, which costs hardly more than one, and keeps the
draft where it would have chosen it (Leviathan et al. 2023; DeepSeek-V3 section 2.2).

A step has two halves. `look` reads tokens and chooses the ones after them; `settle`
keeps those that stay. Between the two the host may end rows, as a stop string does.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PRNGKeyArray

from dsv4_eqx.generation.prompt import Caches, last_of
from dsv4_eqx.generation.sampling import Sampling
from dsv4_eqx.model.abstract import AbstractModel, Cache, Lookahead
from dsv4_eqx.model.mtp import MTPCache

# From logits, the tokens of each row so far, and how many these are, to other logits.
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
    num_drafted: Int32[Array, " batch"]  # drafts that the model has judged
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
        """The rows with some tokens more.

        **Arguments:**

        - `tokens`, `log_probabilities`: of new tokens.
        - `counts`: how many of them each row takes.
        """
        room, index = self.tokens.shape[1], jnp.arange(tokens.shape[1])
        is_taken = index < counts[:, None]
        place = jnp.where(is_taken, self.lengths[:, None] + index, room)
        put = jax.vmap(lambda row, place, new: row.at[place].set(new, mode="drop"))
        return Rows(
            put(self.tokens, place, tokens),
            put(self.log_probabilities, place, log_probabilities),
            self.prompt_lengths,
            self.lengths + counts,
            self.is_done,
            self.num_drafted,
            self.num_accepted,
        )


class Draft(eqx.Module):
    """What the prediction block expects after each row's last token."""

    cache: MTPCache
    token: Int32[Array, " batch"]
    logits: Float[Array, "batch vocab"] | None  # that it was drawn from


class State(eqx.Module):
    """A generation under way; the cache has all tokens of a row but the last."""

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
        """The logits that tokens are chosen from.

        **Arguments:**

        - `logits`: the model's.
        - `rows`: tokens so far.

        **Raises:** ValueError if the user's function gives another shape.
        """
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
        """Whether these tokens end their rows.

        **Arguments:**

        - `tokens`: one of each row.
        """
        return jnp.any(tokens[:, None] == self.eos_ids, axis=1)

    def room(self, rows: Rows) -> Int[Array, " batch"]:
        """How many tokens more each row may have.

        **Arguments:**

        - `rows`: tokens so far.
        """
        new = rows.lengths - rows.prompt_lengths
        return jnp.where(rows.is_done, 0, self.limit - new)


class Chosen(eqx.Module):
    """New tokens of a step, of which `settle` keeps the first `counts`."""

    tokens: Int32[Array, "batch new"]
    log_probabilities: Float32[Array, "batch new"]
    counts: Int32[Array, " batch"]
    is_last: Bool[Array, " batch"]  # whether the row ends with them
    streams: Float[Array, "batch new streams dim"]  # of the tokens before each
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
    """The state after the prompts, and the first token, which `settle` keeps.

    **Arguments:**

    - `model`: the model.
    - `caches`, `streams`: from `read_prompt`.
    - `rows`: the prompts.
    - `key`: randomness, if tokens are drawn.
    - `rules`: how tokens are chosen.
    """
    draft = None
    if caches.mtp is not None:
        draft = Draft(caches.mtp, rows.last_tokens, None)
    _, now, _ = _split(key)
    counts = jnp.ones_like(rows.lengths)
    chosen = _choose(model, streams[:, None], rows, counts, rules, now)
    return State(caches.model, rows, draft, key), chosen


def step(model: AbstractModel, state: State, rules: Rules) -> tuple[State, Chosen]:
    """The next tokens of the rows that are not done.

    **Arguments:**

    - `model`: the model.
    - `state`: from `settle` or another step.
    - `rules`: how tokens are chosen.
    """
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
    """Reads each row's last token, and its draft if there is one; chooses what follows.

    **Arguments:**

    - `model`: the model.
    - `cache`, `rows`, `draft`, `key`: of the state.
    - `rules`: how tokens are chosen.

    **Returns:** the new tokens, and the cache with all that was read.
    """
    _, now, _ = _split(key)
    if draft is not None:
        return _look_ahead(model, cache, rows, draft, now, rules)
    counts = (~rows.is_done).astype(jnp.int32)
    last = rows.last_tokens[:, None]
    streams, cache = model.extend_streams(last, cache, counts)
    return _choose(model, streams, rows, counts, rules, now), cache


def settle(
    model: AbstractModel,
    after: Cache | Lookahead,
    rows: Rows,
    draft: Draft | None,
    key: PRNGKeyArray | None,
    chosen: Chosen,
    rules: Rules,
) -> State:
    """The state with the new tokens that stay, and another draft.

    **Arguments:**

    - `model`: the model.
    - `after`, `chosen`: from `look`, or the cache and the token from `begin`.
    - `rows`, `draft`, `key`: of the state before.
    - `rules`: how tokens are chosen.
    """
    key, _, later = _split(key)
    counts = chosen.counts
    cache = after if isinstance(after, Cache) else after.keep(counts)
    rows = rows.append(chosen.tokens, chosen.log_probabilities, counts)
    rows = Rows(
        rows.tokens,
        rows.log_probabilities,
        rows.prompt_lengths,
        rows.lengths,
        rows.is_done | chosen.is_last,
        rows.num_drafted + chosen.num_drafted,
        rows.num_accepted + chosen.num_accepted,
    )
    if draft is not None:
        draft = _redraft(model, draft, chosen, rows, rules, later)
    return State(cache, rows, draft, key)


def _choose(
    model: AbstractModel,
    streams: Float[Array, "batch 1 streams dim"],
    rows: Rows,
    counts: Int[Array, " batch"],
    rules: Rules,
    key: PRNGKeyArray | None,
) -> Chosen:
    """One token of each row that takes any."""
    logits = _logits(model, streams)
    token = rules.sampling(rules.adjust(logits[:, 0], rows), key)
    is_last = rules.are_eos(token) | (rules.room(rows) <= 1)
    log_probabilities = _log_probabilities(logits, token[:, None])
    none = jnp.zeros_like(counts)
    return Chosen(
        token[:, None], log_probabilities, counts, is_last, streams, none, none
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
    | goes on | is wrong | another in its place |
    | goes on | is right, and ends the row | the draft |
    | goes on | is right, and does not | the draft and the token after it |
    """
    room = rules.room(rows)
    read = jnp.minimum(room, 2)  # no draft where it would be the last token
    tokens = jnp.stack([rows.last_tokens, draft.token], axis=1)
    streams, lookahead = model.lookahead(tokens, cache, read)
    logits = _logits(model, streams)
    ones = jnp.ones_like(room)
    with_draft = rows.append(draft.token[:, None], 0.0 * logits[:, :1, 0], ones)
    adjusted = jnp.stack(
        [rules.adjust(logits[:, 0], rows), rules.adjust(logits[:, 1], with_draft)],
        axis=1,
    )
    is_right, following = rules.sampling.verify(
        adjusted, draft.token, draft.logits, key
    )
    first = jnp.where(is_right, draft.token, following)
    goes_on = is_right & ~rules.are_eos(draft.token) & (room >= 2)
    counts = jnp.where(goes_on, 2, jnp.minimum(room, 1))
    last = jnp.where(goes_on, following, first)
    tokens = jnp.stack([first, following], axis=1)
    is_judged = room >= 2
    chosen = Chosen(
        tokens,
        _log_probabilities(logits, tokens),
        counts,
        rules.are_eos(last) | (counts >= room),
        streams,
        is_judged.astype(jnp.int32),
        (is_judged & is_right).astype(jnp.int32),
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
    """What the prediction block expects after the rows with their new tokens."""
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
    """The model's own, natural, at temperature 1."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return chosen[..., 0].astype(jnp.float32)


def _split(key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, ...]:
    """A key to keep and two to use, if there is one."""
    return (None, None, None) if key is None else tuple(jax.random.split(key, 3))
