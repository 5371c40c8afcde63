"""The grouped linear map: one product for each group of channels.

Half of DeepSeek-V4's grouped output projection (paper section 2.3.1): attention's
output is far wider than the model, so each group of heads is first projected down on
its own.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.product import project_groups
from dsv4_eqx.numerics.validation import validate_dtype, validate_number, validate_sizes


class GroupedLinear(eqx.Module):
    r"""A block-diagonal linear map without bias: groups never mix.

    $y_g = W_g x_g$ for every group $g$. Split over its groups it needs no collective.
    """

    weight: Float[Array, "groups out_per_group in_per_group"]

    def __init__(
        self,
        in_features_per_group: int,
        out_features: int,
        n_groups: int,
        *,
        key: PRNGKeyArray,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `in_features_per_group`: channels that come in for each group.
        - `out_features`: channels that go out for all groups together.
        - `n_groups`: number of groups; must divide `out_features`.
        - `key`: randomness of the initial weight, normal with deviation `std`.
        - `dtype`: dtype of the weight.

        **Raises:** ValueError if a size is not a positive integer, the groups do not
        divide `out_features`, `std` is negative or not finite, or `dtype` is none
        for weights.
        """
        inner, out_features, n_groups = validate_sizes(
            "GroupedLinear",
            in_features_per_group=in_features_per_group,
            out_features=out_features,
            n_groups=n_groups,
        )
        std = validate_number("GroupedLinear", "std", std)
        dtype = validate_dtype("GroupedLinear", dtype)
        if out_features % n_groups != 0:
            raise ValueError(
                f"GroupedLinear(out_features={out_features}, n_groups={n_groups}): "
                "the groups must divide out_features."
            )
        shape = (n_groups, out_features // n_groups, inner)
        self.weight = normal(key, shape, dtype, std=std)

    @jax.named_scope("GroupedLinear")
    def __call__(
        self, x: Float[Array, "*batch groups in_per_group"]
    ) -> Float[Array, "*batch groups out_per_group"]:
        """**Arguments:**

        - `x`: any leading dimensions, then the groups and the channels of each.

        **Raises:** ValueError if the last two dimensions are not the weight's, or the
        dtypes differ.
        """
        groups, _, in_per_group = self.weight.shape
        if x.shape[-2:] != (groups, in_per_group):
            raise ValueError(
                f"GroupedLinear was called with x of shape {x.shape}: the last two "
                f"dimensions must be (groups, in_per_group) = {(groups, in_per_group)}."
            )
        if x.dtype != self.weight.dtype:
            raise ValueError(
                f"GroupedLinear was called with x of dtype {x.dtype}, its weight is "
                f"{self.weight.dtype}: cast one of them."
            )
        return project_groups(x, self.weight)
