"""From logits to the next token: the likeliest, or one drawn from what is left of them.

Temperature, top-k, top-p and min-p cut the distribution in this order; at least the
likeliest token always stays.
"""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_int,
    is_number,
    validate_key,
)


class Sampling(eqx.Module):
    """How tokens are chosen; numbers, so that another value compiles nothing again."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    is_greedy: bool = eqx.field(static=True)

    def __init__(
        self,
        call: str,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float,
        min_p: float,
        key: PRNGKeyArray | None,
    ):
        """**Arguments:**

        - `call`: what the user called.
        - `temperature`: what logits are divided by; 0 takes the likeliest token.
        - `top_k`: how many of the likeliest tokens stay; all by default.
        - `top_p`: the fewest tokens stay that together have at least this probability.
        - `min_p`: tokens stay that have at least this part of the likeliest one's
            probability.
        - `key`: randomness, which is needed unless the temperature is 0.

        **Raises:** ValueError that names what is out of its range or missing.
        """
        if not is_number(temperature) or temperature < 0:
            raise invalid_argument(
                call, "temperature", temperature, "a number of at least 0"
            )
        if top_k is not None and not (is_int(top_k) and top_k >= 1):
            raise invalid_argument(
                call, "top_k", top_k, "an integer of at least 1, or None"
            )
        if not is_number(top_p) or not 0 < top_p <= 1:
            raise invalid_argument(call, "top_p", top_p, "in (0, 1]")
        if not is_number(min_p) or not 0 <= min_p <= 1:
            raise invalid_argument(call, "min_p", min_p, "in [0, 1]")
        if temperature > 0 and key is None:
            allowed = "a key, as from jax.random.key(0), where the temperature is not 0"
            raise invalid_argument(call, "key", key, allowed)
        if key is not None:
            validate_key(call, key)
        most = 2**31 - 1
        self.temperature = jnp.asarray(temperature, jnp.float32)
        # What is smaller, XLA may take for 0.
        self.is_greedy = temperature < float(jnp.finfo(jnp.float32).tiny)
        self.top_k = jnp.asarray(min(top_k or most, most), jnp.int32)
        self.top_p = jnp.asarray(top_p, jnp.float32)
        self.min_p = jnp.asarray(min_p, jnp.float32)

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
        """Below the largest, over the temperature; minus infinity for tokens cut away.

        **Arguments:**

        - `logits`: of the next token.
        """
        order = jnp.argsort(-logits, axis=-1, stable=True)
        # Below the largest, so that no temperature makes them overflow.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = logits / self.temperature
        kept = self._kept(jnp.take_along_axis(logits, order, axis=-1))
        kept = jax.vmap(lambda kept, order: jnp.zeros_like(kept).at[order].set(kept))(
            kept, order
        )
        return jnp.where(kept, logits, -math.inf)

    @jax.named_scope("Sampling.verify")
    def verify(
        self,
        logits: Float[Array, "batch 2 vocab"],
        draft: Int[Array, " batch"],
        draft_logits: Float[Array, "batch vocab"] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Bool[Array, " batch"], Int[Array, " batch"]]:
        """Speculative sampling (Leviathan et al. 2023, algorithm 1).

        A draft stays with the probability of the model over that of the draft, at most
        1; in the place of another comes one drawn from what the model's probabilities
        exceed the draft's by. So what comes is distributed as without drafts.

        **Arguments:**

        - `logits`: of the token that was guessed, and of the one after the guess.
        - `draft`: the guess.
        - `draft_logits`: what it was drawn from, as `cut` gave it; not used where the
            likeliest token is taken.
        - `key`: randomness.

        **Returns:** whether the draft stays, and the token after it, or instead of it.
        """
        if self.is_greedy or key is None or draft_logits is None:
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            stays = likeliest[:, 0] == draft
            return stays, jnp.where(stays, likeliest[:, 1], likeliest[:, 0])
        accept_key, next_key = jax.random.split(key)
        now, after = (jax.nn.softmax(self.cut(logits[:, i])) for i in range(2))
        guessed = jax.nn.softmax(draft_logits)
        of_model, of_draft = (
            jnp.take_along_axis(x, draft[:, None], axis=-1)[:, 0]
            for x in (now, guessed)
        )
        stays = jax.random.uniform(accept_key, draft.shape) * of_draft < of_model
        excess = jnp.maximum(now - guessed, 0)
        # Rounding may leave nothing of two that are the same.
        excess = jnp.where(jnp.any(excess > 0, axis=-1, keepdims=True), excess, now)
        weights = jnp.where(stays[:, None], after, excess)
        following = jax.random.categorical(next_key, jnp.log(weights))
        return stays, following.astype(jnp.int32)

    def _kept(
        self, in_order: Float[Array, "batch vocab"]
    ) -> Bool[Array, "batch vocab"]:
        """Which of the tokens stay, the likeliest first."""
        rank = jnp.arange(in_order.shape[-1])
        among = rank < self.top_k
        weights = jax.nn.softmax(jnp.where(among, in_order, -math.inf), axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights
        kept = among & (before < self.top_p) & (weights >= self.min_p * weights[:, :1])
        return kept | (rank == 0)


def stop_ids(call: str, eos_id: Any, vocab: int) -> Int[Array, " ids"]:
    """The ids after which a row ends; none by default.

    **Arguments:**

    - `call`: what the user called.
    - `eos_id`: a token id, some of them, or None.
    - `vocab`: how many token ids there are.

    **Raises:** ValueError if one is no token id.
    """
    ids = [] if eos_id is None else eos_id
    ids = list(ids) if isinstance(ids, Sequence) else [ids]
    for one in ids:
        if not is_int(one) or not 0 <= one < vocab:
            allowed = f"a token id in [0, {vocab}), or a list of some"
            raise invalid_argument(call, "eos_id", eos_id, allowed)
    return jnp.asarray(ids, jnp.int32)
