"""Generation: prompts are read into a cache, then tokens are generated one by one.

`generate` makes all new tokens in one compiled loop; `generate_stream` returns each as
soon as it is ready. Stop strings are searched for on the host, so with them `generate`
runs step by step too.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from dsv4_eqx.generation.arguments import Prompts
from dsv4_eqx.generation.prompt import Caches
from dsv4_eqx.generation.request import checked_request
from dsv4_eqx.generation.result import Generated, result_of, shortened
from dsv4_eqx.generation.sampling import Sampling
from dsv4_eqx.generation.steps import (
    LogitsFn,
    Rows,
    Rules,
    State,
    begin,
    settle,
    step,
)
from dsv4_eqx.generation.stop_strings import Decode
from dsv4_eqx.generation.stream import TokenStream
from dsv4_eqx.model.abstract import AbstractModel


def generate(
    model: AbstractModel,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    lengths: Any = None,
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    num_samples: int = 1,
    eos_id: Any = None,
    stop: str | Sequence[str] = (),
    decode: Decode | Any = None,
    logits_fn: LogitsFn | None = None,
    capacity: int | None = None,
    after: Generated | None = None,
    speculative: bool = False,
) -> Generated:
    """Continues each prompt.

    ```python
    sampling, key = dsv4.Sampling(temperature=0.8, top_p=0.95), jax.random.key(0)
    out = dsv4.generate(
        model, [[5, 3], [7]], max_new_tokens=9, sampling=sampling, key=key
    )
    out.tokens  # [2, 9]
    ```

    **Arguments:**

    - `model`: the model.
    - `tokens`: the prompts' ids: an array of rows, a list of rows of any lengths, or a
        single row. Padding comes after a prompt. With left padding and a mask of the
        prompts' tokens, give `[row[kept] for row, kept in zip(tokens,
        mask.astype(bool))]`.
    - `max_new_tokens`: the most new tokens that a row gets.
    - `lengths`: ids in each prompt, at least 1; whole rows by default.
    - `sampling`: how tokens are drawn; by default, the likeliest token is taken.
    - `key`: randomness, needed where tokens are drawn.
    - `num_samples`: samples, which are rows of the result, for each prompt.
    - `eos_id`: a token id, or several, after which a row ends; `()` for none. Those of
        the configuration by default.
    - `stop`: a string, or several, after which a row ends; needs `decode`.
    - `decode`: a tokenizer, or a function from a list of token ids to text, for `stop`
        and `texts`.
    - `logits_fn`: `logits_fn(logits, tokens, lengths)` returns the logits `[rows,
        vocab]` to choose from, given the model's logits, each row's tokens so far,
        prompt included, and their number. Of the earlier turns of `after`, they begin
        with the last token alone. It is compiled, and so must be a pure JAX function,
        and it must leave a finite logit in each row. Another function needs another
        compilation.
    - `capacity`: the most tokens that a row of the cache can have. By default, enough
        for this call, rounded up so that similar calls need no compilation.
    - `after`: an earlier result, whose rows these prompts continue, as in the next turn
        of a conversation. Its cache is not changed; it is enlarged where its capacity
        is too small for the new tokens.
    - `speculative`: the model's prediction block drafts tokens, and the model keeps
        those that it would have chosen. Greedy tokens are the same as without; drawn
        tokens differ, but have the same distribution.

    **Raises:** ValueError before anything is compiled if `model` is not a model, model
    or prompts are traced, the prompts are empty or not token ids, prompt and new tokens
    together are beyond `max_position_embeddings`, the model has no prediction block for
    speculation, or another argument is missing or out of its range.
    """
    request = checked_request(
        "generate",
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        lengths=lengths,
        sampling=sampling,
        key=key,
        num_samples=num_samples,
        eos_id=eos_id,
        stop=stop,
        decode=decode,
        logits_fn=logits_fn,
        capacity=capacity,
        after=after,
        speculative=speculative,
    )
    if request.has_stop:
        stream = TokenStream(model, request)
        for _ in stream:
            pass
        assert stream.state is not None
        result = _result_of(stream.state)
    else:
        read, rows = request.read(model), request.rows()
        result = _generate(model, *read, rows, request.key, request.rules)
        if request.texts is not None:
            request.texts.append(*jax.device_get((result.tokens, result.lengths)))
    texts = None if request.texts is None else request.texts.texts()
    return shortened(result, request.max_new_tokens, texts)


def generate_stream(
    model: AbstractModel,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    lengths: Any = None,
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    num_samples: int = 1,
    eos_id: Any = None,
    stop: str | Sequence[str] = (),
    decode: Decode | Any = None,
    logits_fn: LogitsFn | None = None,
    capacity: int | None = None,
    after: Generated | None = None,
    speculative: bool = False,
) -> TokenStream:
    """The tokens that `generate` returns, each as soon as it is ready for all rows.

    **Arguments:** as for `generate`.

    **Returns:** an iterator; the prompts are read when the first token is asked for.

    **Raises:** ValueError as `generate` does.
    """
    request = checked_request(
        "generate_stream",
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        lengths=lengths,
        sampling=sampling,
        key=key,
        num_samples=num_samples,
        eos_id=eos_id,
        stop=stop,
        decode=decode,
        logits_fn=logits_fn,
        capacity=capacity,
        after=after,
        speculative=speculative,
    )
    return TokenStream(model, request)


@functools.partial(jax.jit, donate_argnames="caches")
def _generate(
    model: AbstractModel,
    caches: Caches,
    streams: Float[Array, "rows streams dim"],
    rows: Rows,
    key: PRNGKeyArray | None,
    rules: Rules,
) -> Generated:
    """All new tokens."""

    def goes_on(state: State) -> Array:
        return ~jnp.all(state.rows.is_done)

    def run(state: State) -> State:
        state, _ = step(model, state, rules)
        return state

    state, chosen = begin(model, caches, streams, rows, key, rules)
    rows, draft, key = state.rows, state.draft, state.key
    state = settle(model, state.cache, rows, draft, key, chosen, rules)
    return result_of(lax.while_loop(goes_on, run, state))


_result_of = jax.jit(result_of)
