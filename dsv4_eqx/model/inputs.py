"""Validation of a model's inputs: token ids, segment ids, targets and lengths.

It happens on the host, before anything is compiled. Under `jit`, values are unknown and
only shapes and dtypes are checked.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from dsv4_eqx.attention.documents import document_starts, validate_segment_ids
from dsv4_eqx.numerics.validation import (
    is_concrete,
    validate_counts,
    validate_integers,
)
from dsv4_eqx.numerics.varying import explicit_axes

TokenIds = Int[Array | np.ndarray, "batch seq"]
SegmentIds = Int[Array | np.ndarray, "batch seq"] | None
Lengths = Int[Array | np.ndarray, " batch"]


def validate_token_ids(
    call: str, tokens: TokenIds, vocab: int
) -> Int[Array, "batch seq"]:
    """Token ids as an int32 array.

    Refuses anything but integers of two dimensions, an empty array and, unless traced,
    an id outside `[0, vocab)`.
    """
    _validate_array(call, tokens)
    _check_range(call, "token id", tokens, vocab)
    return jnp.asarray(tokens, jnp.int32)


def validate_new_tokens(
    call: str, tokens: TokenIds, lengths: Lengths | None, vocab: int
) -> tuple[Int[Array, "batch seq"], Lengths]:
    """New token ids, 0 at the padding, and how many of them each row has, as int32.

    Without `lengths` there is no padding.
    """
    _validate_array(call, tokens)
    batch, seq = tokens.shape
    whole = np.full(batch, seq, np.int32)
    lengths = whole if lengths is None else validate_counts(call, lengths, whole)
    # Nothing may depend on the padding, not even how tokens are grouped by expert.
    where = np.where if is_concrete(tokens, lengths) else jnp.where
    is_token = np.arange(seq)[None] < lengths[:, None]
    tokens = where(is_token, tokens, tokens.dtype.type(0))
    _check_range(call, "token id", tokens, vocab)
    return jnp.asarray(tokens, jnp.int32), lengths


def validate_prediction_block(call: str, num_mtp: int) -> None:
    """Refuses a model that has not one prediction block."""
    if num_mtp != 1:
        raise ValueError(
            f"{call}: the model has {num_mtp} prediction blocks "
            "(num_nextn_predict_layers); it needs one."
        )


def validate_two_tokens(call: str, token_ids: TokenIds) -> None:
    """Refuses rows of a single token, which have nothing to predict."""
    if token_ids.shape[1] < 2:
        raise ValueError(f"{call}: give at least two tokens a row.")


def validate_streams(
    call: str, streams: Float[Array, "..."], token_ids: TokenIds
) -> None:
    """Refuses residual streams of other positions than the tokens have."""
    if streams.ndim != 4 or streams.shape[:2] != token_ids.shape:
        raise ValueError(
            f"{call}: streams of shape {streams.shape} are not (batch, seq, streams, "
            f"dim) of the tokens of shape {token_ids.shape}."
        )


def token_places(
    call: str, token_ids: Int[Array, "batch seq"], segment_ids: SegmentIds
) -> tuple[Int32[Array, "batch seq"], Int32[Array, "batch seq"] | None]:
    """Each token's position in its document, and the index of the document's start.

    Without segment ids, each row is one document, and there are no starts.
    """
    index = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    if segment_ids is None:
        return jnp.broadcast_to(index, token_ids.shape), None
    validate_segment_ids(call, segment_ids, token_ids.shape)
    starts = document_starts(segment_ids)
    return index[None] - starts, starts


def validate_axes(call: str, tree: Any) -> None:
    """Refuses arrays that are split over mesh axes of type Explicit."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        axes = explicit_axes(x) if isinstance(x, jax.Array) else ()
        if axes:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{call}: {name} is split over {', '.join(axes)}, of type Explicit, "
                "and the model leaves it to the compiler how activations are split. "
                "Call jax.sharding.auto_axes(function, out_sharding=...), with the "
                "split of its results, as jax.P('data'); or give the mesh axes of the "
                "type jax.sharding.AxisType.Auto."
            )


def validate_targets(
    call: str,
    targets: Int[Array | np.ndarray, "*batch"],
    shape: tuple[int, ...],
    vocab: int,
    mask: Bool[Array | np.ndarray, "*batch"] | None = None,
) -> Int[Array, "*batch"]:
    """Targets for positions of this shape, 0 where the mask is false.

    Refuses other shapes and dtypes and, unless traced, a target that counts and is
    outside `[0, vocab)`.
    """
    validate_integers(call, "targets", targets)
    if targets.shape != shape:
        raise ValueError(
            f"{call}: targets of shape {targets.shape} are not one for each position "
            f"of hidden, {shape}."
        )
    kept = targets
    if mask is not None:
        validate_mask(call, mask, shape)
        where = np.where if is_concrete(targets, mask) else jnp.where
        kept = where(mask, targets, targets.dtype.type(0))
    _check_range(call, "target", kept, vocab)
    # In fewer bits, the vocabulary would be another number.
    is_narrow = kept.dtype.itemsize < 4
    return jnp.asarray(kept, jnp.int32 if is_narrow or is_concrete(kept) else None)


def validate_mask(call: str, mask: Any, shape: tuple[int, ...]) -> None:
    """Refuses what is not one boolean for each target."""
    is_array = isinstance(mask, jax.Array | np.ndarray)
    if not is_array or mask.dtype != bool or mask.shape != shape:
        got = f"{mask.dtype}{list(mask.shape)}" if is_array else type(mask).__name__
        raise ValueError(
            f"{call}: the mask must be an array of booleans of the targets' shape "
            f"{shape}, true where a target counts, not {got}."
        )


def _check_range(call: str, name: str, ids: Any, vocab: int) -> None:
    if not is_concrete(ids):
        return
    values = np.asarray(ids)
    outside = (values < 0) | (values >= vocab)
    if outside.any():
        place = [int(i) for i in np.argwhere(outside)[0]]
        value = values[tuple(place)]
        raise ValueError(f"{call}: {name} {value} at {place} is outside [0, {vocab}).")


def _validate_array(call: str, tokens: Any) -> None:
    if isinstance(tokens, eqx.Module):
        raise ValueError(
            f"{call}: token ids must be an array, not {type(tokens).__name__}. Where "
            "a function may be given, as in optax.partition, a tree in the model's "
            "shape is called: give lambda _: tree."
        )
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise ValueError(
            f"{call}: token ids must be an array of JAX or numpy, not "
            f"{type(tokens).__name__}: give numpy.asarray(tokens)."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{call}: token ids must be integers, not {tokens.dtype}.")
    if tokens.ndim != 2 or 0 in tokens.shape:
        hint = " Give tokens[None] for one row, under jax.vmap too."
        raise ValueError(
            f"{call}: token ids must have the shape (batch, seq), neither empty, not "
            f"{tokens.shape}.{hint if tokens.ndim == 1 else ''}"
        )
