"""Calls outside of `jax.jit`, compiled the first time and not again.

JAX compiles a loop anew whenever its body is a new function, as a closure over weights
and positions is. Within a program that is compiled as a whole this costs nothing; a
part that is called by itself would compile all its loops at every call.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled once for each shape where nobody else compiles it.

    It takes modules, arrays and hashable values, and returns arrays. With traced
    arguments, as inside of `jax.jit` or a loop, nothing is added. What is compiled sees
    its Python side effects once; under `jax.disable_jit` it does not.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(static: tuple[Any, Any], dynamic: list[Any]) -> Any:
        leaves, structure = static
        leaves = (x if x is not None else y for x, (_, y) in zip(dynamic, leaves))
        args, options = jax.tree.unflatten(structure, list(leaves))
        return function(*args, **options)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, options))
        dynamic = [x if _is_array(x) else None for x in leaves]
        # With its type: 1, 1.0 and True are equal, and other programs.
        known = [None if _is_array(x) else x for x in leaves]
        static = tuple((type(x), x) for x in known), structure
        fits = all(_is_known(x) and not _is_cut(x) for x in dynamic)
        if fits and _is_hashable(static):
            return run(static, dynamic)
        return function(*args, **options)

    return call


def _is_array(x: Any) -> bool:
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return is_array and not isinstance(x, np.bool_)  # that is a flag


def _is_cut(x: Any) -> bool:
    """Whether `jax.jit` would cut off digits of numpy's integers."""
    is_wide = isinstance(x, np.ndarray) and x.dtype in (np.int64, np.uint64)
    if not is_wide or x.size == 0 or jax.config.read("jax_enable_x64"):
        return False
    limits = np.iinfo(np.int32)
    return bool(x.min() < limits.min or x.max() > limits.max)


def _is_known(x: Any) -> bool:
    """Whether the values are there, if only below a derivative."""
    return not isinstance(x, jax.core.Tracer) or x.to_concrete_value() is not None


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True
