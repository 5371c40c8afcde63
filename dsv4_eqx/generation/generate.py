"""Generation: prompts through the cache, then token by token.

All new tokens come from one compiled loop (`generate`), or as soon as they are ready
(`generate_stream`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from dsv4_eqx.generation.prompt import Caches, parts, read_prompt
from dsv4_eqx.generation.sampling import Sampling, stop_ids
from dsv4_eqx.generation.steps import Chosen, Draft, Rules, State, start, step
from dsv4_eqx.generation.stream import TokenStream
from dsv4_eqx.model.abstract import AbstractModel, Cache
from dsv4_eqx.model.inputs import (
    Lengths,
    TokenIds,
    is_concrete,
    validate_lengths,
    validate_token_ids,
)
from dsv4_eqx.numerics.validation import invalid_argument, is_int, validate_flag


class Generated(eqx.Module):
    """New tokens of each row."""

    tokens: Int32[Array, "batch new"]  # 0 after a row's end
    lengths: Int32[Array, " batch"]  # with the token that ended the row
    log_probabilities: Float32[Array, "batch new"]  # natural, at temperature 1
    cache: Cache  # after all tokens but the last
    num_drafted: Int32[Array, " batch"]  # 0 without speculation
    num_accepted: Int32[Array, " batch"]  # of the drafts


class _Asked(NamedTuple):
    """Arguments that were checked."""

    tokens: np.ndarray
    lengths: np.ndarray
    capacity: int
    key: PRNGKeyArray | None
    rules: Rules
    speculative: bool


def generate(
    model: AbstractModel,
    tokens: TokenIds,
    *,
    max_new_tokens: int,
    lengths: Lengths | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_id: int | Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
    speculative: bool = False,
) -> Generated:
    """Continues each row's prompt.

    **Arguments:**

    - `model`: the model.
    - `tokens`: the prompts' ids, then anything as padding.
    - `max_new_tokens`: after which every row ends.
    - `lengths`: ids in each prompt, at least 1; whole rows by default.
    - `temperature`: what logits are divided by; 0 takes the likeliest token.
    - `top_k`, `top_p`, `min_p`: cut the distribution, see `Sampling`.
    - `eos_id`: a token id, or some, after which a row ends.
    - `key`: randomness, needed unless the temperature is 0.
    - `speculative`: the model's prediction block drafts tokens, of which those stay
        that the model would have chosen. The likeliest tokens are the same; drawn ones
        are others, of the same distribution.

    **Raises:** ValueError before anything is compiled if the model is none, the prompts
    are no token ids, empty or traced, prompt and new tokens are beyond
    `max_position_embeddings`, the model has no prediction block for speculation, or
    another argument is out of its range or missing.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    asked = _checked(
        "generate",
        model,
        tokens,
        lengths,
        max_new_tokens,
        sampling,
        eos_id,
        key,
        speculative,
    )
    caches, streams = _read(model, asked)
    generated, _ = _generate(
        model, caches, streams, asked.key, asked.rules, max_new_tokens
    )
    return generated


def generate_stream(
    model: AbstractModel,
    tokens: TokenIds,
    *,
    max_new_tokens: int,
    lengths: Lengths | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_id: int | Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
    speculative: bool = False,
) -> TokenStream:
    """The tokens that `generate` gives, for all rows as soon as they are there.

    **Arguments:** as for `generate`.

    **Returns:** an iterator; the prompts are read when the first token is asked for.

    **Raises:** ValueError as `generate` does.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    asked = _checked(
        "generate_stream",
        model,
        tokens,
        lengths,
        max_new_tokens,
        sampling,
        eos_id,
        key,
        speculative,
    )
    read = functools.partial(_read, model, asked)
    return TokenStream(model, read, len(asked.tokens), asked.key, asked.rules)


def _checked(
    call: str,
    model: AbstractModel,
    tokens: TokenIds,
    lengths: Lengths | None,
    max_new_tokens: int,
    sampling: dict[str, Any],
    eos_id: int | Sequence[int] | None,
    key: PRNGKeyArray | None,
    speculative: bool,
) -> _Asked:
    if not isinstance(model, AbstractModel):
        allowed = "a DeepSeekV4 or a ShardedModel"
        raise invalid_argument(call, "model", type(model).__name__, allowed)
    if not is_concrete(tokens, lengths):
        raise ValueError(
            f"{call}: the prompts are traced, or lie over several processes; it "
            "compiles its own loop: call it outside of jit, with arrays of numpy."
        )
    chosen_by = Sampling(call, **sampling, key=key)
    vocab, most = model.config.vocab_size, model.config.max_position_embeddings
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        allowed = "an integer of at least 1"
        raise invalid_argument(call, "max_new_tokens", max_new_tokens, allowed)
    validate_flag(call, "speculative", speculative)
    if speculative and model.num_mtp != 1:
        raise ValueError(
            f"{call}: the model has {model.num_mtp} prediction blocks "
            "(num_nextn_predict_layers); speculative=True needs one."
        )
    lengths = np.asarray(validate_lengths(call, lengths, tokens))
    if lengths.min() < 1:
        row = int(lengths.argmin())
        raise ValueError(f"{call}: the prompt of row {row} has no token.")
    tokens = np.asarray(validate_token_ids(call, tokens, vocab, lengths))
    longest = int(lengths.max())
    if longest + max_new_tokens > most:
        raise ValueError(
            f"{call}: a prompt of {longest} tokens and max_new_tokens="
            f"{max_new_tokens} are beyond max_position_embeddings={most}; give fewer."
        )
    # Read in whole parts, but for what is beyond the last position.
    capacity = min(sum(parts(longest)) + max_new_tokens, most)
    rules = Rules(chosen_by, stop_ids(call, eos_id, vocab), max_new_tokens)
    key = None if chosen_by.is_greedy else key
    return _Asked(tokens[:, :longest], lengths, capacity, key, rules, speculative)


def _read(
    model: AbstractModel, asked: _Asked
) -> tuple[Caches, Float[Array, "batch streams dim"]]:
    return read_prompt(
        model, asked.tokens, asked.lengths, asked.capacity, asked.speculative
    )


@functools.partial(jax.jit, static_argnames="new", donate_argnames="caches")
def _generate(
    model: AbstractModel,
    caches: Caches,
    streams: Float[Array, "batch streams dim"],
    key: PRNGKeyArray | None,
    rules: Rules,
    new: int,
) -> tuple[Generated, Draft | None]:
    """All new tokens; with the drafts' cache, so that there is no copy of it."""

    def note(noted: tuple[Array, Array], state: State, chosen: Chosen):
        index = jnp.arange(chosen.tokens.shape[1])
        place = (state.lengths - chosen.counts)[:, None] + index
        place = jnp.where(index < chosen.counts[:, None], place, new)
        put = jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop"))
        return put(noted[0], place, chosen.tokens), put(
            noted[1], place, chosen.log_probabilities
        )

    def run(carry):
        state, *noted = carry
        state, chosen = step(model, state, rules)
        return state, *note(tuple(noted), state, chosen)

    batch = len(streams)
    noted = jnp.zeros((batch, new), jnp.int32), jnp.zeros((batch, new), jnp.float32)
    state, chosen = start(model, caches, streams, key, rules)
    carry = state, *note(noted, state, chosen)
    carry = lax.while_loop(lambda carry: ~jnp.all(carry[0].is_done), run, carry)
    state, tokens, log_probabilities = carry
    none, draft = jnp.zeros_like(state.lengths), state.draft
    generated = Generated(
        tokens,
        state.lengths,
        log_probabilities,
        state.cache,
        num_drafted=none if draft is None else draft.num_drafted,
        num_accepted=none if draft is None else draft.num_accepted,
    )
    return generated, draft
