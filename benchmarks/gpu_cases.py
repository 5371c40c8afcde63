"""What a case of `gpu.py` is, at which sizes, and the work of a layer.

A case is a program, its data and its work. It knows how to trace itself, so that many
compile side by side, and how to make its arguments on the device, when it is its turn.
Work is what the model needs, whatever a program does beside it: floating-point
operations, and bytes that must move at least once. `gpu_layers.py` and
`gpu_operations.py` have the cases.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp

from dsv4_eqx import Config, flops_per_token
from dsv4_eqx.config.kinds import CSA, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.kernels.form import use_kernels

KINDS: Final = {"sliding": (SLIDING, 0), "CSA": (CSA, 4), "HCA": (HCA, 128)}
PASSES: Final = ("forward", "forward + backward")


def name_of(columns: dict[str, Any]) -> str:
    """A case's name among those of its part."""
    return " ".join(map(str, columns.values()))


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    **Arguments:**

    - `columns`: what tells it from the other cases of its part.
    - `function`: what is timed, under jit.
    - `make`: makes the arguments from `kept`, a dictionary of what the cases of one
        `group` share.
    - `shapes`: of the arguments.
    - `group`: cases of one group stand together.
    - `flops`, `bytes`: the work of a call; bytes may be a function of its result.
    - `divide`: how often a call does what is to be timed.
    - `compare`: results of cases with the same name here are compared.
    - `donated`: arguments that a call consumes; the results take their place.
    """

    columns: dict[str, Any]
    function: Callable[..., Any]
    make: Callable[[dict], tuple]
    shapes: tuple
    group: str = ""
    flops: float = 0
    bytes: float | Callable[[Any], float] = 0
    divide: int = 1
    compare: str = ""
    donated: tuple[int, ...] = ()
    form: str = ""

    @property
    def name(self) -> str:
        return name_of(self.columns)

    def compile(self) -> jax.stages.Compiled:
        function = jax.jit(self.function, donate_argnums=self.donated)
        if not self.form:
            return function.lower(*self.shapes).compile()
        with use_kernels(self.form):
            return function.lower(*self.shapes).compile()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes are measured; `tiny` rehearses everything anywhere."""

    config: Config
    dtype: Any
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]

    @classmethod
    def flash(cls) -> "Sizes":
        return cls(
            Config.flash(),
            jnp.bfloat16,
            lengths=(4096, 16384),
            rows=(512, 4096, 32768),
            contexts=(8192, 131072),
            batches=(1, 32),
        )

    @classmethod
    def tiny(cls) -> "Sizes":
        config = dataclasses.replace(
            check_config(),
            hidden_size=256,
            moe_intermediate_size=128,
            q_lora_rank=128,
        )
        return cls(
            config,
            jnp.bfloat16,
            lengths=(300,),
            rows=(64,),
            contexts=(512,),
            batches=(1, 2),
        )


def check_config() -> Config:
    """As narrow as may be, with the heads and widths that the kernels ask for."""
    return dataclasses.replace(
        Config.flash(),
        vocab_size=256,
        hidden_size=512,
        moe_intermediate_size=256,
        q_lora_rank=256,
        o_lora_rank=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        index_topk=64,
        initializer_range=0.1,  # logits that matter
    )


def one_layer(config: Config, kind: str, layers: int = 1) -> Config:
    """Of one layer of a kind, routed by score."""
    layer_type, ratio = KINDS[kind]
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        layer_types=(layer_type,) * layers,
        compress_ratios=(ratio,) * layers,
        mlp_layer_types=(TOPK_MOE,) * layers,
        num_nextn_predict_layers=0,
        max_position_embeddings=1048576,
    )


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def random(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return _normal(jax.random.key(seed), shape, dtype)


# Keys are arguments: XLA would compute what a constant one gives while it compiles.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def built(make: Callable[[], Any]) -> tuple[Any, Any]:
    """Shapes of a module's arrays, and what makes it of arrays of these shapes."""
    arrays, rest = eqx.partition(eqx.filter_eval_shape(make), _is_array)
    return arrays, lambda arrays: eqx.combine(arrays, rest)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def made(make: Callable[[], Any]) -> Any:
    """A module's arrays, in their place without a copy."""
    return jax.jit(lambda: eqx.filter(make(), eqx.is_array))()


def keep(kept: dict, name: str, make: Callable[[], Any]) -> Any:
    """What cases of a group share, made by the first that needs it."""
    if name not in kept:
        kept[name] = jax.block_until_ready(make())
    return kept[name]


def layer_flops(config: Config, kind: str, tokens: int) -> tuple[float, float]:
    """Operations of a layer over a sequence, forward, and forward + backward.

    The backward pass takes twice the forward one's products; the indexer has none.
    """
    one, two = (
        flops_per_token(one_layer(config, kind, layers), tokens) for layers in (1, 2)
    )
    forward = (two - one) * tokens
    indexer = indexer_flops(config, tokens) if kind == "CSA" else 0
    return forward, 3 * forward - 2 * indexer


def layer_bytes(weights: int, streams: int) -> tuple[int, int]:
    """Bytes that a layer over a sequence must move, forward, and forward + backward.

    Weights are read in each pass, and their gradients written.
    """
    return weights + 2 * streams, 3 * weights + 4 * streams


def indexer_flops(config: Config, tokens: int) -> float:
    """Operations of the indexer over a sequence; 0 where it has nothing to choose."""
    ratio = KINDS["CSA"][1]
    if tokens // ratio <= config.index_topk:
        return 0
    heads, width = config.index_n_heads, config.index_head_dim
    seen = sum((t + 1) // ratio for t in range(tokens)) / tokens
    sums = heads * (width * config.q_lora_rank + config.hidden_size)
    sums += 2 * width * (2 * config.hidden_size + 1) + heads * (width + 1) * seen
    return 2 * sums * tokens
