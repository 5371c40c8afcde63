"""`shard`: from a model, or a function that makes one, to the model over a mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsv4_eqx.model.abstract import AbstractModel
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.validation import invalid_argument, validate_flag
from dsv4_eqx.sharding.fsdp import split_further
from dsv4_eqx.sharding.mesh import validate_mesh
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import partition_specs, place, rules_with
from dsv4_eqx.sharding.sharded_model import ShardedModel


def shard(
    model: DeepSeekV4 | Callable[[], DeepSeekV4],
    mesh: Mesh | AbstractMesh,
    *,
    split_vocab: bool = True,
    dimensions: Mapping[str, str | None] | None = None,
    fsdp: bool = False,
) -> ShardedModel:
    """The model over a mesh, with the same methods.

    Given a function that makes the model, each device makes only its part, with the
    same values as on one device: `shard(lambda: DeepSeekV4(config, key=key), mesh)`.

    The model may hold modules of your own. Their dimensions that are not in
    `DIMENSIONS` are named here: `dimensions={"lora_rank": None, "my_heads": "tensor"}`
    keeps `lora_rank` whole on every device and splits `my_heads`. The class of a module
    whose arrays are split declares what its output is:

        class MyAttention(eqx.Module):
            partial_over = ("my_heads",)  # each device's output is a partial sum

    or `partial_over = ()` if each device has the whole output all the same. A module
    without split arrays must declare the latter if it is inside of a part of the
    library that has only some heads or tokens on each device.

    **Arguments:**

    - `model`: the model, whose arrays may be anywhere or abstract, or a function that
        makes it.
    - `mesh`: from `make_mesh`.
    - `split_vocab`: splits embedding, unembedding and logits over `tensor`.
    - `dimensions`: of your own modules: `"tensor"`, or None where it is not split.
    - `fsdp`: splits weights over `data` too, and with them gradients and the
        optimizer's state; a layer's weights are gathered while it runs.

    **Raises:** ValueError if the mesh lacks an axis or its axes are not `Auto`, an axis
    does not divide a dimension, a module lacks the `partial_over` that it needs,
    `model` is neither a `DeepSeekV4` nor a function that makes one, or has numbers
    although the mesh is abstract, or another argument is not as described.
    """
    validate_mesh("shard", mesh)
    validate_flag("shard", "split_vocab", split_vocab)
    validate_flag("shard", "fsdp", fsdp)
    rules = rules_with("shard", dimensions, split_vocab=split_vocab)
    shapes = _validate_model(model, mesh)
    specs = partition_specs(shapes, rules, mesh=mesh)
    # Modules that cannot run with split tokens are refused here, not at the first call.
    sequence = tuple(axis for axis in ("context", "tensor") if mesh.shape[axis] > 1)
    parallelize(shapes, mesh, sequence, dimensions=dimensions)
    if fsdp and mesh.shape["data"] > 1:
        specs = split_further(shapes, specs, mesh, "data")
    if isinstance(model, DeepSeekV4):
        placed = place(model, specs, mesh)
    else:
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        placed = jax.jit(model, out_shardings=shardings)()
    return ShardedModel(
        model=placed,
        mesh=mesh,
        leaf_specs=tuple(jax.tree.structure(placed).flatten_up_to(specs)),
        splits_vocab=split_vocab,
        dimensions=tuple((dimensions or {}).items()),
        fsdp=fsdp,
        config=placed.config,
    )


def _validate_model(model: Any, mesh: Mesh | AbstractMesh) -> DeepSeekV4:
    """The model, or the shapes of what the function makes."""
    is_model, made = isinstance(model, DeepSeekV4), model
    if not is_model and callable(model) and not isinstance(model, AbstractModel):
        made = eqx.filter_eval_shape(model)
    if not isinstance(made, DeepSeekV4):
        name = type(made).__name__
        raise invalid_argument(
            "shard", "model", name, "a DeepSeekV4, or what makes one"
        )
    is_abstract = is_model and isinstance(made.embedding, jax.ShapeDtypeStruct)
    if isinstance(mesh, AbstractMesh) and not is_abstract:
        raise ValueError(
            "shard: an abstract mesh holds no numbers: give a model of shapes, as from "
            "equinox.filter_eval_shape."
        )
    return made
