"""New tokens as soon as they are ready: each compiled step makes one or two a row."""

import collections
import warnings
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from dsv4_eqx.generation.request import Request
from dsv4_eqx.generation.steps import Chosen, State, begin, look, settle, step
from dsv4_eqx.model.abstract import AbstractModel, Cache, Lookahead


class TokenStream(Iterator[np.ndarray]):
    """An iterator over new tokens, which also counts drafts.

    It returns arrays `[batch]` until all rows have ended. A value is -1 where a row has
    ended, or has no second token in a step because its draft was rejected. An accepted
    draft and the token after it are returned one right after the other.
    """

    num_drafted: np.ndarray  # drafts of each row so far; 0 without speculation
    num_accepted: np.ndarray  # drafts of each row that were kept

    def __init__(self, model: AbstractModel, request: Request):
        """`generate_stream` makes it, of arguments that it has validated."""
        num_rows = len(request.lengths) * request.num_samples
        self.num_drafted = self.num_accepted = np.zeros(num_rows, np.int32)
        self._model, self._request, self._texts = model, request, request.texts
        self._ready = collections.deque()
        self.state: State | None = None  # after the last step

    def __next__(self) -> np.ndarray:
        if not self._ready:
            if self.state is not None and jax.device_get(self.state.rows.is_done).all():
                raise StopIteration
            self._advance()
        return self._ready.popleft()

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each row so far, up to a stop string; needs `decode`.

        **Raises:** ValueError without `decode`.
        """
        if self._texts is None:
            raise ValueError("texts: give generate_stream decode= for texts.")
        return self._texts.texts()

    def _advance(self) -> None:
        """A step, which gives at least one token."""
        model, request, state = self._model, self._request, self.state
        rules = request.rules
        if state is None:
            read, rows = request.read(model), request.rows()
            first, chosen = _begin(model, *read, rows, request.key, rules)
            rest = first.rows, first.draft, first.key
            chosen = self._end_at_stops(chosen)
            state = _settle(model, first.cache, *rest, chosen, rules)
        elif self._texts is None:
            state, chosen = _step(model, state, rules)
        else:
            rest = state.rows, state.draft, state.key
            chosen, after = _look(model, state.cache, *rest, rules)
            chosen = self._end_at_stops(chosen)
            state = _settle(model, after, *rest, chosen, rules)
        self.state = state
        tokens, counts = jax.device_get((chosen.tokens, chosen.counts))
        for i, column in enumerate(tokens.T[: counts.max()]):
            self._ready.append(np.where(i < counts, column, -1))
        # Copies, since the next step overwrites the memory of these arrays.
        self.num_drafted = np.array(jax.device_get(state.rows.num_drafted))
        self.num_accepted = np.array(jax.device_get(state.rows.num_accepted))

    def _end_at_stops(self, chosen: Chosen) -> Chosen:
        """The chosen tokens, cut off where a stop string ends a row."""
        if self._texts is None:
            return chosen
        tokens, counts = jax.device_get((chosen.tokens, chosen.counts))
        taken, stops = self._texts.append(tokens, counts)
        is_last = stops | jax.device_get(chosen.is_last)
        return eqx.tree_at(
            lambda chosen: (chosen.counts, chosen.is_last),
            chosen,
            jax.device_put((taken, is_last)),
        )


def _look(*args: Any) -> tuple[Chosen, Cache | Lookahead]:
    with warnings.catch_warnings():
        # With drafts, windows become longer and cannot reuse the donated memory.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return _look_once(*args)


_begin = jax.jit(begin, donate_argnames="caches")
_look_once = jax.jit(look, donate_argnames="cache")
_settle = jax.jit(settle, donate_argnames="draft")
_step = jax.jit(step, donate_argnames="state")
