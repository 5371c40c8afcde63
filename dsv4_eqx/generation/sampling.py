"""From logits to the next token: the likeliest, or one drawn from what is left of them.

Temperature, top-k, top-p and min-p cut the distribution in this order; at least the
likeliest token always stays.
"""

import math
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv4_eqx.generation.arguments import on_device
from dsv4_eqx.numerics.validation import (
    as_python,
    invalid_argument,
    is_int,
    is_number,
)

_KEEP_ALL: Final = 2**31 - 1


class Sampling(eqx.Module):
    """How the next token is drawn. `Sampling()` draws from the model's distribution.

    The numbers are arrays: another value compiles nothing again.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    is_greedy: bool = eqx.field(static=True)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ):
        """**Arguments:**

        - `temperature`: what logits are divided by; 0 takes the likeliest token.
        - `top_k`: how many of the likeliest tokens stay; all by default.
        - `top_p`: the fewest tokens stay that together have at least this probability;
            1 keeps all.
        - `min_p`: tokens stay that have at least this part of the likeliest one's
            probability; 0 keeps all.

        **Raises:** ValueError that names what is out of its range.
        """
        temperature, top_k, top_p, min_p = map(
            as_python, (temperature, top_k, top_p, min_p)
        )
        for name, value, is_allowed, allowed in (
            ("temperature", temperature, lambda x: x >= 0, "a number of at least 0"),
            ("top_p", top_p, lambda x: 0 < x <= 1, "in (0, 1]"),
            ("min_p", min_p, lambda x: 0 <= x <= 1, "in [0, 1]"),
        ):
            if not is_number(value) or not is_allowed(value):
                raise invalid_argument("Sampling", name, value, allowed)
        if top_k is not None and not (is_int(top_k) and top_k >= 1):
            allowed = "an integer of at least 1, or None"
            raise invalid_argument("Sampling", "top_k", top_k, allowed)
        self.temperature = on_device(temperature, np.float32)
        # What is smaller, XLA may take for 0.
        self.is_greedy = temperature < float(jnp.finfo(jnp.float32).tiny)
        self.top_k = on_device(min(top_k or _KEEP_ALL, _KEEP_ALL), np.int32)
        self.top_p = on_device(top_p, np.float32)
        self.min_p = on_device(min_p, np.float32)

    @jax.named_scope("Sampling")
    def __call__(
        self, logits: Float[Array, "batch vocab"], key: PRNGKeyArray | None
    ) -> Int[Array, " batch"]:
        """The next token of each row.

        **Arguments:**

        - `logits`: of the next token.
        - `key`: randomness; not used where the likeliest token is taken.
        """
        if self.is_greedy or key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, self.cut(logits)).astype(jnp.int32)

    def cut(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Logits to draw from; minus infinity for tokens that are cut away.

        What cuts nothing away, and a temperature of 1, leave them to the bit.

        **Arguments:**

        - `logits`: of the next token.
        """
        order = jnp.argsort(-logits, axis=-1, stable=True)
        # Below the largest, so that no temperature makes them overflow.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = below / self.temperature
        kept = self._kept(jnp.take_along_axis(scaled, order, axis=-1))
        kept = jax.vmap(lambda kept, order: jnp.zeros_like(kept).at[order].set(kept))(
            kept, order
        )
        scaled = jnp.where(self.temperature == 1, logits, scaled)
        return jnp.where(kept, scaled, -math.inf)

    @jax.named_scope("Sampling.verify")
    def verify(
        self,
        logits: Float[Array, "batch 2 vocab"],
        draft: Int[Array, " batch"],
        draft_logits: Float[Array, "batch vocab"] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Bool[Array, " batch"], Int[Array, " batch"]]:
        """Speculative sampling (Leviathan et al. 2023, algorithm 1).

        A draft is accepted with the model's probability over the draft's, at most 1;
        another token is drawn from what the model's probabilities exceed the draft's
        by. So tokens have the model's distribution, as without drafts.

        **Arguments:**

        - `logits`: of the token that was guessed, and of the one after the guess.
        - `draft`: the guess.
        - `draft_logits`: what it was drawn from, as `cut` gave it; not used where the
            likeliest token is taken.
        - `key`: randomness.

        **Returns:** whether the draft is accepted, and the token after it, or instead
        of it.
        """
        if self.is_greedy or key is None or draft_logits is None:
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            is_accepted = likeliest[:, 0] == draft
            return is_accepted, jnp.where(is_accepted, likeliest[:, 1], likeliest[:, 0])
        accept_key, next_key = jax.random.split(key)
        cut = self.cut(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
        now, after = jax.nn.softmax(cut[:, 0]), jax.nn.softmax(cut[:, 1])
        guessed = jax.nn.softmax(draft_logits)
        of_model, of_draft = (
            jnp.take_along_axis(x, draft[:, None], axis=-1)[:, 0]
            for x in (now, guessed)
        )
        uniform = jax.random.uniform(accept_key, draft.shape)
        is_accepted = uniform * of_draft < of_model
        excess = jnp.maximum(now - guessed, 0)
        # Rounding may leave nothing of two that are the same.
        excess = jnp.where(jnp.any(excess > 0, axis=-1, keepdims=True), excess, now)
        weights = jnp.where(is_accepted[:, None], after, excess)
        following = jax.random.categorical(next_key, jnp.log(weights))
        return is_accepted, following.astype(jnp.int32)

    def _kept(
        self, in_order: Float[Array, "batch vocab"]
    ) -> Bool[Array, "batch vocab"]:
        """Which of the tokens stay, the likeliest first."""
        rank = jnp.arange(in_order.shape[-1])
        in_top_k = rank < self.top_k
        weights = jax.nn.softmax(jnp.where(in_top_k, in_order, -math.inf), axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights
        # A running sum in float32 reaches 1 before the last tokens.
        in_top_p = (before < self.top_p) | (self.top_p >= 1)
        in_min_p = weights >= self.min_p * weights[:, :1]
        return (in_top_k & in_top_p & in_min_p) | (rank == 0)
