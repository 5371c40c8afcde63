"""Under `jax.vmap`, kernels that have no rule for it run one call after another."""

from collections.abc import Callable
from typing import Any

import jax.custom_batching


def one_by_one(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, of arrays alone, mapped by a loop under `jax.vmap`.

    It stands inside of custom derivative rules: what it wraps is not differentiated.
    """
    return jax.custom_batching.sequential_vmap(kernel)
