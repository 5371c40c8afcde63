"""How many tokens a cache has room for, and giving it more.

A program is compiled for a capacity. Capacities are rounded up, so that a prompt or a
number of new tokens that differs a little compiles nothing again.
"""

import functools
from typing import Final, TypeVar

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from dsv4_eqx.generation.arguments import is_traced
from dsv4_eqx.model.abstract import AbstractModel, Cache
from dsv4_eqx.numerics.validation import invalid_argument, validate_int

_SMALLEST: Final = 128
_State = TypeVar("_State")


def rounded_capacity(needed: int, most: int) -> int:
    """What is needed and at most a quarter, or 127 tokens, more.

    **Arguments:**

    - `needed`: tokens.
    - `most`: beyond which there are no positions.
    """
    step = max(_SMALLEST, 2 ** ((needed - 1).bit_length() - 3))
    return min(-(-needed // step) * step, most)


def grow_cache(model: AbstractModel, cache: Cache, capacity: int) -> Cache:
    """The same cache with room for more tokens; the one given stays as it was.

    **Arguments:**

    - `model`: whose cache it is.
    - `cache`: after some tokens.
    - `capacity`: tokens that each row will have room for, those in the cache included.

    **Raises:** ValueError if the capacity is no integer, less than the cache has, or
    beyond `max_position_embeddings`; and if a row has filled a cache smaller than the
    sliding window, which no longer has the first token that the next one sees.
    """
    call = "grow_cache"
    if not isinstance(cache, Cache):
        raise invalid_argument(call, "cache", type(cache).__name__, "a Cache")
    most = model.config.max_position_embeddings
    capacity = validate_int(call, "capacity", capacity, least=cache.capacity, most=most)
    if capacity == cache.capacity:
        return cache
    if cache.capacity < model.config.sliding_window and not is_traced(cache):
        full = np.flatnonzero(jax.device_get(cache.lengths) >= cache.capacity)
        if len(full) > 0:
            raise ValueError(
                f"{call}: row {full[0]} has filled a cache for {cache.capacity} "
                "tokens, fewer than the sliding window: make a larger one at the start."
            )
    return grown(cache, model.init_cache(len(cache.lengths), capacity))


@functools.partial(jax.jit, donate_argnames="larger")
def grown(state: _State, larger: _State) -> _State:
    """The numbers of a state in the arrays of a larger one.

    **Arguments:**

    - `state`: after some tokens.
    - `larger`: before any token, with room for more.
    """

    def put(path: tuple, new: Array, old: Array) -> Array:
        # The latest window key comes last; everything else begins with the first.
        is_window = any(getattr(key, "name", "") == "window_keys" for key in path)
        start = [n - o if is_window else 0 for n, o in zip(new.shape, old.shape)]
        return lax.dynamic_update_slice(new, old, start)

    # The trees differ: each says its capacity.
    paths, tree = jax.tree_util.tree_flatten_with_path(larger)
    leaves = [put(*new, old) for new, old in zip(paths, jax.tree.leaves(state))]
    return jax.tree.unflatten(tree, leaves)
