"""Partial, interleaved rotary position embedding, with YaRN.

DeepSeek-V4 rotates the last `rotary_dim` channels of a head in pairs (2k, 2k + 1), and
rotates attention's output back at the query's position (paper section 2.3.1). Layers
that compress use another base and YaRN, for every rotation in that layer.
"""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.validation import (
    validate_floating,
    validate_number,
    validate_size,
)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Stretches the slow rotations so that a longer context looks like a short one.

    YaRN (arXiv 2309.00071) without its temperature: DeepSeek-V4 leaves the softmax
    scale and the amplitude of the rotation alone.

    **Arguments:**

    - `factor`: how many times longer the context becomes.
    - `original_max_position`: positions that the model saw before.
    - `beta_fast`: pairs that turn more often than this over these positions stay as
        they are.
    - `beta_slow`: pairs that turn less often are slowed down by `factor`, and those in
        between in part.

    **Raises:** ValueError if a value is not a positive and finite number, the positions
    are no integer, `factor` is below 1, or `beta_fast` is not above `beta_slow`.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        call, set_field = "YarnScaling", functools.partial(object.__setattr__, self)
        for name in ("factor", "beta_fast", "beta_slow"):
            value = validate_number(call, name, getattr(self, name), above=0)
            set_field(name, value)
        name = "original_max_position"
        set_field(name, validate_size(call, name, self.original_max_position))
        if self.factor < 1:
            raise ValueError(f"YarnScaling(factor={self.factor}): must be at least 1.")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"YarnScaling(beta_fast={self.beta_fast}, beta_slow={self.beta_slow}): "
                "beta_fast must be above beta_slow."
            )


class RotaryEmbedding(eqx.Module):
    r"""Rotates the last `rotary_dim` channels of `x` by angles that grow with position.

    Pair $k$ at position $p$: $(a, b) \to (a \cos\theta - b \sin\theta,
    a \sin\theta + b \cos\theta)$ with $\theta = p \cdot \mathrm{base}^{-2k/d}$, float32
    throughout, rounded once. It has no array: nothing to train or to shard.
    """

    rotary_dim: int = eqx.field(static=True)
    base: float = eqx.field(static=True)
    yarn: YarnScaling | None = eqx.field(static=True)

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        yarn: YarnScaling | None = None,
    ):
        """**Arguments:**

        - `rotary_dim`: how many channels are rotated; even.
        - `base`: pair k turns by `base ** (-2k / rotary_dim)` radians a position.
        - `yarn`: context extension; none by default.

        **Raises:** ValueError if `rotary_dim` is not an integer, odd or not positive,
        `base` is not above 1 and finite in float32, or `yarn` is no `YarnScaling`.
        """
        rotary_dim = validate_size("RotaryEmbedding", "rotary_dim", rotary_dim)
        if rotary_dim % 2 != 0:
            raise ValueError(
                f"RotaryEmbedding(rotary_dim={rotary_dim}): channels are rotated in "
                "pairs, so it must be even and at least 2."
            )
        base = validate_number("RotaryEmbedding", "base", base, above=1)
        if not (yarn is None or isinstance(yarn, YarnScaling)):
            raise ValueError(
                f"RotaryEmbedding(yarn={yarn!r}): must be None or a YarnScaling."
            )
        self.rotary_dim, self.base, self.yarn = rotary_dim, base, yarn

    @property
    def inv_freq(self) -> np.ndarray:
        """Radians a position, float32 `[rotary_dim // 2]`.

        The same bits as torch's at DeepSeek-V4's sizes (64 channels, bases 1e4 and
        1.6e5); at others, some are off by a unit or two in the last place.
        """
        return _inverse_frequencies(self.rotary_dim, self.base, self.yarn)

    def tables(
        self, positions: Int[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch pairs"], Float[Array, "*batch pairs"]]:
        """Cosine and sine of every pair's angle, float32.

        **Arguments:**

        - `positions`: integers; exact up to 2**24. Beyond, float32 rounds them, to
            even ones at first, so that neighbours may be turned alike.

        **Raises:** ValueError if `positions` are not integers.
        """
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ValueError(
                f"RotaryEmbedding got positions of dtype {positions.dtype}: they must "
                "be integers."
            )
        angles = jnp.multiply.outer(positions.astype(jnp.float32), self.inv_freq)
        return jnp.cos(angles), jnp.sin(angles)

    @jax.named_scope("RotaryEmbedding")
    def __call__(
        self,
        x: Float[Array, "*batch channels"],
        positions: Int[Array, "*#batch"],
        *,
        inverse: bool = False,
    ) -> Float[Array, "*batch channels"]:
        """**Arguments:**

        - `x`: the last `rotary_dim` channels are rotated, the others pass through.
        - `positions`: one for each leading index of `x`, or broadcast against them.
        - `inverse`: rotates back.

        **Raises:** ValueError if `x` has too few channels or is not floating point, or
        the positions do not broadcast or are not integers.
        """
        if x.ndim == 0 or x.shape[-1] < self.rotary_dim:
            raise ValueError(
                f"RotaryEmbedding(rotary_dim={self.rotary_dim}) was called with x of "
                f"shape {x.shape}: it needs at least {self.rotary_dim} channels."
            )
        validate_floating("RotaryEmbedding", x)
        _check_broadcast(positions.shape, x.shape[:-1])
        missing = tuple(range(x.ndim - 1 - positions.ndim))
        cos, sin = self.tables(jnp.expand_dims(positions, missing))
        still, rotating = jnp.split(x, [x.shape[-1] - self.rotary_dim], axis=-1)
        wide = at_least_float32(rotating)
        rotated = _rotate(wide, cos.astype(wide.dtype), sin.astype(wide.dtype), inverse)
        return jnp.concatenate([still, rotated.astype(x.dtype)], axis=-1)


def _rotate(
    x: Float[Array, "*batch channels"],
    cos: Float[Array, "*#batch pairs"],
    sin: Float[Array, "*#batch pairs"],
    inverse: bool,
) -> Float[Array, "*batch channels"]:
    """Each pair (a, b) turned to (a cos - b sin, b cos + a sin)."""
    signed = jnp.stack([sin, -sin] if inverse else [-sin, sin], axis=-1)
    swapped = x.reshape(*x.shape[:-1], sin.shape[-1], 2)[..., ::-1].reshape(x.shape)
    signed = signed.reshape(*sin.shape[:-1], x.shape[-1])
    return x * jnp.repeat(cos, 2, axis=-1) + swapped * signed


def _check_broadcast(positions: tuple[int, ...], leading: tuple[int, ...]) -> None:
    try:
        fits = jnp.broadcast_shapes(positions, leading) == leading
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"RotaryEmbedding got positions of shape {positions}, which do not "
            f"broadcast to the leading dimensions {leading} of x."
        )


@functools.lru_cache
def _inverse_frequencies(
    rotary_dim: int, base: float, yarn: YarnScaling | None
) -> np.ndarray:
    # float32 at every step: one ulp is 1e-2 in the cosine at a million tokens. Only
    # the power is float64, then rounded: numpy's float32 power differs by machine.
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    period = np.power(np.float64(base), exponent.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1) / period
    if yarn is not None:
        low, high = _yarn_range(rotary_dim, base, yarn)
        pair = np.arange(rotary_dim // 2, dtype=np.float32)
        ramp = np.clip((pair - np.float32(low)) / np.float32(high - low), 0, 1)
        keep = np.float32(1) - ramp
        slowed = np.float32(1) / (np.float32(yarn.factor) * period)
        inv_freq = slowed * (np.float32(1) - keep) + inv_freq * keep
    inv_freq.flags.writeable = False
    return inv_freq


def _yarn_range(rotary_dim: int, base: float, yarn: YarnScaling) -> tuple[float, float]:
    def pair_that_turns(times: float) -> float:
        turns = yarn.original_max_position / (times * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), rotary_dim - 1)
    return low, high + 0.001 if low == high else high
