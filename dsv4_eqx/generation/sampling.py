"""From logits to the next token: the likeliest one, or one drawn at random.

Temperature, top-k, top-p and min-p are applied to the distribution in this order; the
likeliest token is always kept.
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

    The numbers are arrays, so that other values need no new compilation.
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

        - `temperature`: logits are divided by it; 0 takes the likeliest token.
        - `top_k`: how many of the likeliest tokens are kept; all by default.
        - `top_p`: keeps the likeliest tokens, as few as have at least this probability
            together; 1 keeps all.
        - `min_p`: keeps tokens whose probability is at least this fraction of the
            likeliest token's; 0 keeps all.

        **Raises:** ValueError naming the argument that is out of its range.
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
        # XLA may treat smaller temperatures as 0.
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
        """Logits to draw from; minus infinity for tokens that are not kept.

        With a temperature of 1, the logits of kept tokens are unchanged to the bit.

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

        A draft is accepted with probability min(1, p / q), where p is its probability
        under the model and q the one it was drawn with. If it is rejected, another
        token is drawn in proportion to max(p - q, 0). Tokens then have the model's
        distribution, as without drafts.

        **Arguments:**

        - `logits`: the model's, for the drafted token and for the token after it.
        - `draft`: the drafted token.
        - `draft_logits`: the logits that it was drawn from, as `cut` returned them; not
            used where the likeliest token is taken.
        - `key`: randomness.

        **Returns:** whether the draft is accepted; and the token after it, or the token
        in its place.
        """
        if self.is_greedy or key is None or draft_logits is None:
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            is_accepted = likeliest[:, 0] == draft
            return is_accepted, jnp.where(is_accepted, likeliest[:, 1], likeliest[:, 0])
        accept_key, next_key = jax.random.split(key)
        cut = self.cut(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
        model_probs, next_probs = jax.nn.softmax(cut[:, 0]), jax.nn.softmax(cut[:, 1])
        draft_probs = jax.nn.softmax(draft_logits)
        p, q = (
            jnp.take_along_axis(probs, draft[:, None], axis=-1)[:, 0]
            for probs in (model_probs, draft_probs)
        )
        uniform = jax.random.uniform(accept_key, draft.shape)
        is_accepted = uniform * q < p
        excess = jnp.maximum(model_probs - draft_probs, 0)
        # Rounding may leave no excess where the two distributions are equal.
        has_excess = jnp.any(excess > 0, axis=-1, keepdims=True)
        excess = jnp.where(has_excess, excess, model_probs)
        weights = jnp.where(is_accepted[:, None], next_probs, excess)
        following = jax.random.categorical(next_key, jnp.log(weights))
        return is_accepted, following.astype(jnp.int32)

    def _kept(
        self, in_order: Float[Array, "batch vocab"]
    ) -> Bool[Array, "batch vocab"]:
        """Which tokens are kept, given logits in descending order."""
        rank = jnp.arange(in_order.shape[-1])[None]
        in_top_k = rank < self.top_k
        weights = jax.nn.softmax(jnp.where(in_top_k, in_order, -math.inf), axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights
        # A running sum in float32 reaches 1 before the last tokens.
        in_top_p = (before < self.top_p) | (self.top_p >= 1)
        in_min_p = weights >= self.min_p * weights[:, :1]
        return (in_top_k & in_top_p & in_min_p) | (rank == 0)
