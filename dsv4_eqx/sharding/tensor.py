"""Tensor parallelism: each device holds some heads, groups, hidden channels and tokens.

A part whose inner dimension is split returns a partial sum on each device; these are
added up. The vocabulary is split too: each device looks up the embeddings that it has,
and the loss never gathers the logits.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.attention.values import AttentionValues, observed
from dsv4_eqx.model.cross_entropy import cross_entropy_from_logits
from dsv4_eqx.sharding.gather import gather, own_part, sum_and_split


class SummedOver(eqx.Module):
    """A module whose output is a partial sum on each device of a mesh axis."""

    module: Any
    axis: str = eqx.field(static=True)

    def __call__(self, *args: Any) -> Array:
        """The module's output, added up over the axis."""
        return lax.psum(self.module(*args), self.axis)

    def extend(self, *args: Any) -> tuple[Array, Any]:
        """The output added up, and the state, which is the same on all devices."""
        out, state = self.module.extend(*args)
        return lax.psum(out, self.axis), state

    def observe(self, *args: Any) -> tuple[Array, Any]:
        """The output added up, and what the module shows, of all heads."""
        if isinstance(self.module, Attention):
            sum_heads = functools.partial(lax.psum, axis_name=self.axis)
            out, values = self.module.observe(*args, sum_heads=sum_heads)
        else:
            out, values = observed(self.module, *args)
        return lax.psum(out, self.axis), of_all_heads(values, self.axis)


class WithAllTokens(eqx.Module):
    """A module that needs all tokens, where mesh axes split them.

    The tokens of the axes' devices are gathered before the call, and the output is
    split again. An output that is a partial sum over an axis is added up in this step.
    """

    module: Any
    axes: tuple[str, ...] = eqx.field(static=True)  # that split tokens, major first
    summed: tuple[str, ...] = eqx.field(static=True)  # axes to sum over, among `axes`
    dim: int = eqx.field(static=True)  # of the tokens, in arguments and output

    def __call__(self, *args: Any) -> Array:
        """The module's output for this device's tokens."""
        return self._split(self.module(*self._gathered(args)))

    def observe(self, *args: Any) -> tuple[Array, Any]:
        """The output, and what the module shows, for this device's tokens."""
        out, values = observed(self.module, *self._gathered(args))
        for axis in self.summed:
            values = of_all_heads(values, axis)
        values = jax.tree.map(lambda x: own_part(x, self.axes, self.dim), values)
        return self._split(out), values

    def _gathered(self, args: Any) -> Any:
        return jax.tree.map(lambda x: gather(x, self.axes, self.dim), args)

    def _split(self, out: Array) -> Array:
        for axis in self.axes:
            split = sum_and_split if axis in self.summed else own_part
            out = split(out, axis, self.dim)
        return out


def of_all_heads(values: Any, axis: str) -> Any:
    """What a part shows, with the log-sum-exps of the heads of all devices."""
    if not isinstance(values, AttentionValues):
        return values
    parts = with_zeros_for_other_heads(values.log_sum_exp, axis)
    log_sum_exp = lax.psum(parts, axis)
    return AttentionValues(log_sum_exp, values.indexer, values.divergence)


def with_zeros_for_other_heads(
    x: Float[Array, "batch seq local_heads"], axis: str
) -> Float[Array, "batch seq heads"]:
    """An array of all heads, zero for those of other devices."""
    is_here = jnp.arange(lax.axis_size(axis)) == lax.axis_index(axis)
    return jnp.where(is_here[:, None], x[:, :, None], 0).reshape(*x.shape[:2], -1)


class SplitEmbedding(eqx.Module):
    """An embedding whose rows are split over a mesh axis, indexed like the array."""

    rows: Float[Array, "vocab dim"]  # of this device
    axis: str = eqx.field(static=True)
    # The mesh axes that split the sequence; with `axis`, the result is split too.
    sequence: tuple[str, ...] = eqx.field(static=True)

    def __getitem__(
        self, token_ids: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq dim"]:
        if self.axis not in self.sequence:
            return embed_split_vocab(self.rows, token_ids, self.axis)
        token_ids = gather(token_ids, self.axis, dim=1)
        embedded = _local_embeddings(self.rows, token_ids, self.axis)
        return sum_and_split(embedded, self.axis, dim=1)


def embed_split_vocab(
    embedding: Float[Array, "local_vocab dim"],
    token_ids: Int[Array, "*batch"],
    axis: str,
) -> Float[Array, "*batch dim"]:
    """Embeddings of tokens, equal on all devices of the axis that splits the rows."""
    return lax.psum(_local_embeddings(embedding, token_ids, axis), axis)


def _local_embeddings(
    embedding: Float[Array, "local_vocab dim"],
    token_ids: Int[Array, "*batch"],
    axis: str,
) -> Float[Array, "*batch dim"]:
    """Embeddings of the tokens whose rows this device has, zeros for the others."""
    rows = embedding.shape[0]
    local = token_ids - lax.axis_index(axis) * rows
    is_here = (local >= 0) & (local < rows)
    return jnp.where(is_here[..., None], embedding[jnp.where(is_here, local, 0)], 0)


def cross_entropy_split_vocab(
    logits: Float[Array, "*batch local_vocab"],
    targets: Int[Array, "*batch"],
    axis: str | None,
) -> Float[Array, "*batch"]:
    """Cross-entropy in nats of each target, without gathering the logits.

    It is NaN for a target outside the vocabulary. `axis` splits the vocabulary, if one
    does; its devices have the same targets.
    """
    if axis is None:
        return cross_entropy_from_logits(logits, targets)
    columns = logits.shape[-1]
    is_token = (targets >= 0) & (targets < columns * lax.axis_size(axis))
    top = lax.pmax(jnp.max(lax.stop_gradient(logits), axis=-1), axis)
    total = lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
    local = targets - lax.axis_index(axis) * columns
    is_here = (local >= 0) & (local < columns)
    index = jnp.where(is_here, local, 0)[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    elsewhere = jnp.where(is_token, 0, jnp.nan).astype(chosen.dtype)
    target_logit = lax.psum(jnp.where(is_here, chosen, elsewhere), axis)
    return jnp.log(total) + top - target_logit
