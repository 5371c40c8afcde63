"""Under `jax.vmap`, kernels that have no rule for it run one call after another."""

from collections.abc import Callable
from typing import Any

import jax.custom_batching


def one_by_one(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, mapped by a loop under `jax.vmap`; without it, nothing is added.

    It stands inside of custom derivative rules: what it wraps is not differentiated.

    **Arguments:**

    - `kernel`: of arrays alone.
    """
    return jax.custom_batching.sequential_vmap(kernel)
