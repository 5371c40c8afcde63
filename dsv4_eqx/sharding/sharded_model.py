"""The whole model over a mesh: the same methods, the same numbers.

Each method is one `jax.shard_map` in which every device runs the single-device code on
its part; wrappers between the parts hold the collectives, and there are no others. The
batch is split over `data` and `expert`, sequences over `context` and, between the parts
that split heads and hidden channels, over `tensor`. A cache is split by rows alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dsv4_eqx.config.config import Config
from dsv4_eqx.model.abstract import AbstractModel, Cache, Lookahead
from dsv4_eqx.model.inputs import (
    Lengths,
    SegmentIds,
    TokenIds,
    token_places,
    validate_targets,
)
from dsv4_eqx.model.layers import Layers
from dsv4_eqx.model.model import DeepSeekV4
from dsv4_eqx.model.mtp import MTPCache
from dsv4_eqx.numerics.validation import invalid_argument, validate_flag
from dsv4_eqx.numerics.varying import varying
from dsv4_eqx.sharding.context import gathered_tokens
from dsv4_eqx.sharding.fsdp import gather_in_use, split_further
from dsv4_eqx.sharding.parallelize import parallelize, place, validate_mesh
from dsv4_eqx.sharding.rules import (
    DEFAULT_RULES,
    Rules,
    entry_of,
    partition_specs,
    validate_rules,
)
from dsv4_eqx.sharding.tensor import SplitEmbedding, cross_entropy_split_vocab

_BATCH_AXES: Final = ("data", "expert")
_CONTEXT, _HEADS, _FSDP = "context", "tensor", "data"
_WHOLE_SEQUENCES: Final = ("streams", "multi_token_logits")  # tokens see others


def shard(
    model: DeepSeekV4 | Callable[[], DeepSeekV4],
    mesh: Mesh | AbstractMesh,
    *,
    rules: Rules = DEFAULT_RULES,
    fsdp: bool = False,
) -> "ShardedModel":
    """The model over a mesh, with the same methods.

    Given a function that makes the model, each device makes its own part, the same
    numbers as on one device: `shard(lambda: DeepSeekV4(config, key=key), mesh)`.

    **Arguments:**

    - `model`: the model, placed already or not; its arrays may be abstract.
    - `mesh`: from `make_mesh`.
    - `rules`: `DEFAULT_RULES`, or those with `"vocab": None`, which leaves embedding
        and unembedding whole.
    - `fsdp`: splits weights over `data` as well, and with them gradients and the state
        of an optimizer; a layer's weights are gathered while it runs.

    **Raises:** ValueError if the mesh lacks an axis, an axis does not divide a
    dimension, the rules are others, the model is none and makes none, or has numbers
    where the mesh is abstract.
    """
    validate_mesh("shard", mesh)
    validate_rules(rules)
    validate_flag("shard", "fsdp", fsdp)
    _validate_made(model, mesh)
    specs_of = functools.partial(_specs, rules=rules, mesh=mesh, fsdp=fsdp)
    if isinstance(model, DeepSeekV4):
        placed = place(model, specs_of(model), mesh)
    else:
        specs = specs_of(eqx.filter_eval_shape(model))
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        placed: DeepSeekV4 = jax.jit(model, out_shardings=shardings)()
    splits_vocab = rules.get("vocab") is not None
    return ShardedModel(placed, mesh, splits_vocab=splits_vocab, fsdp=fsdp)


class ShardedModel(AbstractModel):
    """A DeepSeek-V4 whose arrays lie over a mesh; made by `shard`.

    The batch must divide over `data` and `expert` together, a sequence without cache
    over `context`. With a cache, the devices of `context` do the same work.
    """

    model: DeepSeekV4
    mesh: Mesh | AbstractMesh = eqx.field(static=True)
    splits_vocab: bool = eqx.field(static=True)
    fsdp: bool = eqx.field(static=True)
    config: Config = eqx.field(static=True)

    def __init__(
        self,
        model: DeepSeekV4,
        mesh: Mesh | AbstractMesh,
        *,
        splits_vocab: bool,
        fsdp: bool,
    ):
        """**Arguments:**

        - `model`: placed as `specs` says.
        - `mesh`: from `make_mesh`.
        - `splits_vocab`: whether `tensor` splits embedding and unembedding.
        - `fsdp`: whether `data` splits weights.
        """
        self.model, self.config = model, model.config
        self.mesh, self.splits_vocab, self.fsdp = mesh, splits_vocab, fsdp

    @property
    def num_mtp(self) -> int:
        """As `AbstractModel.num_mtp`."""
        return self.model.num_mtp

    @property
    def specs(self) -> Any:
        """The PartitionSpec of every array, in the tree of `model`."""
        rules = dict(DEFAULT_RULES)
        rules["vocab"] = rules["vocab"] if self.splits_vocab else None
        return _specs(self.model, rules=rules, mesh=self.mesh, fsdp=self.fsdp)

    def streams(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> Float[Array, "batch seq streams dim"]:
        """As `AbstractModel.streams`.

        **Raises:** ValueError also if batch or sequence do not divide over the mesh.
        """
        token_ids = self.model.validate_tokens(tokens)
        places = token_places("DeepSeekV4", token_ids, segment_ids)
        split = self._split("streams", token_ids.shape)

        def run(model: DeepSeekV4, ids: Array, *places: Any) -> Array:
            return model.layers(model.embed(ids), ids, *places, remat=remat)

        inputs = token_ids, *places
        specs = (split.spec,) * len(inputs)
        return self._map(run, split, specs, split.spec, remat=remat)(*inputs)

    def collapse(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> Float[Array, "*batch dim"]:
        """As `AbstractModel.collapse`."""
        split = self._split("collapse", streams.shape[:-2])
        run = self._map(
            lambda model, x: model.collapse(x), split, (split.spec,), split.spec
        )
        return run(streams)

    def unembed(
        self, hidden: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch vocab"]:
        """As `AbstractModel.unembed`; each device of `tensor` has part of `vocab`."""
        split = self._split("unembed", hidden.shape[:-1])
        join, spec = self._for_vocab(split)

        def run(model: DeepSeekV4, hidden: Array) -> Array:
            return model.unembed(join(hidden))

        leading = [*spec, *[None] * hidden.ndim][: hidden.ndim - 1]
        out = P(*leading, self._vocab_axis)
        return self._map(run, split, (split.spec,), out)(hidden)

    def cross_entropy(
        self,
        hidden: Float[Array, "*batch dim"],
        targets: Int[Array, "*batch"],
        mask: Bool[Array | np.ndarray, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """As `AbstractModel.cross_entropy`; the logits stay where they are."""
        positions, vocab = hidden.shape[:-1], self.config.vocab_size
        targets = validate_targets("cross_entropy", targets, positions, vocab, mask)
        split = self._split("cross_entropy", targets.shape)
        join, spec = self._for_vocab(split)

        def run(model: DeepSeekV4, hidden: Array, targets: Array) -> Array:
            logits = model.unembed(join(hidden))
            return cross_entropy_split_vocab(logits, join(targets), self._vocab_axis)

        specs = split.spec, split.spec
        nats = self._map(run, split, specs, spec)(hidden, targets)
        return nats if mask is None else jnp.where(mask, nats, 0)

    def multi_token_logits(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "batch seq-1 vocab"]]:
        """As `AbstractModel.multi_token_logits`."""
        token_ids = self.model.validate_ahead(tokens)
        places = token_places("multi_token_logits", token_ids, segment_ids)
        streams = self.streams(token_ids, segment_ids, remat=remat)
        split = self._split("multi_token_logits", token_ids.shape)
        # The last position's successor is not known: any does, for no other sees it.
        following = jnp.pad(token_ids[:, 1:], ((0, 0), (0, 1)))

        def run(model: DeepSeekV4, streams: Array, ids: Array, *places: Any):
            return model.mtp[0](streams, model.embedding[ids], ids, *places)

        inputs = streams, following, *places
        specs = (split.spec,) * len(inputs)
        ahead = self._map(run, split, specs, split.spec)(*inputs)
        logits = self.unembed(self.collapse(streams))
        return logits, self.unembed(ahead)[:, :-1]

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """As `AbstractModel.init_cache`."""
        make = functools.partial(self.model.init_cache, batch, capacity)
        return self._placed("init_cache", batch, make)

    def init_mtp_cache(self, batch: int, capacity: int) -> MTPCache:
        """As `AbstractModel.init_mtp_cache`."""
        make = functools.partial(self.model.init_mtp_cache, batch, capacity)
        return self._placed("init_mtp_cache", batch, make)

    def extend_streams(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Cache]:
        """As `AbstractModel.extend_streams`."""
        streams, layers, new = self._extend(Layers.extend, tokens, cache, lengths)
        return streams, Cache(cache.lengths + new, layers, cache.capacity)

    def lookahead(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Lookahead]:
        """As `AbstractModel.lookahead`."""
        streams, layers, new = self._extend(Layers.lookahead, tokens, cache, lengths)
        return streams, Lookahead(cache.lengths, new, layers, cache.capacity)

    def extend_mtp(
        self,
        streams: Float[Array, "batch seq streams dim"],
        following: Int[Array, "batch seq"],
        cache: MTPCache,
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], MTPCache]:
        """As `AbstractModel.extend_mtp`."""
        following, lengths = self.model.validate_following(following, cache, lengths)
        split = self._split("extend_mtp", lengths.shape)
        rows = split.spec  # which come first in every array of a state
        return self._map(
            lambda model, *args: model.extend_mtp(*args), split, (rows,) * 4, rows
        )(streams, following, cache, lengths)

    def _extend(self, extend: Callable, tokens: Any, cache: Any, lengths: Any) -> Any:
        token_ids, lengths = self.model.validate_new(tokens, cache, lengths)
        split = self._split("extend", token_ids.shape[:1])

        def run(model: DeepSeekV4, ids: Array, *state: Any) -> Any:
            return extend(model.layers, model.embed(ids), ids, *state)

        rows = split.spec  # which come first in every array of a state
        streams, layers = self._map(run, split, (rows,) * 4, rows)(
            token_ids, cache.layers, cache.lengths, lengths
        )
        return streams, layers, lengths

    @property
    def _vocab_axis(self) -> str | None:
        is_split = self.splits_vocab and self.mesh.shape[_HEADS] > 1
        return _HEADS if is_split else None

    def _for_vocab(self, split: "_Split") -> tuple[Callable[[Array], Array], P]:
        """What gives each device the tokens of all that it shares a vocabulary with,
        and the spec of those tokens."""
        if self._vocab_axis is None or _HEADS not in split.sequence:
            return lambda x: x, split.spec
        context = tuple(axis for axis in split.sequence if axis != _HEADS)
        return lambda x: gathered_tokens(x, _HEADS), _Split(split.batch, context).spec

    def _split(self, call: str, shape: tuple[int, ...]) -> "_Split":
        """How rows, and a sequence if there is one, are split."""
        sizes = self.mesh.shape
        batch = tuple(axis for axis in _BATCH_AXES if sizes[axis] > 1)
        sequence = tuple(axis for axis in (_CONTEXT, _HEADS) if sizes[axis] > 1)
        rows = math.prod(sizes[axis] for axis in batch)
        if not shape:  # one token: all devices do the same
            return _Split((), ())
        if shape[0] % rows != 0:
            raise ValueError(
                f"{call}: a batch of shape {shape} does not divide over data="
                f"{sizes['data']} x expert={sizes['expert']}: give a multiple of "
                f"{rows} rows."
            )
        if len(shape) < 2:
            return _Split(batch, ())
        if shape[1] % sizes[_CONTEXT] != 0:
            if call in _WHOLE_SEQUENCES:
                raise ValueError(
                    f"{call}: {shape[1]} tokens do not divide over context="
                    f"{sizes[_CONTEXT]}: give a multiple of it."
                )
            # Each token goes its own way: all devices of `context` take all of them.
            sequence = ()
        if shape[1] % math.prod(sizes[axis] for axis in sequence) != 0:
            sequence = tuple(axis for axis in sequence if axis != _HEADS)
        return _Split(batch, sequence)

    def _map(
        self,
        function: Callable,
        split: "_Split",
        in_specs: Any,
        out_specs: Any,
        *,
        remat: bool = False,
    ) -> Callable:
        """The function of a device's model and arrays, of the whole arrays."""
        specs = self.specs

        def run(model: DeepSeekV4, *args: Any) -> Any:
            # Each device then adds up its own gradients, and the sum over devices is
            # taken once; otherwise in every iteration of every loop inside of a layer.
            axes = (*split.batch, *split.sequence)
            model = jax.tree.map(lambda x: varying(x, axes), model)
            if self.fsdp and self.mesh.shape[_FSDP] > 1:
                model = gather_in_use(model, specs, _FSDP, recomputed=remat)
            if self._vocab_axis is not None:
                embedding = SplitEmbedding(model.embedding, _HEADS, split.sequence)
                model = eqx.tree_at(lambda model: model.embedding, model, embedding)
            return function(parallelize(model, self.mesh, split.sequence), *args)

        mapped = jax.shard_map(
            run, mesh=self.mesh, in_specs=(specs, *in_specs), out_specs=out_specs
        )
        # Gradients then lie where their weights do.
        placed = jax.lax.with_sharding_constraint(self.model, self._shardings(specs))
        return functools.partial(mapped, placed)

    def _placed(self, call: str, batch: int, make: Callable[[], Any]) -> Any:
        """A cache split by rows; abstract if the model is."""
        shapes = eqx.filter_eval_shape(make)
        rows = self._split(call, (batch,)).spec
        specs = jax.tree.map(lambda _: rows, shapes)
        if isinstance(self.model.embedding, jax.ShapeDtypeStruct):
            return place(shapes, specs, self.mesh)
        return jax.jit(make, out_shardings=self._shardings(specs))()

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh axes that split rows, and those that split sequences."""

    batch: tuple[str, ...]
    sequence: tuple[str, ...]

    @property
    def spec(self) -> P:
        """Of `[batch, seq, ...]`, or of rows alone."""
        entries = (self.batch, self.sequence) if self.sequence else (self.batch,)
        return P(*map(entry_of, entries))


def _specs(model: DeepSeekV4, *, rules: Rules, mesh: Any, fsdp: bool) -> Any:
    specs = partition_specs(model, rules, mesh=mesh)
    if fsdp and mesh.shape[_FSDP] > 1:
        return split_further(model, specs, mesh, _FSDP)
    return specs


def _validate_made(model: Any, mesh: Mesh | AbstractMesh) -> None:
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
