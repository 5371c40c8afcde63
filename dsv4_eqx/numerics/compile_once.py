"""Calls outside of `jax.jit`, compiled the first time and not again.

JAX compiles a loop anew whenever its body is a new function, as a closure over weights
and positions is. Within a program that is compiled as a whole this costs nothing; a
part that is called by itself would compile all its loops at every call.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled once for each shape where nobody else compiles it.

    While its caller is traced, by `jax.jit` or a loop, nothing is added.

    **Arguments:**

    - `function`: of modules, arrays and hashable values, for arrays.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(static: tuple[Any, Any], dynamic: list[Any]) -> Any:
        leaves, structure = static
        leaves = (x if x is not None else y for x, y in zip(dynamic, leaves))
        args, options = jax.tree.unflatten(structure, list(leaves))
        return function(*args, **options)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, options))
        dynamic = [x if _is_array(x) else None for x in leaves]
        static = tuple(None if _is_array(x) else x for x in leaves), structure
        if all(map(_is_known, dynamic)) and _is_hashable(static):
            return run(static, dynamic)
        return function(*args, **options)

    return call


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, np.ndarray | np.generic)


def _is_known(x: Any) -> bool:
    """Whether the values are there, if only below a derivative."""
    return not isinstance(x, jax.core.Tracer) or x.to_concrete_value() is not None


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True
