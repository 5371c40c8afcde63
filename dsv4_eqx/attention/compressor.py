"""Compression: each window of tokens becomes one entry.

Paper sections 2.3.1 and 2.3.2. The same module serves heavily compressed attention
(disjoint windows), compressed sparse attention and its indexer (each entry also pools
the window before its own, through a second series of channels).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from dsv4_eqx.attention.attend import Entries
from dsv4_eqx.config import Config
from dsv4_eqx.primitives.norm import RMSNorm
from dsv4_eqx.primitives.precision import wide_einsum
from dsv4_eqx.primitives.rotary import RotaryEmbedding


class Compressor(eqx.Module):
    r"""Pools windows of `ratio` tokens by a softmax over tokens, channel by channel.

    $C_w = \sum_j \mathrm{softmax}_j(Z_j + B_j) \odot V_j$ over the window's tokens $j$
    (paper eq. 20 to 23), float32, then normalised and rotated to the position of the
    window's first token. With two series, the first one of the *previous* window's
    tokens joins the same softmax (eq. 9 to 12): that series comes first in the weights,
    though the paper names it b.
    """

    value: Float[Array, "series head_dim dim"]
    gate: Float[Array, "series head_dim dim"]
    position_bias: Float32[Array, "ratio series head_dim"]
    norm: RMSNorm
    rope: RotaryEmbedding

    def __init__(
        self,
        config: Config,
        *,
        ratio: int,
        overlap: bool,
        head_dim: int,
        rope: RotaryEmbedding,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
    ):
        """**Arguments:**

        - `config`: `hidden_size`, `rms_norm_eps` and `initializer_range`.
        - `ratio`: tokens in a window.
        - `overlap`: whether an entry also pools the window before its own.
        - `head_dim`: channels of an entry.
        - `rope`: the layer's rotary embedding.
        - `key`: randomness of the initial weights.
        - `dtype`: dtype of the weights; the position bias is float32.
        """
        value_key, gate_key = jax.random.split(key)
        series = 2 if overlap else 1
        shape = (series, head_dim, config.hidden_size)
        std = config.initializer_range
        self.value = std * jax.random.normal(value_key, shape, dtype)
        self.gate = std * jax.random.normal(gate_key, shape, dtype)
        self.position_bias = jnp.zeros((ratio, series, head_dim))
        self.norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.rope = rope

    @jax.named_scope("Compressor")
    def __call__(self, x: Float[Array, "batch seq dim"]) -> Entries:
        """Entries of all complete windows of a sequence that starts at position 0.

        **Arguments:**

        - `x`: normalised activations, in `x.dtype` of the entries.
        """
        ratio = self.position_bias.shape[0]
        windows = x.shape[1] // ratio
        values, gates = self.project(x[:, : windows * ratio])
        pooled = self.pool(_windows(values, ratio), _windows(gates, ratio))
        first = jnp.arange(windows, dtype=jnp.int32) * ratio
        return self.finish(pooled.astype(x.dtype), jnp.tile(first, (x.shape[0], 1)))

    def project(
        self, x: Float[Array, "batch seq dim"]
    ) -> tuple[
        Float[Array, "batch seq series head_dim"],
        Float[Array, "batch seq series head_dim"],
    ]:
        """Each token's values and gates, float32.

        **Arguments:**

        - `x`: normalised activations.
        """
        values = wide_einsum("bsd,ncd->bsnc", x, self.value)
        return values, wide_einsum("bsd,ncd->bsnc", x, self.gate)

    def pool(
        self,
        values: Float[Array, "batch windows ratio series head_dim"],
        gates: Float[Array, "batch windows ratio series head_dim"],
    ) -> Float[Array, "batch windows head_dim"]:
        """One entry of each window, float32.

        **Arguments:**

        - `values`, `gates`: from `project`, of consecutive windows; before the first
            of them there is nothing.
        """
        gates = gates + self.position_bias.astype(gates.dtype)
        if self.value.shape[0] == 2:
            values = jnp.concatenate(
                [_previous(values[..., 0, :], 0), values[..., 1, :]], axis=2
            )
            gates = jnp.concatenate(
                [_previous(gates[..., 0, :], -jnp.inf), gates[..., 1, :]], axis=2
            )
        else:
            values, gates = values[..., 0, :], gates[..., 0, :]
        return jnp.sum(jax.nn.softmax(gates, axis=2) * values, axis=2)

    def finish(
        self,
        pooled: Float[Array, "batch windows head_dim"],
        first_positions: Int[Array, "batch windows"],
        owners: Int[Array, "batch windows"] | None = None,
    ) -> Entries:
        """Normalised, rotated entries.

        **Arguments:**

        - `pooled`: from `pool`, in the dtype that the entries will have.
        - `first_positions`: position of each window's first token.
        - `owners`: document of each window, where a row has several.
        """
        ratio = self.position_bias.shape[0]
        return Entries(
            values=self.rope(self.norm(pooled), first_positions),
            last_positions=first_positions + (ratio - 1),
            owners=owners,
        )


def _windows(x: Float[Array, "batch seq *channels"], ratio: int) -> Array:
    return x.reshape(x.shape[0], x.shape[1] // ratio, ratio, *x.shape[2:])


def _previous(
    x: Float[Array, "batch windows ratio head_dim"], before: float
) -> Float[Array, "batch windows ratio head_dim"]:
    """Each window's predecessor; `before` the first one."""
    first = jnp.full_like(x[:, :1], before)
    return jnp.concatenate([first, x], axis=1)[:, : x.shape[1]]
