"""New tokens as soon as they are there: a compiled step each, or for each draft."""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dsv4_eqx.generation.prompt import Caches
from dsv4_eqx.generation.steps import Rules, State, start, step
from dsv4_eqx.model.abstract import AbstractModel


class TokenStream(Iterator[np.ndarray]):
    """New tokens of all rows, and how many of the drafts have been right so far.

    Gives one array `[batch]` after the other, -1 for a row that has ended, or whose
    draft was wrong, until all have ended. An accepted draft comes together with the
    token after it: one right after the other.
    """

    num_drafted: np.ndarray  # of each row; 0 without speculation
    num_accepted: np.ndarray  # of the drafts

    def __init__(
        self,
        model: AbstractModel,
        read: Callable[[], tuple[Caches, Float[Array, "batch streams dim"]]],
        batch: int,
        key: PRNGKeyArray | None,
        rules: Rules,
    ):
        """**Arguments:**

        - `model`: the model.
        - `read`: reads the prompts, when the first token is asked for.
        - `batch`: rows.
        - `key`: randomness, if tokens are drawn.
        - `rules`: how tokens are chosen.
        """
        self.num_drafted = self.num_accepted = np.zeros(batch, np.int32)
        self._model, self._read, self._key, self._rules = model, read, key, rules
        self._state: State | None = None
        self._ready = collections.deque()

    def __next__(self) -> np.ndarray:
        if not self._ready:
            if self._state is not None and np.asarray(self._state.is_done).all():
                raise StopIteration
            self._advance()
        return self._ready.popleft()

    def _advance(self) -> None:
        """A step, which gives at least one token."""
        if self._state is None:
            state, chosen = _start(self._model, *self._read(), self._key, self._rules)
        else:
            state, chosen = _step(self._model, self._state, self._rules)
        self._state, counts = state, np.asarray(chosen.counts)
        for i, tokens in enumerate(np.asarray(chosen.tokens).T[: counts.max()]):
            self._ready.append(np.where(i < counts, tokens, -1))
        if state.draft is not None:
            # Copies: the next step writes where these are.
            self.num_drafted = np.array(state.draft.num_drafted)
            self.num_accepted = np.array(state.draft.num_accepted)


_start = jax.jit(start, donate_argnames="caches")
_step = jax.jit(step, donate_argnames="state")
