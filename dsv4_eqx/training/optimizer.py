"""The paper's optimizer, through optax: Muon for matrices, AdamW for the rest.

Paper sections 2.4 and 4.2.2. `roles` says which array is which, `muon` has the step.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dsv4_eqx.numerics.precision import at_least_float32
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_number,
    validate_number,
)
from dsv4_eqx.training.muon import muon_updates
from dsv4_eqx.training.roles import Kind, kinds, leaf_roles, own_kind, validate_own
from dsv4_eqx.training.schedule import import_optax


def optimizer(
    trained: Any,
    schedule: float | Callable[[Any], Any],
    *,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    momentum: float = 0.95,
    gamma: float = 0.18,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-20,
    own: Mapping[str, Any] | None = None,
) -> Any:
    r"""Muon for matrices; AdamW for embeddings, norms, sinks, biases and scales.

    For each matrix $W$ of $n \times p$ with gradient $G$ (Algorithm 1):
    $M \leftarrow \mu M + G$, then
    $W \leftarrow (1 - \eta\lambda) W
    - \eta\gamma\sqrt{\max(n, p)}\,\mathrm{NewtonSchulz}(\mu M + G)$.
    The annotations tell which dimensions are a matrix: each head, group, expert, half
    of a SwiGLU, series of a compressor and stacked layer has its own. Matrices and
    embeddings are decayed, nothing else. `describe_optimizer` shows it array by array.

    ```
    trained, rest = eqx.partition(model, trainable(model))
    transformation = optimizer(trained, schedule(2.7e-4, 2.7e-5, 2000, 90_000, 8_000))
    state = transformation.init(trained)
    updates, state = transformation.update(gradients, state, trained)
    ```

    The state is float32, or wider if the weights are, and has the weights' shapes. Over
    a mesh it has their sharding too, if `init` is called outside of `jit`. Weights
    should be float32: those in bfloat16 lose updates of less than about 1/256 of their
    size. For gradients of several batches, give the result to `optax.MultiSteps`.

    **Arguments:**

    - `trained`: the arrays to train, with None for others, as `eqx.partition` leaves
        them of a model, a sharded model, or a part of one. They may be abstract.
    - `schedule`: the learning rate $\eta$ of both, or a function of the steps done.
    - `weight_decay`: $\lambda$.
    - `clip`: the largest norm of all gradients together; None for any.
    - `momentum`: $\mu$ of Muon.
    - `gamma`: the RMS of Muon's updates, before $\eta$; near that of AdamW's.
    - `adam_b1`, `adam_b2`, `adam_eps`: of AdamW.
    - `own`: other optax transformations, learning rate included, for some arrays. The
        key is a part of their path: `own={"shared.down": optax.adamw(1e-3)}`. A
        matrix with a dimension of your own needs one, and any array without annotation.

    **Returns:** an `optax.GradientTransformationExtraArgs`.

    **Raises:** ValueError if a number is out of range; if an array is not
    floating-point, or neither its annotation nor `own` says how it is trained; or if a
    key of `own` is for no array, or two are for the same; ImportError without optax.
    """
    optax = import_optax("optimizer")
    fractions = dict(momentum=momentum, adam_b1=adam_b1, adam_b2=adam_b2)
    for name, value in fractions.items():
        if validate_number("optimizer", name, value) >= 1:
            raise invalid_argument("optimizer", name, value, "in [0, 1)")
    for name, value in dict(gamma=gamma, adam_eps=adam_eps, clip=clip).items():
        if name != "clip" or value is not None:
            validate_number("optimizer", name, value, above=0)
    validate_number("optimizer", "weight_decay", weight_decay)
    if not callable(schedule) and not (is_number(schedule) and schedule >= 0):
        allowed = "a learning rate of at least 0, or a function of the steps done"
        raise invalid_argument("optimizer", "schedule", schedule, allowed)
    own = validate_own("optimizer", trained, own)
    leaf_roles("optimizer", trained, own)

    muon = optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless(lambda updates, _: muon_updates(updates, gamma)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    adam = dict(b1=adam_b1, b2=adam_b2, eps=adam_eps)
    groups = {
        Kind.MUON: muon,
        Kind.DECAYED: optax.adamw(schedule, **adam, weight_decay=weight_decay),
        Kind.NOT_DECAYED: optax.adam(schedule, **adam),
        **{own_kind(key): transformation for key, transformation in own.items()},
    }
    parts = optax.partition(groups, lambda tree: kinds("optimizer", tree, own))
    clipped = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    return _in_float32(optax, optax.chain(clipped, parts))


def _in_float32(optax: Any, inner: Any) -> Any:
    """The transformation with at least float32 inside, and the weights' dtypes outside.

    Optax promotes integers to floats, which JAX may have been told to refuse.
    """

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: at_least_float32(jnp.asarray(x)), tree)

    def init(params: Any) -> Any:
        # On the weights' mesh the counts of steps lie as a step gives them, so that it
        # is compiled once.
        mesh = _mesh_of(params)
        on_mesh = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
        with jax.numpy_dtype_promotion("standard"), on_mesh:
            return inner.init(wide(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        like = updates if params is None else params
        with jax.numpy_dtype_promotion("standard"):
            updates, state = inner.update(wide(updates), state, wide(params), **extra)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), updates, like), state

    return optax.GradientTransformationExtraArgs(init, update)


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh of weights that are split over one, outside of `jit`."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            sharding = leaf.sharding
            if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
                return sharding.mesh
    return None
