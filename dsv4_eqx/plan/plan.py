"""A model over a mesh before there is one: what a device holds and what it sends."""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Sharding
from jax.typing import DTypeLike

from dsv4_eqx.config.config import Config
from dsv4_eqx.model.model import DeepSeekV4, abstract_model
from dsv4_eqx.numerics.validation import validate_int
from dsv4_eqx.plan.live import peak_bytes
from dsv4_eqx.plan.programs import decoding_step, program_of, training_step
from dsv4_eqx.plan.sent import Sent, sent
from dsv4_eqx.sharding.annotations import annotated_leaves
from dsv4_eqx.sharding.rules import DEFAULT_RULES, axes_of
from dsv4_eqx.sharding.shard import shard
from dsv4_eqx.sharding.sharded_model import ShardedModel

_MOMENTS: Final = 2  # that Adam keeps of each trained number
_MOST_ROWS: Final = 2**31 - 1


class StepPlan(NamedTuple):
    """One step of a program."""

    held: dict[str, int]  # bytes on each device, by what they are for
    sent: list[Sent]


class Plan(NamedTuple):
    """What a model needs over a mesh."""

    model: ShardedModel  # of shapes and shardings alone
    batch: int
    seq: int
    training: StepPlan
    decoding: StepPlan


def make_plan(
    config: Config,
    sizes: Mapping[str, int],
    *,
    batch: int,
    seq: int,
    fsdp: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    optimizer_dtype: DTypeLike = jnp.float32,
) -> Plan:
    """Traces a step of training and one of decoding, over a mesh without devices.

    Bytes that are held follow from shapes and shardings, but for activations, which are
    an estimate: `live.peak_bytes`. `batch` counts the rows over the whole mesh, `seq`
    the tokens of a row in training and of the cache when decoding.
    """
    batch = validate_int("plan", "batch", batch, most=_MOST_ROWS)
    seq = validate_int("plan", "seq", seq, most=config.max_position_embeddings)
    faults = undivided(abstract_model(config, dtype), sizes, batch=batch, seq=seq)
    if faults:
        raise ValueError("plan: " + "; ".join(faults) + ".")
    model = abstract_sharded(config, sizes, fsdp=fsdp, dtype=dtype)
    cache = model.init_cache(batch, seq)
    weights = bytes_per_device(model)
    trained = eqx.filter(model, lambda x: jnp.issubdtype(x.dtype, jnp.inexact))
    moment = bytes_per_device(trained, jnp.dtype(optimizer_dtype).itemsize)
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    training = program_of(training_step, model, tokens, tokens)
    newest = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    decoding = program_of(decoding_step, model, newest, cache)
    held = {
        "parameters": weights,
        "gradients": bytes_per_device(trained),
        "optimizer state": _MOMENTS * moment,
        "activations": peak_bytes(training),
    }
    decoding_held = {
        "parameters": weights,
        "cache": bytes_per_device(cache),
        "activations": peak_bytes(decoding),
    }
    return Plan(
        model,
        batch,
        seq,
        StepPlan(held, sent(training, sizes)),
        StepPlan(decoding_held, sent(decoding, sizes)),
    )


def undivided(
    model: DeepSeekV4, sizes: Mapping[str, int], *, batch: int, seq: int
) -> list[str]:
    """All that the mesh does not divide, in words; the model is not over it yet."""
    rows = sizes["data"] * sizes["expert"]
    faults = []
    if batch % rows != 0:
        faults.append(f"{batch} rows do not divide over data x expert = {rows}")
    if seq % sizes["context"] != 0:
        faults.append(f"{seq} tokens do not divide over context={sizes['context']}")
    for leaf in annotated_leaves(model):
        dims = leaf.dims or ()
        shape = leaf.array.shape[leaf.array.ndim - len(dims) :]
        for name, size in zip(dims, shape):
            for axis in axes_of(DEFAULT_RULES.get(name)):
                if size % sizes[axis] != 0:
                    faults.append(
                        f"{name} of {size} do not divide over {axis}={sizes[axis]}"
                    )
    return list(dict.fromkeys(faults))


def abstract_sharded(
    config: Config, sizes: Mapping[str, int], *, fsdp: bool, dtype: DTypeLike
) -> ShardedModel:
    """The model over a mesh, without a number in it or a device behind it."""
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    return shard(abstract_model(config, dtype), mesh, fsdp=fsdp)


def bytes_per_device(tree: Any, itemsize: int | None = None) -> int:
    """Bytes of arrays on each device; `itemsize` is a number's, if not its dtype's."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding: Sharding = leaf.sharding
        here = math.prod(sharding.shard_shape(leaf.shape))
        total += here * (itemsize or leaf.dtype.itemsize)
    return total
