"""Quantisation-aware training: weights and activations rounded as a release has them.

Paper section 5.2.1, after the release's code. In the forward pass, routed experts have
the numbers of FP4 (E2M1, a scale for 32 of a row), other matrices those of FP8 (E4M3,
128 x 128); gradients go straight through to the weights themselves. FP4 with its scales
becomes FP8 without loss where `fp8_exactness` says so, so that one forward pass stands
for both.

Of activations, keys and compressed entries are rounded to FP8 in blocks of 64 channels,
but for those that are rotated, and the indexer's queries and keys to FP4 in blocks of
32, after a Hadamard transform. Inputs of linear maps stay as they are.
"""

import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv4_eqx.attention.attention import Attention
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.lora_weight import stands_for_array
from dsv4_eqx.numerics.precision import wide_einsum
from dsv4_eqx.numerics.quantize import (
    FP4,
    FP8,
    FakeQuantizedWeight,
    fake_quantize,
    is_fake_quantized,
)
from dsv4_eqx.numerics.quantized_weight import QuantizedWeight, dequantize
from dsv4_eqx.numerics.validation import invalid_argument, is_concrete
from dsv4_eqx.primitives.norm import RMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding
from dsv4_eqx.sharding.sharded_model import ShardedModel, model_on_device
from dsv4_eqx.training.lora import (
    map_weights,
    name_of,
    sharded_like,
    validate_without_adapters,
)

_FORMATS: Final = {"fp8": FP8, "fp4": FP4}
_ENTRY_BLOCK, _LEAST_OF_ENTRY = 64, 1e-4  # of the release's `act_quant`
_INDEXER_BLOCK, _LEAST_OF_INDEXER = 32, 6 * 2.0**-126  # of its `fp4_act_quant`
_Model = TypeVar("_Model", DeepSeekV4, ShardedModel)


class _Form(NamedTuple):
    """Which of a weight's last dimensions are rows and columns in a checkpoint."""

    num_outer: int
    num_inner: int
    is_expert: bool = False


# What a release has quantised, by the end of its path.
_QUANTIZED: Final[Mapping[str, _Form]] = types.MappingProxyType(
    {
        "attention.query_down": _Form(1, 1),
        "attention.query_up": _Form(2, 1),
        "attention.key_value": _Form(1, 1),
        "attention.output_down.weight": _Form(2, 1),
        "attention.output_up": _Form(1, 2),
        "indexer.query_up": _Form(2, 1),
        "shared.gate_up": _Form(1, 1),
        "shared.down": _Form(1, 1),
        "embedding_in": _Form(1, 1),
        "streams_in": _Form(1, 1),
        "experts.gate_up": _Form(1, 1, is_expert=True),
        "experts.down": _Form(1, 1, is_expert=True),
    }
)


class FP8Norm(eqx.Module):
    """A norm whose output, but for the channels to be rotated, is rounded to FP8."""

    partial_over: ClassVar = ()

    norm: RMSNorm
    num_rotated: int = eqx.field(static=True)  # the last channels

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """The norm of `x`, rounded."""
        x = self.norm(x)
        end = x.shape[-1] - self.num_rotated
        rounded = fake_quantize(x[..., :end], FP8, _ENTRY_BLOCK, _LEAST_OF_ENTRY)
        return jnp.concatenate([rounded, x[..., end:]], axis=-1)


class FP4Rotation(eqx.Module):
    """A rotary embedding of an indexer, and a Hadamard transform, rounded to FP4.

    Products of queries and keys are the same after the transform, but for the rounding.
    """

    partial_over: ClassVar = ()

    rope: RotaryEmbedding

    def __call__(
        self, x: Float[Array, "*batch dim"], positions: Int[Array, "*positions"]
    ) -> Float[Array, "*batch dim"]:
        """`x` rotated, transformed and rounded."""
        x = self.rope(x, positions)
        matrix = jnp.asarray(_hadamard(x.shape[-1]), x.dtype)
        spread = wide_einsum("...i,oi->...o", x, matrix).astype(x.dtype)
        return fake_quantize(spread, FP4, _INDEXER_BLOCK, _LEAST_OF_INDEXER)


def qat(
    model: _Model,
    *,
    experts: str | None = "fp4",
    linears: str | None = "fp8",
    entries: str | None = "fp8",
    indexer: str | None = "fp4",
) -> _Model:
    """The model whose forward pass has the numbers of quantised weights.

    It is a model of the same class, with the same arrays to train: `trainable` and
    `optimizer` are used as before, and gradients go straight through the rounding.
    Weights should be float32. Packed weights become arrays first. `pack_qat` gives the
    model to save.

    Over a mesh, blocks with one scale must not be split: that is refused when the model
    is called.

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`.
    - `experts`: of routed experts, `"fp4"` or `"fp8"`.
    - `linears`: `"fp8"`, of the matrices of attention, except those of compressors and
        the indexer's weights; of shared experts; of a prediction block's inputs.
    - `entries`: `"fp8"`, of keys in the window and compressed entries.
    - `indexer`: `"fp4"`, of the indexer's queries and keys.

    None leaves them as they are.

    **Raises:** ValueError if a format is another, the model has adapters or is one from
    `qat` already, or the indexer's head dimension is no power of two.
    """
    call = "qat"
    given = dict(experts=experts, linears=linears, entries=entries, indexer=indexer)
    allowed = dict(experts=("fp4", "fp8"), linears=("fp8",), entries=("fp8",))
    for name, value in given.items():
        formats = (*allowed.get(name, ("fp4",)), None)
        if value not in formats:
            raise invalid_argument(call, name, value, f"one of {formats}")
    inner = model_on_device(call, model)
    validate_without_adapters(call, inner)

    def of(path: Any, leaf: Any) -> Any:
        form = _form_of(name_of(path))
        name = None if form is None else experts if form.is_expert else linears
        return leaf if form is None or name is None else _faked(leaf, form, name)

    inner = map_weights(of, inner)
    inner = _map_attention(lambda x: _rounded(call, x, entries, indexer), inner)
    return sharded_like(model, inner)


def pack_qat(model: _Model) -> _Model:
    """The model as a release has it: packed weights in place of those in training.

    It has the numbers that the model from `qat` computes with, and
    `save_pretrained(..., official=True)` writes them as they are. Activations are not
    rounded any more.

    **Arguments:**

    - `model`: from `qat`.

    **Raises:** ValueError if it is another model, or a weight is not finite.
    """
    call = "pack_qat"
    inner = model_on_device(call, model)
    leaves = jax.tree.leaves(inner, is_leaf=stands_for_array)
    inner = _map_attention(_not_rounded, inner)
    if not any(map(is_fake_quantized, leaves)):
        raise ValueError(f"{call}: no weight is in training: give qat(model, ...).")

    @eqx.filter_jit
    def packed(weight: FakeQuantizedWeight) -> tuple[QuantizedWeight, Array]:
        return weight.quantize(), jnp.isfinite(weight.weight).all()

    def pack(path: Any, leaf: Any) -> Any:
        if not is_fake_quantized(leaf):
            return leaf
        weight, is_finite = packed(leaf)
        if is_concrete(is_finite) and not bool(is_finite):
            raise ValueError(
                f"{call}: {name_of(path)} has numbers that are not finite."
            )
        return weight

    return sharded_like(model, map_weights(pack, inner))


def _form_of(name: str) -> _Form | None:
    found = (form for key, form in _QUANTIZED.items() if f".{name}".endswith(f".{key}"))
    return next(found, None)


def _faked(leaf: Any, form: _Form, name: str) -> FakeQuantizedWeight:
    weight = dequantize(leaf)
    end = weight.ndim - form.num_inner
    rows = math.prod(weight.shape[end - form.num_outer : end])
    matrix = rows, math.prod(weight.shape[end:])
    return FakeQuantizedWeight(
        weight, _FORMATS[name], matrix, form.num_outer, form.num_inner
    )


def _map_attention(function: Any, model: DeepSeekV4) -> DeepSeekV4:
    """The model with the function's results in place of every `Attention`."""

    def is_attention(node: Any) -> bool:
        return isinstance(node, Attention)

    def of(node: Any) -> Any:
        return function(node) if is_attention(node) else node

    return jax.tree.map(of, model, is_leaf=is_attention)


def _rounded(
    call: str, attention: Attention, entries: str | None, indexer: str | None
) -> Attention:
    """Attention whose keys and entries, or whose indexer's, are rounded."""
    if entries is not None:
        for where in _norms(attention):
            norm = FP8Norm(where(attention), attention.rope.rotary_dim)
            attention = eqx.tree_at(where, attention, norm)
    if indexer is not None and attention.indexer is not None:
        dim = attention.indexer.compressor.head_dim
        if dim & (dim - 1) != 0:
            raise ValueError(
                f"{call}: the indexer's heads have {dim} channels, and a Hadamard "
                "transform needs a power of two: give indexer=None."
            )
        rope = FP4Rotation(attention.indexer.compressor.rope)
        attention = eqx.tree_at(_rope_of_indexer, attention, rope)
    return attention


def _not_rounded(attention: Attention) -> Attention:
    for where in _norms(attention):
        norm = where(attention)
        if isinstance(norm, FP8Norm):
            attention = eqx.tree_at(where, attention, norm.norm)
    if attention.indexer is not None:
        rope: Any = attention.indexer.compressor.rope
        if isinstance(rope, FP4Rotation):
            attention = eqx.tree_at(_rope_of_indexer, attention, rope.rope)
    return attention


def _norms(attention: Attention) -> list[Any]:
    """Where the norms of keys and entries are."""
    norms: list[Any] = [lambda attention: attention.key_value_norm]
    if attention.compressor is not None:
        norms.append(lambda attention: attention.compressor.norm)
    return norms


def _rope_of_indexer(attention: Any) -> Any:
    return attention.indexer.compressor.rope


def _hadamard(size: int) -> np.ndarray:
    """The orthonormal one of a power of two, Sylvester's."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(size)
