"""Reading prompts into a cache, in parts of few sizes.

So memory is bounded at any length, and another prompt compiles nothing again unless it
needs a part of another size.
"""

import functools
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsv4_eqx.model.abstract import AbstractModel, Cache
from dsv4_eqx.model.mtp import MTPCache

_SMALLEST_PART: Final = 16
_LARGEST_PART: Final = 512


class Caches(eqx.Module):
    """What the model keeps, and the prediction block where it drafts tokens.

    The latter is a token behind: it needs the next one too.
    """

    model: Cache
    mtp: MTPCache | None


def parts(longest: int) -> list[int]:
    """Sizes of the parts that a prompt is read in.

    **Arguments:**

    - `longest`: tokens in the longest row.
    """
    size = _SMALLEST_PART
    while size < min(longest, _LARGEST_PART):
        size *= 2
    return [size] * -(-longest // size)


def read_prompt(
    model: AbstractModel,
    tokens: Int[np.ndarray, "batch seq"],
    lengths: Int[np.ndarray, " batch"],
    capacity: int,
    drafts: bool,
    before: Caches | None = None,
) -> tuple[Caches, Float[Array, "batch streams dim"]]:
    """The caches after the prompts, and the streams of each row's last token.

    **Arguments:**

    - `model`: the model.
    - `tokens`: the prompts' ids, then padding.
    - `lengths`: ids in each prompt, at least 1.
    - `capacity`: tokens that there will be room for.
    - `drafts`: whether the prediction block reads the prompt too.
    - `before`: caches that the prompts go on from, with room for them; they stay as
        they are.
    """
    after, first = None, 0
    for size in parts(tokens.shape[1]):
        # One more, which is the last one's next.
        part = np.zeros((len(tokens), size + 1), np.int32)
        given = tokens[:, first : first + size + 1]
        part[:, : given.shape[1]] = given
        left = lengths - first
        counts = np.stack([np.clip(n, 0, size) for n in (left, left - 1)])
        part, counts = jax.device_put((part, counts.astype(np.int32)))
        if after is not None:
            after = read_next(model, *after, part, counts)
        elif before is not None:
            after = read_after(model, before, part, counts)
        else:
            after = read_first(model, part, counts, capacity=capacity, drafts=drafts)
        first += size
    assert after is not None  # a prompt has a token
    return after


@functools.partial(jax.jit, static_argnames=("capacity", "drafts"))
def read_first(
    model: AbstractModel,
    part: Int[Array, "batch tokens"],
    counts: Int[Array, "2 batch"],
    *,
    capacity: int,
    drafts: bool,
) -> tuple[Caches, Float[Array, "batch streams dim"]]:
    """The first part of the prompts, into new caches.

    **Arguments:** as for `read_next` and `read_prompt`.
    """
    batch = len(part)
    mtp = model.init_mtp_cache(batch, capacity) if drafts else None
    caches = Caches(model.init_cache(batch, capacity), mtp)
    return read_after(model, caches, part, counts)


@jax.jit
def read_after(
    model: AbstractModel,
    caches: Caches,
    part: Int[Array, "batch tokens"],
    counts: Int[Array, "2 batch"],
) -> tuple[Caches, Float[Array, "batch streams dim"]]:
    """The first part of the prompts, into a copy of the caches.

    **Arguments:**

    - `model`, `caches`: before the part.
    - `part`: the tokens, and one more.
    - `counts`: of each row's tokens here, how many the model reads and, of their
        successors, how many the prediction block.
    """
    streams, cache = model.extend_streams(part[:, :-1], caches.model, counts[0])
    mtp = caches.mtp
    if mtp is not None:
        following = jnp.where(
            jnp.arange(part.shape[1] - 1) < counts[1][:, None], part[:, 1:], 0
        )
        _, mtp = model.extend_mtp(streams, following, mtp, counts[1])
    return Caches(cache, mtp), last_of(streams, counts[0])


@functools.partial(jax.jit, donate_argnames=("caches", "last"))
def read_next(
    model: AbstractModel,
    caches: Caches,
    last: Float[Array, "batch streams dim"],
    part: Int[Array, "batch tokens"],
    counts: Int[Array, "2 batch"],
) -> tuple[Caches, Float[Array, "batch streams dim"]]:
    """Another part of the prompts, in the place of the caches.

    **Arguments:** as for `read_after`.

    - `last`: the streams of each row's last token so far.
    """
    caches, new = read_after(model, caches, part, counts)
    return caches, jnp.where((counts[0] > 0)[:, None, None], new, last)


@functools.partial(jax.jit, static_argnames="times")
def repeat_rows(
    caches: Caches, streams: Float[Array, "batch streams dim"], times: int
) -> tuple[Caches, Float[Array, "rows streams dim"]]:
    """Each row as often, one right after the other, for as many samples of a prompt.

    **Arguments:**

    - `caches`, `streams`: from `read_prompt`.
    - `times`: how often.
    """
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), (caches, streams))


def last_of(
    x: Shaped[Array, "batch seq *channels"], lengths: Int[Array, " batch"]
) -> Shaped[Array, "batch ..."]:
    """Each row's last token.

    **Arguments:**

    - `x`: of tokens, then padding.
    - `lengths`: tokens of each row; of none, the first is taken.
    """
    index = jnp.maximum(lengths - 1, 0)
    return jax.vmap(lambda row, i: row[i])(x, index)
