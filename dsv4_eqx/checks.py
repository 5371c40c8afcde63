"""Judging values that may be anything, and saying what is wrong with one."""

from typing import Any, Final

_LARGEST_FLOAT32: Final = (2.0 - 2.0**-23) * 2.0**127
_LONGEST: Final = 200  # characters of a value in an error


def is_int(value: Any) -> bool:
    """Whether `value` is an integer; a boolean is none.

    **Arguments:**

    - `value`: anything.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number that float32 can hold; NaN and booleans are none.

    **Arguments:**

    - `value`: anything.
    """
    is_real = is_int(value) or isinstance(value, float)
    return is_real and abs(value) <= _LARGEST_FLOAT32


def shown(value: Any) -> str:
    """`value` as an error shows it, whatever it is and however long.

    **Arguments:**

    - `value`: anything.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of many digits, deep nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def refusal(call: str, name: str, value: Any, allowed: str) -> ValueError:
    """The error that names the call, the value got and what is allowed.

    **Arguments:**

    - `call`: what the user called.
    - `name`: of the value.
    - `value`: anything.
    - `allowed`: completes "must be".
    """
    return ValueError(f"{call}({name}={shown(value)}): must be {allowed}.")
