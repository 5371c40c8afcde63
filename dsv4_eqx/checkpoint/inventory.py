"""What tensors a model is made of, and what a set of names has too many or too few."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_eqx.checkpoint.aliases import is_mixed, published_names
from dsv4_eqx.checkpoint.names import Source, sources
from dsv4_eqx.config.config import Config
from dsv4_eqx.model.model import DeepSeekV4, abstract_model
from dsv4_eqx.numerics.validation import FLOATS, invalid_argument, validate_dtype

_EMBEDDING: Final = {True: "embed.weight", False: "model.embed_tokens.weight"}
_OF_HF: Final = ("model.", "lm_head.")
_OF_BOTH: Final = "mtp."
# A configuration that asks for more than this, and for far more than there is, has a
# wrong number in it; listing what is missing would take long.
_MOST_NAMES: Final = 150_000  # of experts; the largest released model has 71,424
_MOST_BLOCKS: Final = 64  # the largest released model has 62
_LEAST_OF_BLOCK: Final = 20  # tensors of a block, at least, in any naming


class Plan(NamedTuple):
    """A model without numbers, and the tensors that it takes."""

    model: DeepSeekV4
    tensors: Mapping[str, Any]  # what there is, under the names that are wanted
    wanted: list[tuple[Source, Any]]  # and the abstract leaf that each fills
    other: list[Source]  # the same under the other naming


def make_plan(
    call: str,
    config: Config,
    tensors: Mapping[str, Any],
    dtype: DTypeLike | None,
    dtype_of: Callable[[Any], np.dtype | None],
) -> Plan:
    """Plans the model that some tensors are for.

    **Arguments:**

    - `call`: what the user called.
    - `config`: of the model.
    - `tensors`: that there are, by name.
    - `dtype`: of the weights that need not stay float32; the embedding's by default.
    - `dtype_of`: the dtype of one of the tensors, None if it has none.

    **Raises:** ValueError if a name is no text, `dtype` is none for weights, two names
    mean the same tensor, or the configuration asks for far more tensors than there are.
    """
    for name in tensors:
        if not isinstance(name, str):
            raise invalid_argument(call, "tensors", name, "named by texts")
    mixed = is_mixed(tensors)
    meant = published_names(tensors, mixed=mixed)
    tensors = {name: tensors[own] for name, own in meant.items()}
    official = mixed or _is_official(tensors)
    if dtype is None:
        embedding = tensors.get(_EMBEDDING[official])
        found = None if embedding is None else dtype_of(embedding)
        # Another is a fault, found later with the rest of them.
        is_weight = found is not None and found.name in FLOATS
        dtype = found if is_weight else jnp.float32
    dtype = validate_dtype(call, dtype)
    has_mtp = any(name.startswith(_OF_BOTH) for name in tensors)
    if not has_mtp and (mixed or not official):  # transformers drops it
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    _validate_count(call, config, len(tensors))
    model = abstract_model(config, dtype)
    wanted = list(sources(model, official=official))
    other = [source for source, _ in sources(model, official=not official)]
    return Plan(model, tensors, wanted, other)


def naming_faults(plan: Plan, known: Collection[str]) -> Iterator[str]:
    """What is missing, extra, or given under both namings; one string for each.

    **Arguments:**

    - `plan`: from `make_plan`.
    - `known`: names of the tensors that it has a use for.
    """
    names = plan.tensors.keys()
    for source, _ in plan.wanted:
        for name in source.names.flat:
            if name not in names:
                yield f"{name} is missing (shape {source.tensor_shape})"
    extra = [name for name in names if name not in known]
    twins = _twins(plan) if extra else {}
    for name in extra:
        given = [twin for twin in twins.get(name, ()) if twin in known]
        fault = f"is {given[0]}, given twice" if given else "is not part of the model"
        yield f"{name} {fault}"


def faults_error(call: str, faults: Collection[str]) -> ValueError:
    """One error for all of them.

    **Arguments:**

    - `call`: what the user called, and on what.
    - `faults`: what is wrong.
    """
    listed = "\n  ".join(sorted(faults))
    return ValueError(f"{call}: {len(faults)} faults:\n  {listed}")


def _twins(plan: Plan) -> dict[str, list[str]]:
    """For each name under the other naming, what the same numbers are called here."""
    twins = {}
    for (here, _), there in zip(plan.wanted, plan.other):
        # One naming may have a tensor for each expert where the other has one for all.
        shared = here.names.shape[: there.names.ndim]
        for index in np.ndindex(shared):
            names = list(np.ravel(here.names[index]))
            twins |= dict.fromkeys(np.ravel(there.names[index]), names)
    return twins


def _is_official(names: Collection[str]) -> bool:
    of_one = [name for name in names if not name.startswith(_OF_BOTH)]
    return 2 * sum(name.startswith(_OF_HF) for name in of_one) <= len(of_one)


def _validate_count(call: str, config: Config, num_names: int) -> None:
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = 3 * config.n_routed_experts * layers
    too_many = layers > max(_MOST_BLOCKS, num_names // _LEAST_OF_BLOCK)
    if too_many or experts > max(_MOST_NAMES, 2 * num_names):
        raise ValueError(
            f"{call}: the configuration has {layers} blocks of "
            f"{config.n_routed_experts} experts and there are {num_names} tensors; one "
            "of the numbers is wrong."
        )
