"""The learning rate over a run: it rises, stays, and falls. Paper section 4.2.2."""

from collections.abc import Callable
from typing import Any

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_int,
    validate_number,
)


def schedule(
    peak: float,
    final: float,
    warmup_steps: int,
    constant_steps: int,
    decay_steps: int,
) -> Callable[[Any], Any]:
    """The learning rate of each step: linear warm-up, constant, then a cosine.

    The paper's for Flash: `schedule(2.7e-4, 2.7e-5, 2000, ...)`, most steps constant.

    **Arguments:**

    - `peak`: the learning rate after the warm-up.
    - `final`: the learning rate after the decay, and from then on; without steps of
        decay, it stays at `peak`.
    - `warmup_steps`: over how many steps it rises from 0, at the first step, to `peak`.
    - `constant_steps`: steps at `peak`.
    - `decay_steps`: steps from `peak` to `final`.

    **Returns:** an optax schedule: a function from the number of steps done.

    **Raises:** ValueError if a number of steps is negative, `peak` is not positive, or
    `final` is not in [0, peak]; ImportError without optax.
    """
    optax = import_optax("schedule")
    peak = validate_number("schedule", "peak", peak, above=0)
    if validate_number("schedule", "final", final) > peak:
        raise invalid_argument("schedule", "final", final, f"at most the peak, {peak}")
    lengths = dict(warmup_steps=warmup_steps, constant_steps=constant_steps)
    lengths |= dict(decay_steps=decay_steps)
    for name, steps in lengths.items():
        validate_int("schedule", name, steps, least=0)
    pieces, ends, end = [], [], 0
    if warmup_steps > 0:
        pieces.append(optax.linear_schedule(0.0, peak, warmup_steps))
        end += int(warmup_steps)
        ends.append(end)
    if constant_steps > 0 or decay_steps == 0:
        pieces.append(optax.constant_schedule(peak))
        end += int(constant_steps)
        ends.append(end)
    if decay_steps > 0:
        cosine = optax.cosine_decay_schedule(peak, int(decay_steps), final / peak)
        pieces.append(cosine)
    return optax.join_schedules(pieces, ends[: len(pieces) - 1])


def import_optax(call: str) -> Any:
    """The package optax, which only training needs."""
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            f"{call} needs optax: pip install 'dsv4-eqx[train]'"
        ) from error
    return optax
