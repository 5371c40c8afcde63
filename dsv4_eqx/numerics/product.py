"""The products of activations and a weight of any number of dimensions."""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_eqx.numerics.lora_weight import LoRAWeight
from dsv4_eqx.numerics.precision import wide_einsum


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | LoRAWeight,
    *,
    over: int = 1,
    wide: bool = False,
) -> Float[Array, "..."]:
    """Sums over the last `over` dimensions of both; the weight's others come last.

    It is one product of matrices, whatever the dimensions are: no transpose of a weight
    that has three of them is ever laid out. `wide` makes it at least float32.
    """
    if isinstance(weight, LoRAWeight):
        product = functools.partial(project, over=over, wide=wide)
        num_lead = weight.ndim - weight.num_outer - weight.num_inner
        again = functools.partial(project, wide=wide)
        if num_lead > 0:
            again = functools.partial(_project_halves, num_lead=num_lead)
        return weight.project(x, product, again)
    outer, inner = weight.shape[:-over], weight.shape[-over:]
    if x.shape[-over:] != inner:
        raise ValueError(
            f"project: x of shape {x.shape} does not end in {inner}, as the weight of "
            f"shape {weight.shape} does."
        )
    size = math.prod(inner)
    rows, matrix = x.reshape(*x.shape[:-over], size), weight.reshape(-1, size)
    einsum = wide_einsum if wide else jnp.einsum
    out = einsum("...i,oi->...o", rows, matrix)
    return out.reshape(*out.shape[:-1], *outer)


def project_groups(
    x: Float[Array, "*batch groups in_per_group"],
    weight: Float[Array, "groups out_per_group in_per_group"] | LoRAWeight,
) -> Float[Array, "*batch groups out_per_group"]:
    """The product of each group of channels with its own matrix."""
    if isinstance(weight, LoRAWeight):
        return weight.project(x, project_groups, project_groups)
    # The products have the groups first; these are moved afterwards.
    return jnp.moveaxis(jnp.einsum("...gi,goi->g...o", x, weight), 0, -2)


def _project_halves(
    hidden: Float[Array, "..."], b: Float[Array, "..."], *, num_lead: int
) -> Float[Array, "..."]:
    """What each half of a SwiGLU, or other leading index, has of its own B."""
    lead = b.shape[:num_lead]
    hidden = hidden.reshape(*hidden.shape[: -num_lead - 1], -1, hidden.shape[-1])
    b = b.reshape(math.prod(lead), -1, b.shape[-1])
    out = project_groups(hidden, b)
    return out.reshape(*out.shape[:-2], *lead, out.shape[-1])
