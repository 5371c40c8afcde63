r"""Low-rank adapters on a frozen model: made, marked for training, and merged.

LoRA (Hu et al. 2021): $W x + \frac{\alpha}{r} B (A x)$, where W stays as it is, an
array or packed in FP8 or FP4. A and B stand in the place of the weight (`LoRAWeight`),
so that no module of the model changes. B is 0 at first, and the model computes the same
bits as without adapters.

Two thin products are made, and nothing of W's size, but for routed experts: for each
one that has tokens, the array is formed with its adapter, and in the backward pass its
gradient, from which those of A and B come. A CPU or GPU forms one expert at a time,
a TPU or a Hopper GPU all of a layer.
"""

import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.numerics.lora_weight import LoRAWeight, is_lora, stands_for_array
from dsv4_eqx.numerics.precision import wide_dtype
from dsv4_eqx.numerics.quantize import is_fake_quantized
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    validate_key,
    validate_number,
    validate_size,
)
from dsv4_eqx.sharding.shard import shard
from dsv4_eqx.sharding.sharded_model import ShardedModel, model_on_device
from dsv4_eqx.training.roles import path_contains

_Model = TypeVar("_Model", DeepSeekV4, ShardedModel)


class Form(NamedTuple):
    """How a weight's dimensions are lead, outer and inner ones of a `LoRAWeight`."""

    num_lead: int  # without stacked layers
    num_outer: int
    num_inner: int


# What can have an adapter, by the end of its path.
ADAPTABLE: Final[Mapping[str, Form]] = types.MappingProxyType(
    {
        "attention.query_down": Form(0, 1, 1),
        "attention.query_up": Form(0, 2, 1),
        "attention.key_value": Form(0, 1, 1),
        "attention.output_down.weight": Form(1, 1, 1),
        "attention.output_up": Form(0, 1, 2),
        "shared.gate_up": Form(1, 1, 1),
        "shared.down": Form(0, 1, 1),
        "experts.gate_up": Form(1, 2, 1),
        "experts.down": Form(1, 1, 1),
    }
)
# `wq_a`, `wq_b`, `wkv` and `wo_b`, which all published recipes have.
DEFAULT_TARGETS: Final = (
    "attention.query_down",
    "attention.query_up",
    "attention.key_value",
    "attention.output_up",
)


def lora(
    model: _Model,
    *,
    targets: Iterable[str] = DEFAULT_TARGETS,
    rank: int = 8,
    alpha: float = 32.0,
    key: PRNGKeyArray,
) -> _Model:
    r"""The model with low-rank adapters, $W x + \frac{\alpha}{r} B (A x)$.

    It is a model of the same class, and computes the same bits until B is trained: B is
    0, A is uniform in $\pm 1 / \sqrt{n}$ for n inputs. Both are float32, or wider if
    the weights are; products have the activations' dtype. Weights with adapters are
    frozen: they have no gradient.

    ```
    model = lora(model, key=jax.random.key(0))
    trained, rest = eqx.partition(model, lora_mask(model))
    transformation = optimizer(trained, 1e-4)  # AdamW
    ```

    Prediction blocks have no adapters. Over a mesh, give a model from `shard`, or shard
    the result: A and B are split like the weight, and whole along their rank.

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`; its weights may be packed.
    - `targets`: parts of the weights' paths. Besides the default ones,
        `"attention.output_down"` has an adapter for each group, `"shared"` for gate, up
        and down projection of the shared experts, and `"experts"` two for each routed
        expert.
    - `rank`: of each adapter.
    - `alpha`: scales B A by alpha / rank.
    - `key`: randomness of A, which differs in each layer, group and expert.

    **Raises:** ValueError if a target matches no weight, the model has adapters
    already, or another argument is not as described.
    """
    call = "lora"
    rank = validate_size(call, "rank", rank)
    alpha = validate_number(call, "alpha", alpha, above=0)
    validate_key(call, key)
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        allowed = f"texts, as in {DEFAULT_TARGETS}"
        raise invalid_argument(call, "targets", targets, allowed)
    targets = tuple(targets)
    inner = model_on_device(call, model)
    validate_without_adapters(call, inner)
    chosen = _chosen(call, inner, targets)
    keys = jax.random.split(key, len(chosen))
    factors = {
        name: _initial(leaf, form, rank, key)
        for (name, (leaf, form)), key in zip(chosen.items(), keys, strict=True)
    }
    return with_adapters(model, factors, alpha)


def lora_mask(model: Any) -> Any:
    """Marks the adapters, for `equinox.partition`: what `lora` has made to be trained.

    With `apply_mask(layer_mask(model, layers), updates)` only some layers are trained.

    **Arguments:**

    - `model`: with adapters, over a mesh or not.

    **Raises:** ValueError if it has no adapters.
    """
    validate_has_adapters("lora_mask", model)

    def mark(node: Any) -> Any:
        marks = jax.tree.map(lambda _: False, node)
        if is_lora(node):
            marks = eqx.tree_at(
                lambda weight: (weight.a, weight.b), marks, (True, True)
            )
        return marks

    return jax.tree.map(mark, model, is_leaf=is_lora)


def merge_lora(model: _Model) -> _Model:
    r"""The model with plain arrays $W + \frac{\alpha}{r} B A$ in place of adapters.

    They are added up in float32 and rounded to the weights' dtype. A packed weight with
    an adapter becomes an array, which takes two to eight times its memory; others stay
    packed.

    **Arguments:**

    - `model`: a `DeepSeekV4` or a `ShardedModel`.

    **Raises:** ValueError if it has no adapters, or is another model.
    """
    inner = model_on_device("merge_lora", model)
    validate_has_adapters("merge_lora", inner)

    @eqx.filter_jit
    def merged(weight: LoRAWeight) -> Array:
        return weight.as_array()

    def merge(_: Any, leaf: Any) -> Any:
        return merged(leaf) if is_lora(leaf) else leaf

    return sharded_like(model, map_weights(merge, inner))


def sharded_like(model: Any, inner: DeepSeekV4) -> Any:
    """The model of one device, or that over the mesh where `model` is one."""
    if not isinstance(model, ShardedModel):
        return inner
    return shard(
        inner,
        model.mesh,
        split_vocab=model.splits_vocab,
        dimensions=dict(model.dimensions),
        fsdp=model.fsdp,
    )


def validate_without_adapters(call: str, model: Any) -> None:
    """Refuses a model with adapters, or in training of quantised weights."""
    if any(map(is_fake_quantized, jax.tree.leaves(model, is_leaf=stands_for_array))):
        raise ValueError(
            f"{call}: the model is one from qat, whose weights are trained themselves: "
            "give pack_qat(model), or the model before."
        )
    if any(map(is_lora, jax.tree.leaves(model, is_leaf=is_lora))):
        raise ValueError(
            f"{call}: the model has adapters already, and a weight has one at most: "
            "merge_lora(model) first, or give the model without them."
        )


def validate_has_adapters(call: str, model: Any) -> None:
    """Refuses a model without adapters."""
    if not any(map(is_lora, jax.tree.leaves(model, is_leaf=is_lora))):
        raise ValueError(f"{call}: the model has no adapters: give lora(model, ...).")


def adaptable(model: DeepSeekV4) -> dict[str, tuple[Any, Form]]:
    """Every weight that can have an adapter, by its path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        model.layers, is_leaf=stands_for_array
    ):
        name = "layers." + name_of(path)
        for ending, form in ADAPTABLE.items():
            # A part of one's own may have a field of the same name.
            if name.endswith(f".{ending}") and leaf.ndim >= sum(form):
                found[name] = leaf, form
    return found


def with_adapters(
    model: Any, factors: Mapping[str, tuple[Array, Array]], alpha: float
) -> Any:
    """The model with adapters of these factors A and B, by the weights' paths."""
    inner = model.model if isinstance(model, ShardedModel) else model
    forms = {name: form for name, (_, form) in adaptable(inner).items()}

    def adapt(path: Any, leaf: Any) -> Any:
        name = name_of(path)
        if name not in factors:
            return leaf
        sizes = forms[name].num_outer, forms[name].num_inner
        return LoRAWeight(leaf, *factors[name], alpha, *sizes)

    return sharded_like(model, map_weights(adapt, inner))


def factor_shapes(
    shape: tuple[int, ...], form: Form, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a weight."""
    end = len(shape) - form.num_inner
    num_lead = end - form.num_outer
    lead, outer, inner = shape[:num_lead], shape[num_lead:end], shape[end:]
    return (*lead, rank, *inner), (*lead, *outer, rank)


def _chosen(
    call: str, model: DeepSeekV4, targets: tuple
) -> dict[str, tuple[Any, Form]]:
    """Each weight that a target matches, by its path, and its form."""
    found = adaptable(model)
    for target in targets:
        is_text = isinstance(target, str)
        if not is_text or not any(path_contains(target, name) for name in found):
            known = [key for key in ADAPTABLE if any(n.endswith(key) for n in found)]
            raise ValueError(
                f"{call}: the target {target!r} matches no weight that can have an "
                f"adapter; there are {', '.join(known)}."
            )
    if not targets:
        raise invalid_argument(call, "targets", targets, "at least one")
    return {
        name: weight
        for name, weight in found.items()
        if any(path_contains(target, name) for target in targets)
    }


def _initial(
    weight: Any, form: Form, rank: int, key: PRNGKeyArray
) -> tuple[Array, Array]:
    shape_a, shape_b = factor_shapes(weight.shape, form, rank)
    bound = float(math.prod(weight.shape[-form.num_inner :])) ** -0.5
    dtype = wide_dtype(weight.dtype)
    a = jax.random.uniform(key, shape_a, dtype, -bound, bound)
    return a, jnp.zeros(shape_b, dtype)


def map_weights(function: Any, model: Any) -> Any:
    """The tree with the function's results, given path and weight."""
    return jax.tree_util.tree_map_with_path(function, model, is_leaf=stands_for_array)


def name_of(path: Any) -> str:
    """A path in a model as a text."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
