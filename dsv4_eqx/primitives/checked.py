"""Sizes and numbers that primitives are made with, refused before they are used."""

import math
import numbers
from typing import Any


def checked_size(call: str, name: str, size: Any) -> int:
    """`size` as a Python integer.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the size.
    - `size`: anything.

    **Raises:** ValueError if it is not an integer, numpy's included, of at least 1.
    """
    is_int = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    if not is_int or size < 1:
        raise ValueError(f"{call}({name}={size!r}): must be an integer, at least 1.")
    return int(size)


def checked_number(call: str, name: str, number: Any) -> float:
    """`number` as a Python float.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the number.
    - `number`: anything.

    **Raises:** ValueError if it is not a number, finite and not negative.
    """
    is_real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_real or not (math.isfinite(number) and float(number) >= 0):
        raise ValueError(
            f"{call}({name}={number!r}): {name} must be finite and not negative."
        )
    return float(number)
