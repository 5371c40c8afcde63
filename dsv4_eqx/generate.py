"""Generation: a prompt through the cache in parts, then token by token.

A prompt of any length is read in parts of few sizes, so that memory is bounded and
another prompt compiles nothing again. All new tokens come from one compiled loop
(`generate`), or one by one as they are ready (`generate_stream`).
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PRNGKeyArray

from dsv4_eqx.checks import is_int, refusal
from dsv4_eqx.inputs import Lengths, TokenIds, check_lengths, check_token_ids
from dsv4_eqx.model import Cache, DeepSeekV4
from dsv4_eqx.sampling import Sampling, stop_ids

_SMALLEST_PART: Final = 16
_LARGEST_PART: Final = 512


class Generated(eqx.Module):
    """New tokens of each row."""

    tokens: Int32[Array, "batch new"]  # 0 after a row's end
    lengths: Int32[Array, " batch"]  # with the token that ended the row
    log_probabilities: Float32[Array, "batch new"]  # natural, at temperature 1
    cache: Cache  # after all tokens but the last


class State(eqx.Module):
    """A generation under way, of which each row has a next token or is done."""

    cache: Cache
    token: Int32[Array, " batch"]
    log_probability: Float32[Array, " batch"]
    is_done: Bool[Array, " batch"]
    key: Key[Array, ""] | None


class _Asked(NamedTuple):
    """Arguments that were checked."""

    tokens: np.ndarray
    lengths: np.ndarray
    sampling: Sampling
    stops: Array
    capacity: int


def generate(
    model: DeepSeekV4,
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

    **Raises:** ValueError before anything is compiled if the prompts are no token ids
    or empty, prompt and new tokens are beyond `max_position_embeddings`, or another
    argument is out of its range or missing.
    """
    call = "generate"
    sampling = Sampling(
        call, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, key=key
    )
    asked = _checked(call, model, tokens, lengths, max_new_tokens, sampling, eos_id)
    state = _read_prompt(model, asked, key)
    return _generate(model, state, asked.sampling, asked.stops, max_new_tokens)


def generate_stream(
    model: DeepSeekV4,
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
) -> Iterator[np.ndarray]:
    """The tokens that `generate` gives, for all rows as soon as they are there.

    **Arguments:** as for `generate`.

    **Returns:** one array `[batch]` after the other, -1 for a row that has ended, until
    all have.

    **Raises:** ValueError as `generate` does, when the first token is asked for.
    """
    call = "generate_stream"
    sampling = Sampling(
        call, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, key=key
    )
    asked = _checked(call, model, tokens, lengths, max_new_tokens, sampling, eos_id)
    state = _read_prompt(model, asked, key)
    is_done = np.zeros(len(asked.tokens), bool)
    for count in range(max_new_tokens):
        if count > 0:
            state = _next_state(model, state, asked.sampling, asked.stops)
        yield np.where(is_done, -1, state.token)
        is_done = np.asarray(state.is_done)
        if is_done.all():
            return


def _checked(
    call: str,
    model: DeepSeekV4,
    tokens: TokenIds,
    lengths: Lengths | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | Sequence[int] | None,
) -> _Asked:
    vocab, most = model.embedding.shape[0], model.config.max_position_embeddings
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        allowed = "an integer of at least 1"
        raise refusal(call, "max_new_tokens", max_new_tokens, allowed)
    lengths = np.asarray(check_lengths(lengths, tokens))
    if lengths.min() < 1:
        row = int(lengths.argmin())
        raise ValueError(f"{call}: the prompt of row {row} has no token.")
    tokens = np.asarray(check_token_ids(tokens, vocab, lengths))
    longest = int(lengths.max())
    if longest + max_new_tokens > most:
        raise ValueError(
            f"{call}: a prompt of {longest} tokens and max_new_tokens="
            f"{max_new_tokens} are beyond max_position_embeddings={most}; give fewer."
        )
    stops = stop_ids(call, eos_id, vocab)
    # Read in whole parts, but for what is beyond the last position.
    room = sum(_parts(longest)) + max_new_tokens
    return _Asked(tokens[:, :longest], lengths, sampling, stops, min(room, most))


def _parts(longest: int) -> list[int]:
    """Sizes of the parts that a prompt is read in."""
    size = _SMALLEST_PART
    while size < min(longest, _LARGEST_PART):
        size *= 2
    return [size] * -(-longest // size)


def _read_prompt(model: DeepSeekV4, asked: _Asked, key: PRNGKeyArray | None) -> State:
    batch, first = len(asked.tokens), 0
    cache = model.init_cache(batch, asked.capacity)
    hidden = jnp.zeros((batch, model.embedding.shape[1]), model.embedding.dtype)
    for size in _parts(asked.tokens.shape[1]):
        part = np.zeros((batch, size), np.int32)
        given = asked.tokens[:, first : first + size]
        part[:, : given.shape[1]] = given
        lengths = np.clip(asked.lengths - first, 0, size).astype(np.int32)
        cache, hidden = _read_part(model, part, lengths, cache, hidden)
        first += size
    return _first_state(model, cache, hidden, key, asked.sampling, asked.stops)


@jax.jit
def _read_part(
    model: DeepSeekV4,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    cache: Cache,
    last: Float[Array, "batch dim"],
) -> tuple[Cache, Float[Array, "batch dim"]]:
    """The cache after a part, and the hidden activations of each row's last token."""
    hidden, cache = model.extend(tokens, cache, lengths)
    index = jnp.maximum(lengths - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
    return cache, jnp.where(lengths[:, None] > 0, newest, last)


@jax.jit
def _first_state(
    model: DeepSeekV4,
    cache: Cache,
    hidden: Float[Array, "batch dim"],
    key: PRNGKeyArray | None,
    sampling: Sampling,
    stops: Int[Array, " ids"],
) -> State:
    no_row_is_done = jnp.zeros(hidden.shape[0], bool)
    return _choose(model, cache, hidden, no_row_is_done, key, sampling, stops)


def _choose(
    model: DeepSeekV4,
    cache: Cache,
    hidden: Float[Array, "batch dim"],
    is_done: Bool[Array, " batch"],
    key: PRNGKeyArray | None,
    sampling: Sampling,
    stops: Int[Array, " ids"],
) -> State:
    """The next token of each row that goes on."""
    now = None
    if key is not None:
        key, now = jax.random.split(key)
    logits = model.unembed(hidden)
    token = jnp.where(is_done, 0, sampling(logits, now))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)
    return State(
        cache,
        token,
        jnp.where(is_done, 0, chosen[:, 0]).astype(jnp.float32),
        is_done | jnp.any(token[:, None] == stops, axis=1),
        key,
    )


def _next(
    model: DeepSeekV4, state: State, sampling: Sampling, stops: Int[Array, " ids"]
) -> State:
    goes_on = (~state.is_done).astype(jnp.int32)
    hidden, cache = model.extend(state.token[:, None], state.cache, goes_on)
    return _choose(
        model, cache, hidden[:, 0], state.is_done, state.key, sampling, stops
    )


_next_state = jax.jit(_next)


@eqx.filter_jit
def _generate(
    model: DeepSeekV4,
    state: State,
    sampling: Sampling,
    stops: Int[Array, " ids"],
    max_new_tokens: int,
) -> Generated:
    batch = state.token.shape[0]
    tokens = jnp.zeros((batch, max_new_tokens), jnp.int32)
    log_probabilities = jnp.zeros((batch, max_new_tokens), jnp.float32)

    def note(count: Array, state: State, tokens: Array, log_probabilities: Array):
        tokens = tokens.at[:, count].set(state.token)
        log_probabilities = log_probabilities.at[:, count].set(state.log_probability)
        return tokens, log_probabilities

    def goes_on(carry):
        count, state, *_ = carry
        return (count < max_new_tokens) & ~jnp.all(state.is_done)

    def step(carry):
        count, state, lengths, *noted = carry
        lengths = lengths + (~state.is_done).astype(jnp.int32)
        state = _next(model, state, sampling, stops)
        return count + 1, state, lengths, *note(count, state, *noted)

    noted = note(jnp.array(0), state, tokens, log_probabilities)
    lengths = jnp.ones(batch, jnp.int32)
    carry = jnp.array(1, jnp.int32), state, lengths, *noted
    _, state, lengths, *noted = lax.while_loop(goes_on, step, carry)
    return Generated(noted[0], lengths, noted[1], state.cache)
