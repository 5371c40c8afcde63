"""Reading prompts into a cache, in parts that have one of a few sizes.

Memory is thus bounded for prompts of any length, and another prompt needs no new
compilation unless its parts have another size.
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
    """The caches of the model and, where it drafts tokens, of the prediction block.

    The latter has one token less, since the block also needs the next token.
    """

    model: Cache
    mtp: MTPCache | None


def parts(longest: int) -> list[int]:
    """Sizes of the parts in which a prompt is read, by its longest row."""
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

    With `drafts`, the prediction block reads them too. The caches `before`, which they
    continue, must have the capacity and are not changed.
    """
    after, first = None, 0
    for size in parts(tokens.shape[1]):
        # One more token, which is the next token of the part's last one.
        part = np.zeros((len(tokens), size + 1), np.int32)
        unread = tokens[:, first : first + size + 1]
        part[:, : unread.shape[1]] = unread
        num_unread = lengths - first
        counts = np.stack([np.clip(n, 0, size) for n in (num_unread, num_unread - 1)])
        part, counts = jax.device_put((part, counts.astype(np.int32)))
        if after is not None:
            after = read_next(model, *after, part, counts)
        elif before is not None:
            after = read_after(model, before, part, counts)
        else:
            after = read_first(model, part, counts, capacity=capacity, drafts=drafts)
        first += size
    assert after is not None  # every prompt has a token
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
    """The first part of the prompts, read into new caches."""
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
    """A part of the prompts, with one token more, read into a copy of the caches.

    `counts` says for each row how many tokens the model reads, and how many next tokens
    the prediction block reads.
    """
    streams, cache = model.extend_streams(part[:, :-1], caches.model, counts[0])
    mtp = caches.mtp
    if mtp is not None:
        index = jnp.arange(part.shape[1] - 1)[None]
        following = jnp.where(index < counts[1][:, None], part[:, 1:], 0)
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
    """Another part, read into the memory of the caches.

    `last` is the streams of each row's last token so far.
    """
    caches, new = read_after(model, caches, part, counts)
    return caches, jnp.where((counts[0] > 0)[:, None, None], new, last)


@functools.partial(jax.jit, static_argnames="times")
def repeat_rows(
    caches: Caches, streams: Float[Array, "batch streams dim"], times: int
) -> tuple[Caches, Float[Array, "rows streams dim"]]:
    """Each row repeated several times in succession, for samples of one prompt."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), (caches, streams))


def last_of(
    x: Shaped[Array, "batch seq *channels"], lengths: Int[Array, " batch"]
) -> Shaped[Array, "batch ..."]:
    """What stands at each row's last token; at its first place if it has none."""
    index = jnp.maximum(lengths - 1, 0)
    return jax.vmap(lambda row, i: row[i])(x, index)
