"""Manifold-constrained hyper-connections: a residual path of several streams.

Paper section 2.2. Each sublayer reads one weighted sum of the streams. Its output is
added to all of them, after a doubly stochastic matrix has mixed the streams with each
other. The coefficients depend on the token; they and the weights that give them are
float32.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from dsv4_eqx.kernels.mix import mix, sinkhorn
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.initial import normal
from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.product import project
from dsv4_eqx.numerics.validation import (
    validate_floating,
    validate_number,
    validate_sizes,
)


class StreamMixing(NamedTuple):
    """How a sublayer's output goes back to the streams, for each token."""

    post: Float[Array, "*batch streams"]  # weight of the output in each stream
    combine: Float[Array, "*batch streams streams"]  # [source, target]


class HyperConnection(eqx.Module):
    r"""Reads a sublayer's input from the streams and writes its output back.

    With $\hat x$ the unweighted RMS norm of all streams together and
    $(a, b, C) = W \hat x$ scaled and shifted:
    $u = \sum_j (\sigma(a_j) + \epsilon) X_j$, and
    $X'_k = 2\sigma(b_k)\, y + \sum_j \mathrm{Sinkhorn}(C)_{jk} X_j$.

    Gradients are reverse-mode only: the derivatives are custom.
    """

    weight: Float32[Array, "mixes streams dim"]
    base: Float32[Array, " mixes"]
    scale: Float32[Array, "3"]
    dim: int = eqx.field(static=True)
    num_streams: int = eqx.field(static=True)
    sinkhorn_iters: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_streams: int,
        *,
        sinkhorn_iters: int = 20,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
        std: float = 0.02,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `dim`: channels of a stream.
        - `num_streams`: parallel residual streams.
        - `sinkhorn_iters`: normalisations of rows and columns.
        - `eps`: added to the weights of the streams and to Sinkhorn's sums.
        - `norm_eps`: added to the mean square of the streams.
        - `std`: deviation of the initial weight, which is normal.
        - `key`: randomness of the initial weight.

        **Raises:** ValueError if a size is not a positive integer, or a number is
        negative or not finite.
        """
        self.dim, self.num_streams, self.sinkhorn_iters = validate_sizes(
            "HyperConnection",
            dim=dim,
            num_streams=num_streams,
            sinkhorn_iters=sinkhorn_iters,
        )
        self.eps = validate_number("HyperConnection", "eps", eps)
        self.norm_eps = validate_number("HyperConnection", "norm_eps", norm_eps)
        std = validate_number("HyperConnection", "std", std)
        mixes = (2 + self.num_streams) * self.num_streams
        shape = (mixes, self.num_streams, self.dim)
        self.weight = normal(key, shape, jnp.float32, std=std)
        self.base = jnp.zeros(mixes, jnp.float32)
        self.scale = jnp.ones(3, jnp.float32)

    @compiled_once
    @jax.named_scope("HyperConnection.read")
    def read(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> tuple[Float[Array, "*batch dim"], StreamMixing]:
        """The sublayer's input, and the coefficients that `write` needs.

        **Raises:** ValueError if the streams have other sizes than the weight or are
        not floating point.
        """
        _validate_streams("HyperConnection", streams, self.weight.shape[1:])
        num_streams = streams.shape[-2]
        # Tokens last: each element of a small matrix is a vector over all tokens.
        mixes = _project(streams, self.weight, self.norm_eps)
        scale = self.scale.astype(mixes.dtype)
        base = _before_tokens(self.base, mixes)
        ends = [num_streams, 2 * num_streams]
        pre, post, combine = jnp.split(mixes, ends)
        pre_base, post_base, combine_base = jnp.split(base, ends)
        pre = jax.nn.sigmoid(pre * scale[0] + pre_base) + self.eps
        post = 2 * jax.nn.sigmoid(post * scale[1] + post_base)
        combine = combine * scale[2] + combine_base
        combine = combine.reshape(num_streams, num_streams, *mixes.shape[1:])
        combine = sinkhorn(combine, iterations=self.sinkhorn_iters, eps=self.eps)
        mixing = StreamMixing(
            post=jnp.moveaxis(post, 0, -1),
            combine=jnp.moveaxis(combine, (0, 1), (-2, -1)),
        )
        return _collapse(streams, pre), mixing

    @jax.named_scope("HyperConnection.write")
    def write(
        self,
        streams: Float[Array, "*batch streams dim"],
        output: Float[Array, "*batch dim"],
        mixing: StreamMixing,
    ) -> Float[Array, "*batch streams dim"]:
        """The streams after the sublayer.

        **Arguments:**

        - `streams`: as given to `read`.
        - `output`: the sublayer's output.
        - `mixing`: what `read` returned.

        **Raises:** ValueError if the shapes of the three do not match, or streams or
        output are not floating point.
        """
        _validate_streams("HyperConnection", streams, self.weight.shape[1:])
        validate_floating("HyperConnection", output, "output")
        leading, num_streams, dim = streams.shape[:-2], *streams.shape[-2:]
        shapes = output.shape, mixing.post.shape, mixing.combine.shape
        square = (num_streams, num_streams)
        if shapes != ((*leading, dim), (*leading, num_streams), (*leading, *square)):
            raise ValueError(
                f"HyperConnection was called with streams of shape {streams.shape}, an "
                f"output of {shapes[0]} and a mixing of {shapes[1]} and {shapes[2]}: "
                "their leading dimensions must be the same, and the output's last one "
                f"{dim}."
            )
        # combine[source, target]: its transpose would be another model.
        mixed = mix(mixing.combine, streams)
        mixed += mix(mixing.post[..., None, :], output[..., None, :])
        return mixed.astype(streams.dtype)


class HyperHead(eqx.Module):
    r"""Collapses the streams after the last block.

    $h = \sum_j (\sigma(a_j) + \epsilon) X_j$, like `HyperConnection.read` but without
    mixing (released model code).
    """

    weight: Float32[Array, "streams streams dim"]
    base: Float32[Array, " streams"]
    scale: Float32[Array, "1"]
    dim: int = eqx.field(static=True)
    num_streams: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_streams: int,
        *,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
        std: float = 0.02,
        key: PRNGKeyArray,
    ):
        """**Arguments:** as for `HyperConnection`, without `sinkhorn_iters`.

        **Raises:** ValueError as `HyperConnection` does.
        """
        self.dim, self.num_streams = validate_sizes(
            "HyperHead", dim=dim, num_streams=num_streams
        )
        self.eps = validate_number("HyperHead", "eps", eps)
        self.norm_eps = validate_number("HyperHead", "norm_eps", norm_eps)
        std = validate_number("HyperHead", "std", std)
        shape = (self.num_streams, self.num_streams, self.dim)
        self.weight = normal(key, shape, jnp.float32, std=std)
        self.base = jnp.zeros(self.num_streams, jnp.float32)
        self.scale = jnp.ones(1, jnp.float32)

    @jax.named_scope("HyperHead")
    def __call__(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> Float[Array, "*batch dim"]:
        """The weighted sum of the streams.

        **Raises:** ValueError as `HyperConnection.read` does.
        """
        _validate_streams("HyperHead", streams, self.weight.shape[1:])
        mixes = _project(streams, self.weight, self.norm_eps)
        scale = _before_tokens(self.scale, mixes)
        base = _before_tokens(self.base, mixes)
        pre = jax.nn.sigmoid(mixes * scale + base) + self.eps
        return _collapse(streams, pre)


def _project(
    streams: Float[Array, "*batch streams dim"],
    weight: Float[Array, "mixes streams dim"],
    norm_eps: float,
) -> Float[Array, "mixes ..."]:
    """The product with the normalised streams, normalised after the product."""
    wide = at_least_float32(streams)
    mean_square = jnp.mean(jnp.square(wide), axis=(-2, -1))
    mixes = project(wide, weight.astype(wide.dtype), over=2, wide=True)
    return jnp.moveaxis(mixes, -1, 0) * lax.rsqrt(mean_square + norm_eps)[None]


def _before_tokens(base: Float[Array, " mixes"], mixes: Array) -> Array:
    """`base` with dimensions of size 1 for the tokens' dimensions of `mixes`."""
    return base.astype(mixes.dtype).reshape(-1, *[1] * (mixes.ndim - 1))


def _collapse(
    streams: Float[Array, "*batch streams dim"], pre: Float[Array, "streams ..."]
) -> Float[Array, "*batch dim"]:
    weights = jnp.moveaxis(pre, 0, -1)[..., None]
    return mix(weights, streams)[..., 0, :].astype(streams.dtype)


def _validate_streams(name: str, streams: Array, expected: tuple[int, ...]) -> None:
    if streams.shape[-2:] != expected:
        raise ValueError(
            f"{name} was called with streams of shape {streams.shape}: the last two "
            f"dimensions must be (streams, dim) = {expected}."
        )
    validate_floating(name, streams, "streams")
