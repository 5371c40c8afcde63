"""The mixture of experts: route, run the chosen experts, add the shared one."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from dsv4_eqx.moe.experts import Experts, SharedExpert
from dsv4_eqx.moe.router import HashRouter, Routing, TopKRouter
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.validation import (
    validate_activations,
    validate_ids,
    validate_integers,
)


class MoE(eqx.Module):
    r"""$y = \sum_i w_i E_i(x) + E_{\mathrm{shared}}(x)$, added up in float32.

    Paper section 2.1.

    **Arguments:**

    - `router`: chooses the experts of each token.
    - `experts`: the routed experts, as many as the router scores.
    - `shared`: the expert that every token runs.
    """

    router: TopKRouter | HashRouter
    experts: Experts
    shared: SharedExpert

    @compiled_once
    @jax.named_scope("MoE")
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        token_ids: Int[Array, "batch seq"],
        experts: Int[Array, "batch seq slots"] | None = None,
    ) -> Float[Array, "batch seq dim"]:
        """**Arguments:**

        - `x`: normalised activations.
        - `token_ids`: the tokens' ids, which hash routing reads.
        - `experts`: each token's experts, in place of those that a `TopKRouter`
            chooses.

        **Raises:** ValueError if `x` has other channels or another dtype than the
        weights, the token ids are not one integer for each token, there are not as many
        experts as the router scores, or `experts` are not what the router takes.
        """
        return self._run(x, token_ids, experts)[0]

    @compiled_once
    @jax.named_scope("MoE.observe")
    def observe(
        self,
        x: Float[Array, "batch seq dim"],
        token_ids: Int[Array, "batch seq"],
        experts: Int[Array, "batch seq slots"] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Routing]:
        """Calls it, and returns the routing of each token beside the output."""
        out, routing = self._run(x, token_ids, experts)
        # A router of one's own may give no scores.
        scores = getattr(routing, "scores", None)
        routing = Routing(routing.experts, routing.weights, scores)
        return out, jax.tree.map(lambda rows: rows.reshape(*x.shape[:2], -1), routing)

    def _run(
        self,
        x: Float[Array, "batch seq dim"],
        token_ids: Int[Array, "batch seq"],
        experts: Int[Array, "batch seq slots"] | None,
    ) -> tuple[Float[Array, "batch seq dim"], Any]:
        """The output, and the `Routing` of all tokens in one dimension."""
        validate_activations("MoE", x, self.router.weight, ("batch", "seq", "dim"))
        validate_ids("MoE", "token_ids", token_ids, x.shape[:2])
        self._validate_experts()
        rows = x.reshape(-1, x.shape[-1])
        given = ()  # a router of one's own need not take any
        if experts is not None:
            validate_integers("MoE", "experts", experts)
            given = (experts.reshape(-1, experts.shape[-1]),)
        routing = self.router(rows, token_ids.reshape(-1), *given)
        routed = self.experts(rows, routing.experts, routing.weights)
        out = (routed + self.shared(rows)).astype(x.dtype)
        return out.reshape(x.shape), routing

    def _validate_experts(self) -> None:
        # Wrapped experts send tokens to the experts' devices; without the wrapper, the
        # experts on other devices would be left out silently.
        if not isinstance(self.experts, Experts):
            return
        routes, num_local = self.router.weight.shape[0], self.experts.num_local
        if num_local != routes:
            raise ValueError(
                f"MoE has {num_local} experts and its router {routes}: where shard_map "
                "splits the experts, give it the module from "
                "dsv4_eqx.sharding.parallelize.parallelize."
            )
