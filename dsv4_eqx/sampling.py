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

from dsv4_eqx.checks import is_int, is_number, refusal


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
            raise refusal(call, "temperature", temperature, "a number of at least 0")
        if top_k is not None and not (is_int(top_k) and top_k >= 1):
            raise refusal(call, "top_k", top_k, "an integer of at least 1, or None")
        if not is_number(top_p) or not 0 < top_p <= 1:
            raise refusal(call, "top_p", top_p, "in (0, 1]")
        if not is_number(min_p) or not 0 <= min_p <= 1:
            raise refusal(call, "min_p", min_p, "in [0, 1]")
        if temperature > 0 and key is None:
            allowed = "a key, as from jax.random.key(0), where the temperature is not 0"
            raise refusal(call, "key", key, allowed)
        self.is_greedy = temperature == 0
        self.temperature = jnp.asarray(temperature, jnp.float32)
        self.top_k = jnp.asarray(2**31 - 1 if top_k is None else top_k, jnp.int32)
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
        order = jnp.argsort(-logits, axis=-1, stable=True)
        in_order = jnp.take_along_axis(logits, order, axis=-1) / self.temperature
        rank = jax.random.categorical(
            key, jnp.where(self._kept(in_order), in_order, -math.inf)
        )
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(
            jnp.int32
        )

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
            allowed = f"a token id in [0, {vocab}), or some of them"
            raise refusal(call, "eos_id", eos_id, allowed)
    return jnp.asarray(ids, jnp.int32)
