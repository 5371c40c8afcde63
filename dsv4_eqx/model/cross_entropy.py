"""Logits of the next token, and the cross-entropy of targets, in chunks of tokens.

The logits of all tokens would be the largest array of a training step: 8,192 tokens of
the release's vocabulary take 4.2 GB in float32, and their gradient as much again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_eqx.numerics.precision import at_least_float32


@jax.named_scope("unembed")
def logits_from(
    hidden: Float[Array, "*batch dim"], unembedding: Float[Array, "vocab dim"]
) -> Float[Array, "*batch vocab"]:
    """Logits of the next token, at least float32."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden,
        unembedding,
        preferred_element_type=at_least_float32(hidden).dtype,
    )


def cross_entropy_from_logits(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Cross-entropy in nats of each target; NaN for a target outside the vocabulary."""
    is_token = (targets >= 0) & (targets < logits.shape[-1])
    index = jnp.where(is_token, targets, 0)[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return jnp.where(is_token, jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.nan)


def cross_entropy_from_hidden(
    unembedding: Float[Array, "vocab dim"],
    hidden: Float[Array, "*batch dim"],
    targets: Int[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """The same from the final hidden activations."""
    return cross_entropy_from_logits(logits_from(hidden, unembedding), targets)


def in_chunks(
    function: Callable[..., Array],
    chunk: int | None,
    unembedding: Float[Array, "vocab dim"],
    hidden: Float[Array, "*batch dim"],
    targets: Int[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """`function(unembedding, hidden, targets)` of at most `chunk` tokens at a time.

    Each chunk is computed again in the backward pass. All chunks have the same number
    of tokens, the last one padded by fewer than there are chunks.
    """
    num_tokens = targets.size
    num_chunks = 1 if chunk is None else -(-num_tokens // chunk)
    if num_chunks <= 1:
        return function(unembedding, hidden, targets)
    size = -(-num_tokens // num_chunks)

    def divided(x: Array) -> Array:
        rows = x.reshape(num_tokens, *x.shape[targets.ndim :])
        widths = [(0, num_chunks * size - num_tokens)] + [(0, 0)] * (rows.ndim - 1)
        return jnp.pad(rows, widths).reshape(num_chunks, size, *rows.shape[1:])

    # The loop adds up the chunks' gradients in the dtype of what it reads.
    wide = at_least_float32(unembedding)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(wide: Array, hidden: Array, targets: Array) -> Array:
        return function(wide.astype(unembedding.dtype), hidden, targets)

    parts = divided(hidden), divided(targets)
    nats = lax.map(lambda part: run(wide, *part), parts)
    return nats.reshape(-1)[:num_tokens].reshape(targets.shape)
