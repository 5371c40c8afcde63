"""The capacity of a cache in tokens: choosing it, and enlarging it.

A program is compiled for a capacity. Capacities are rounded up, so that prompts and
numbers of new tokens of similar size need no new compilation.
"""

import functools
from typing import Final, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from dsv4_eqx.model.abstract import AbstractModel, Cache
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_concrete,
    validate_int,
)

_SMALLEST: Final = 128
_State = TypeVar("_State")


def rounded_capacity(needed: int, most: int) -> int:
    """A capacity for the tokens needed, larger by at most a quarter or 127 tokens."""
    step = max(_SMALLEST, 2 ** ((needed - 1).bit_length() - 3))
    return min(-(-needed // step) * step, most)


def grow_cache(model: AbstractModel, cache: Cache, capacity: int) -> Cache:
    """The same cache with a larger capacity; the given cache is not changed.

    **Arguments:**

    - `model`: the model that the cache belongs to.
    - `cache`: from `init_cache`, `extend` or `generate`.
    - `capacity`: the most tokens that a row can then have, those in the cache included.

    **Raises:** ValueError if `cache` is not a `Cache` of this model; if `capacity` is
    not an integer, below the cache's capacity, or above `max_position_embeddings`; and
    if a row has filled a cache that is smaller than the sliding window, since it has
    already lost a token that the next one would see.
    """
    call = "grow_cache"
    if not isinstance(cache, Cache):
        raise invalid_argument(call, "cache", type(cache).__name__, "a Cache")
    limits = {"least": cache.capacity, "most": model.config.max_position_embeddings}
    capacity = validate_int(call, "capacity", capacity, **limits)
    rows = len(cache.lengths)
    wanted = eqx.filter_eval_shape(model.init_cache, rows, cache.capacity)
    if not eqx.tree_equal(wanted, eqx.filter_eval_shape(lambda: cache)):
        raise ValueError(f"{call}: the cache is one of another model.")
    if capacity == cache.capacity:
        return cache
    if cache.capacity < model.config.sliding_window and is_concrete(cache.lengths):
        full = np.flatnonzero(jax.device_get(cache.lengths) >= cache.capacity)
        if len(full) > 0:
            raise ValueError(
                f"{call}: row {full[0]} has filled a cache for {cache.capacity} "
                "tokens, fewer than the sliding window: make a larger one at the start."
            )
    return grown(cache, model.init_cache(rows, capacity))


@functools.partial(jax.jit, donate_argnames="larger")
def grown(state: _State, larger: _State) -> _State:
    """A state's values, copied into the arrays of a larger one before any token."""

    def put(path: tuple, new: Array, old: Array) -> Array:
        # The latest window key comes last; everything else begins with the first.
        is_window = any(getattr(key, "name", "") == "window_keys" for key in path)
        start = [n - o if is_window else 0 for n, o in zip(new.shape, old.shape)]
        return lax.dynamic_update_slice(new, old, start)

    # The trees are not equal: the capacity is a static field.
    paths, tree = jax.tree_util.tree_flatten_with_path(larger)
    leaves = [put(*new, old) for new, old in zip(paths, jax.tree.leaves(state))]
    return jax.tree.unflatten(tree, leaves)
