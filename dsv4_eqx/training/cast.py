"""A model's weights in another dtype, but for those that must stay float32."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_eqx.numerics.quantized_weight import is_quantized
from dsv4_eqx.numerics.validation import validate_dtype
from dsv4_eqx.sharding.annotations import float32_leaves


def cast(model: Any, dtype: DTypeLike) -> Any:
    """The model as `from_pretrained(..., dtype=dtype)` would have loaded it.

    Floating-point arrays get the dtype, except those whose fields are annotated
    `Float32`: norms, hyper-connections, sinks, the compressors' position biases and the
    routers' biases. These become float32, whatever they were. Integers stay. Quantised
    weights keep their codes, and give arrays of the dtype.

    It works under `jit`, has gradients, and leaves arrays where they are on a mesh. The
    arrays may be numpy's or abstract.

    **Arguments:**

    - `model`: a model, a sharded model, or a part of one. An array alone has no
        annotation, and gets the dtype.
    - `dtype`: of the weights; float64 needs `jax_enable_x64`.

    **Raises:** ValueError if `dtype` is not a dtype for weights, or an annotation is a
    string.
    """
    dtype = validate_dtype("cast", dtype)
    leaves, structure = jax.tree.flatten(model, is_leaf=is_quantized)
    are_float32 = float32_leaves("cast", model, is_quantized)
    wanted = (
        np.dtype(np.float32) if is_float32 else dtype for is_float32 in are_float32
    )
    return jax.tree.unflatten(structure, map(_cast_leaf, leaves, wanted))


def _cast_leaf(x: Any, dtype: np.dtype) -> Any:
    if is_quantized(x):
        return dataclasses.replace(x, array_dtype=dtype)
    is_array = isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    if not is_array or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)
