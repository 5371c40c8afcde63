"""Which form of every kernel runs: the one place that chooses by machine.

Each operation in this folder has a reference, a few lines that anyone can read, and
forms for machines, with derivatives of their own. A CPU wants blocks that fit its
caches and loops that stop as soon as the data allow it. A GPU wants few large steps,
and no loop whose trips only the device knows, since each of its rounds waits for the
host. What runs is chosen while a program is traced, by the default device, or by
`use_kernels`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Final

import jax


@dataclasses.dataclass(frozen=True)
class Form:
    """How the kernels of one kind of machine work."""

    name: str
    query_block: int  # of attention and the indexer, where XLA multiplies
    entry_tile: int  # entries whose logits exist at a time
    stops_early: bool = False  # whether loops may end where the data say so
    hopper: bool = False  # whether the kernels written for Hopper GPUs run
    hopper_query_block: int = 4096  # where they do
    untried: bool = False  # whether those run too that no GPU has run yet


_WHOLE: Final = 1 << 30
_HOPPER: Final = Form("hopper", query_block=2048, entry_tile=1024, hopper=True)
FORMS: Final = {
    form.name: form
    for form in (
        Form("reference", query_block=_WHOLE, entry_tile=_WHOLE),
        Form("cpu", query_block=64, entry_tile=256, stops_early=True),
        Form("gpu", query_block=512, entry_tile=2048),
        _HOPPER,
        dataclasses.replace(_HOPPER, name="hopper-next", untried=True),
        Form("tpu", query_block=512, entry_tile=2048),
    )
}
# Part of jit's cache key: a program is traced again where this is another.
_chosen = jax.make_user_context(None)


def current_form() -> Form:
    """The form that a program traced now is made of."""
    return FORMS[_chosen.value or _form_of_default_device()]


def is_reference() -> bool:
    """Whether every operation is to be its reference."""
    return current_form().name == "reference"


def _form_of_default_device() -> str:
    # None, a device, or a platform's name.
    device: Any = jax.config.jax_default_device  # pyright: ignore
    if device is None or isinstance(device, str):
        return _form_of_platform(device)
    return _form_of_device(device)


@functools.cache
def _form_of_platform(platform: str | None) -> str:
    return _form_of_device(jax.local_devices(backend=platform)[0])


def _form_of_device(device: Any) -> str:
    if getattr(device, "compute_capability", None) == "9.0":
        return "hopper"
    return device.platform if device.platform in FORMS else "gpu"


@contextlib.contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Programs traced inside are made of the kernels for one kind of machine.

    By default they are those of the default device. `"reference"` computes with plain
    operations alone, slowly and with much memory; derivatives of every order, forward
    mode and float64 work there.

    **Arguments:**

    - `name`: `"reference"`, `"cpu"`, `"gpu"`, `"tpu"`, `"hopper"` (H100 and H200), or
        `"hopper-next"`: Hopper's and, beside them, a kernel for Sinkhorn's rounds,
        which is equal to the reference in an interpreter and has not run on a GPU yet.

    **Raises:** ValueError if there is no such form.
    """
    if name not in FORMS:
        raise ValueError(
            f"use_kernels was called with {name!r}: the forms are {sorted(FORMS)}."
        )
    with _chosen(name):
        yield
