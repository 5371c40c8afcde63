"""Which experts a token goes to, and with what weight.

Paper section 2.1. Scores are the square root of softplus, in float32. Most layers
choose the experts with the highest scores plus a balancing bias. The first layers look
the experts up by the token's id; there the scores only give the weights.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray

from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_concrete,
    validate_integers,
    validate_number,
    validate_sizes,
)


class Routing(eqx.Module):
    """The experts of each token, their weights, and the scores of all experts."""

    experts: Int[Array, "*tokens slots"]
    weights: Float[Array, "*tokens slots"]
    # Without the balancing bias; None if a router of your own does not give them.
    scores: Float[Array, "*tokens routes"] | None = None

    @property
    def counts(self) -> Int[Array, " routes"]:
        """How often each expert was chosen, by all tokens together, padding included.

        **Raises:** ValueError without scores, which tell how many experts there are.
        """
        if self.scores is None:
            raise ValueError("Routing.counts: the router gives no scores of experts.")
        return jnp.bincount(self.experts.reshape(-1), length=self.scores.shape[-1])


class TopKRouter(eqx.Module):
    r"""Takes the experts with the highest $\sqrt{\mathrm{softplus}(W x)} + b$.

    The bias affects the choice alone. The weights are the scores without it, normalised
    over the chosen experts and multiplied by the scaling factor. Among equal scores,
    the lower index is chosen.
    """

    weight: Float[Array, "routes dim"]
    bias: Float32[Array, " routes"]
    dim: int = eqx.field(static=True)
    num_experts: int = eqx.field(static=True)
    num_slots: int = eqx.field(static=True)
    scaling_factor: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_slots: int,
        *,
        scaling_factor: float = 1.0,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `dim`: channels of a token.
        - `num_experts`: how many experts there are.
        - `num_slots`: experts that a token is sent to.
        - `scaling_factor`: the sum of a token's weights.
        - `std`: deviation of the initial weight, which is normal.
        - `key`: randomness of the initial weight.
        - `dtype`: dtype of the weight; the bias is float32.

        **Raises:** ValueError if a size is not a positive integer, a number is negative
        or not finite, or there are more slots than experts.
        """
        self.dim, self.num_experts, self.num_slots = _validate_router(
            "TopKRouter", dim, num_experts, num_slots
        )
        self.scaling_factor = validate_number(
            "TopKRouter", "scaling_factor", scaling_factor
        )
        std = validate_number("TopKRouter", "std", std)
        shape = (self.num_experts, self.dim)
        self.weight = normal(key, shape, dtype, std=std)
        self.bias = jnp.zeros(self.num_experts, jnp.float32)

    @jax.named_scope("TopKRouter")
    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        token_ids: Int[Array, " tokens"],
        experts: Int[Array, "tokens slots"] | None = None,
    ) -> Routing:
        """**Arguments:**

        - `x`: the tokens' activations.
        - `token_ids`: not used; `HashRouter` has the same arguments and needs them.
        - `experts`: each token's experts, if they are not to be chosen here. Their
            weights are from these scores all the same, and have a gradient.

        **Raises:** ValueError if `experts` are not integers of shape (tokens, slots)
        and, except under `jit`, if one is outside `[0, num_experts)` or twice in a
        token. Under `jit`, the weights of a token with one outside are NaN.
        """
        logits = project(x, self.weight, wide=True)
        scores = _scores(logits)
        if experts is None:
            biased = scores + self.bias.astype(scores.dtype)[None]
            _, experts = lax.top_k(biased, self.num_slots)
        else:
            sizes = self.num_experts, self.num_slots
            validate_experts("TopKRouter", experts, x.shape[:1], *sizes)
            # A negative index would count from the end.
            experts = jnp.where(experts < 0, self.num_experts, experts)
        return _weigh(logits, scores, experts, self.scaling_factor)


class HashRouter(eqx.Module):
    """Looks the experts up by token id; the learned scores give their weights.

    The table is not trained. A row may name an expert more than once.
    """

    weight: Float[Array, "routes dim"]
    table: Int32[Array, "hashed_vocab slots"]
    dim: int = eqx.field(static=True)
    num_experts: int = eqx.field(static=True)
    num_slots: int = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    scaling_factor: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_slots: int,
        *,
        vocab_size: int,
        scaling_factor: float = 1.0,
        std: float = 0.02,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:** as for `TopKRouter`, and

        - `vocab_size`: token ids in the table.
        - `key`: randomness of the initial weight and table. The table spreads the token
            ids evenly over the experts, and no row names an expert twice. The hash of
            the release is not published; its table is in the checkpoint.

        **Raises:** ValueError as `TopKRouter` does.
        """
        self.dim, self.num_experts, self.num_slots = _validate_router(
            "HashRouter", dim, num_experts, num_slots
        )
        (self.vocab_size,) = validate_sizes("HashRouter", vocab_size=vocab_size)
        self.scaling_factor = validate_number(
            "HashRouter", "scaling_factor", scaling_factor
        )
        std = validate_number("HashRouter", "std", std)
        weight_key, table_key = jax.random.split(key)
        shape = (self.num_experts, self.dim)
        self.weight = normal(weight_key, shape, dtype, std=std)
        sizes = self.vocab_size, self.num_slots, self.num_experts
        self.table = _spread_table(*sizes, table_key)

    @jax.named_scope("HashRouter")
    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        token_ids: Int[Array, " tokens"],
        experts: Int[Array, "tokens slots"] | None = None,
    ) -> Routing:
        """**Arguments:**

        - `x`: the tokens' activations.
        - `token_ids`: the tokens' ids, each in `[0, vocab_size)`.
        - `experts`: not used; the table, which is not trained, has a token's experts.
        """
        logits = project(x, self.weight, wide=True)
        experts = self.table[token_ids]
        return _weigh(logits, _scores(logits), experts, self.scaling_factor)


def validate_experts(
    call: str, experts: Any, tokens: tuple[int, ...], num_experts: int, num_slots: int
) -> None:
    """Refuses what are not `num_slots` different experts for each of the tokens.

    Values are looked at only where they are known.
    """
    validate_integers(call, "experts", experts)
    shape = (*tokens, num_slots)
    if experts.shape != shape:
        raise ValueError(
            f"{call}: experts of shape {experts.shape} are not {num_slots} for each "
            f"token, {shape}."
        )
    if not is_concrete(experts):
        return
    values = np.asarray(experts)
    outside = (values < 0) | (values >= num_experts)
    if outside.any():
        place = [int(i) for i in np.argwhere(outside)[0]]
        raise ValueError(
            f"{call}: expert {values[tuple(place)]} at {place} is outside "
            f"[0, {num_experts})."
        )
    ordered = np.sort(values, axis=-1)
    again = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if again.any():
        token = [int(i) for i in np.argwhere(again)[0]]
        raise ValueError(
            f"{call}: the experts {values[tuple(token)].tolist()} of the token at "
            f"{token} are not different."
        )


def _validate_router(
    call: str, dim: int, num_experts: int, num_slots: int
) -> tuple[int, ...]:
    """The sizes as integers, with at most as many slots as experts."""
    dim, num_experts, num_slots = validate_sizes(
        call, dim=dim, num_experts=num_experts, num_slots=num_slots
    )
    if num_slots > num_experts:
        allowed = f"at most num_experts={num_experts}"
        raise invalid_argument(call, "num_slots", num_slots, allowed)
    return dim, num_experts, num_slots


def _spread_table(
    vocab: int, slots: int, experts: int, key: PRNGKeyArray
) -> Int32[Array, "vocab slots"]:
    """Distinct experts in a row; each expert in equally many rows, to within one."""
    order_key, rows_key = jax.random.split(key)
    order = jax.random.permutation(order_key, experts).astype(jnp.int32)
    first = jax.random.permutation(rows_key, vocab).astype(jnp.int32) * slots
    rows = first[:, None] + jnp.arange(slots, dtype=jnp.int32)[None]
    return order[rows % experts]


def _scores(logits: Float[Array, "tokens routes"]) -> Float[Array, "tokens routes"]:
    """All scores, without a gradient: it is 0/0 where they underflow."""
    return jnp.sqrt(jax.nn.softplus(lax.stop_gradient(logits)))


def _weigh(
    logits: Float[Array, "tokens routes"],
    scores: Float[Array, "tokens routes"],
    experts: Int[Array, "tokens slots"],
    scaling_factor: float,
) -> Routing:
    """The chosen experts' scores over their sum, times the scaling factor.

    As a softmax over log scores, so that neither the quotient nor its gradient is 0/0
    where all scores underflow.
    """
    chosen = jnp.take_along_axis(logits, experts, axis=-1)
    weights = jax.nn.softmax(_log_score(chosen), axis=-1)
    # What is shown has the value that selects, to the last bit, and this gradient.
    smooth = jnp.exp(_log_score(logits))
    shown = scores + (smooth - lax.stop_gradient(smooth))
    return Routing(experts, weights * scaling_factor, shown)


def _log_score(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$\log \sqrt{\log(1 + e^x)}$, which is $x / 2$ far below zero."""
    low = x < -20
    moderate = jnp.log(jax.nn.softplus(jnp.where(low, 0, x)))
    return jnp.where(low, x, moderate) / 2
