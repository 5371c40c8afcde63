"""The whole model over a mesh: the same methods, the same numbers.

Each method is one `jax.shard_map` in which every device runs the single-device code on
its part. All collectives are in wrappers between the parts. The batch is split over
`data` and `expert`, sequences over `context` and, outside of the parts whose heads or
hidden channels are split, over `tensor`. Of a cache, only the rows are split.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dsv4_eqx.config.config import Config
from dsv4_eqx.model.abstract import AbstractModel, Cache, Lookahead
from dsv4_eqx.model.cross_entropy import in_chunks, logits_from
from dsv4_eqx.model.given_experts import GivenExperts
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
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.numerics.compile_once import compiled_once
from dsv4_eqx.numerics.validation import invalid_argument, validate_size
from dsv4_eqx.numerics.varying import varying
from dsv4_eqx.sharding.fsdp import gather_in_use
from dsv4_eqx.sharding.gather import gather
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from dsv4_eqx.sharding.tensor import SplitEmbedding, cross_entropy_split_vocab
from dsv4_eqx.sharding.token_split import TokenSplit, token_split

_HEADS, _FSDP, _SEQ = "tensor", "data", 1


class ShardedModel(AbstractModel):
    """A DeepSeek-V4 whose arrays are split over a mesh; made by `shard`.

    The number of rows must be a multiple of `data` x `expert`, and the length of a
    sequence without cache a multiple of `context`; methods raise a ValueError
    otherwise. With a cache, the devices of `context` repeat each other's work.
    """

    model: DeepSeekV4
    mesh: Mesh | AbstractMesh = eqx.field(static=True)
    leaf_specs: tuple[P, ...] = eqx.field(static=True)  # of `model`, array by array
    splits_vocab: bool = eqx.field(static=True)  # whether `tensor` does
    dimensions: tuple[tuple[str, str | None], ...] = eqx.field(static=True)
    fsdp: bool = eqx.field(static=True)  # whether `data` splits weights
    config: Config = eqx.field(static=True)

    @property
    def num_mtp(self) -> int:
        """Number of prediction (MTP) blocks, 0 or 1."""
        return self.model.num_mtp

    @property
    def specs(self) -> Any:
        """The PartitionSpec of every array, in the tree of `model`.

        **Raises:** ValueError if the model's number of arrays has changed since.
        """
        structure = jax.tree.structure(self.model)
        if structure.num_leaves != len(self.leaf_specs):
            raise ValueError(
                f"ShardedModel: {len(self.leaf_specs)} arrays were sharded, and its "
                f"model has {structure.num_leaves} now: change the model first, and "
                "shard it then."
            )
        return jax.tree.unflatten(structure, self.leaf_specs)

    def streams(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after the last layer.

        **Arguments, raises:** as for `AbstractModel.streams`.
        """
        inputs = tokens, segment_ids, experts
        return self._run_layers(Layers.__call__, *inputs, remat)

    def observe_streams(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> tuple[Float[Array, "batch seq streams dim"], tuple[LayerValues, ...]]:
        """The residual streams after the last layer, and what each layer computed.

        **Arguments, raises:** as for `AbstractModel.streams`.
        """
        inputs = tokens, segment_ids, experts
        return self._run_layers(Layers.observe, *inputs, remat)

    def _run_layers(
        self,
        run_layers: Callable,
        tokens: Any,
        segment_ids: Any,
        experts: Any,
        remat: bool,
    ) -> Any:
        token_ids = self.model.validate_tokens(tokens)
        given = self.model.validate_experts(experts, token_ids)
        places = token_places("DeepSeekV4", token_ids, segment_ids)
        split = token_split("streams", token_ids.shape, self.mesh)
        run = eqx.Partial(_layers, run_layers, remat)
        inputs = token_ids, *places, given
        return self._run(run, split, split.spec, *inputs, remat=remat)

    def collapse(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> Float[Array, "*batch dim"]:
        """Collapses residual streams into the final hidden activations.

        **Arguments:** as for `AbstractModel.collapse`.
        """
        split = token_split("collapse", streams.shape[:-2], self.mesh)
        return self._run(DeepSeekV4.collapse, split, split.spec, streams)

    def unembed(
        self, hidden: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Logits, at least float32; split where `tensor` splits the vocabulary.

        **Arguments:** as for `AbstractModel.unembed`.
        """
        split = token_split("unembed", hidden.shape[:-1], self.mesh)
        axis, spec = self._for_vocab(split)
        leading = [*spec, *[None] * hidden.ndim][: hidden.ndim - 1]
        out = P(*leading, self._vocab_axis)
        return self._run(eqx.Partial(_logits, axis), split, out, hidden)

    def cross_entropy(
        self,
        hidden: Float[Array, "*batch dim"],
        targets: Int[Array | np.ndarray, "*batch"],
        mask: Bool[Array | np.ndarray, "*batch"] | None = None,
        *,
        chunk: int | None = None,
    ) -> Float[Array, "*batch"]:
        """Cross-entropy of each target in nats, at least float32.

        Logits are not gathered: devices exchange a few numbers for each token.

        **Arguments, raises:** as for `AbstractModel.cross_entropy`.
        """
        call, vocab = "cross_entropy", self.config.vocab_size
        targets = validate_targets(call, targets, hidden.shape[:-1], vocab, mask)
        chunk = None if chunk is None else validate_size(call, "chunk", chunk)
        split = token_split(call, targets.shape, self.mesh)
        axis, spec = self._for_vocab(split)
        run = eqx.Partial(_nats, axis, self._vocab_axis, chunk)
        nats = self._run(run, split, spec, hidden, targets)
        return nats if mask is None else jnp.where(mask, nats, 0)

    def hidden_ahead(
        self,
        streams: Float[Array, "batch seq streams dim"],
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
    ) -> Float[Array, "batch seq dim"]:
        """The prediction block's hidden activations, for `unembed`.

        **Arguments, raises:** as for `AbstractModel.hidden_ahead`.
        """
        token_ids, following = self.model.validate_ahead(streams, tokens)
        places = token_places("hidden_ahead", token_ids, segment_ids)
        split = token_split("hidden_ahead", token_ids.shape, self.mesh)
        return self._run(_ahead, split, split.spec, streams, following, *places)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """The state before any token, for `extend`; only its rows are split.

        **Arguments, raises:** as for `AbstractModel.init_cache`.
        """
        return self._placed("init_cache", DeepSeekV4.init_cache, batch, capacity)

    def init_mtp_cache(self, batch: int, capacity: int) -> MTPCache:
        """The state of the prediction block before any token; only its rows are split.

        **Arguments, raises:** as for `AbstractModel.init_mtp_cache`.
        """
        make = DeepSeekV4.init_mtp_cache
        return self._placed("init_mtp_cache", make, batch, capacity)

    def extend_streams(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Cache]:
        """The residual streams of new tokens after the last layer, and the cache.

        **Arguments, raises:** as for `AbstractModel.extend`.
        """
        streams, layers, new = self._extend(Layers.extend, tokens, cache, lengths)
        return streams, Cache(cache.lengths + new, layers, cache.capacity)

    def lookahead(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Lookahead]:
        """Runs new tokens like `extend_streams`; how many are kept is decided later.

        **Arguments, returns, raises:** as for `AbstractModel.lookahead`.
        """
        streams, layers, new = self._extend(Layers.lookahead, tokens, cache, lengths)
        return streams, Lookahead(cache.lengths, new, layers, cache.capacity)

    def extend_mtp(
        self,
        streams: Float[Array, "batch seq streams dim"],
        following: Int[Array, "batch seq"],
        cache: MTPCache,
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], MTPCache]:
        """The prediction block's hidden activations, as `unembed` takes them.

        **Arguments, raises:** as for `AbstractModel.extend_mtp`.
        """
        new = streams, following, cache, lengths
        following, lengths = self.model.validate_following(*new)
        split = token_split("extend_mtp", lengths.shape, self.mesh)
        inputs = streams, following, cache, lengths
        return self._run(DeepSeekV4.extend_mtp, split, split.spec, *inputs)

    def _extend(self, extend: Callable, tokens: Any, cache: Any, lengths: Any) -> Any:
        token_ids, lengths = self.model.validate_new(tokens, cache, lengths)
        split = token_split("extend", token_ids.shape[:1], self.mesh)
        run = eqx.Partial(_new_tokens, extend)
        inputs = token_ids, cache.layers, cache.lengths, lengths
        streams, layers = self._run(run, split, split.spec, *inputs)
        return streams, layers, lengths

    @property
    def _vocab_axis(self) -> str | None:
        is_split = self.splits_vocab and self.mesh.shape[_HEADS] > 1
        return _HEADS if is_split else None

    def _for_vocab(self, split: TokenSplit) -> tuple[str | None, P]:
        """The axis over which tokens are gathered, since the devices that split the
        vocabulary need all of them, and the spec of the result."""
        if self._vocab_axis is None or _HEADS not in split.sequence:
            return None, split.spec
        return _HEADS, split.without(_HEADS).spec

    @compiled_once
    def _run(
        self,
        function: Callable,
        split: TokenSplit,
        out_spec: P,
        *inputs: Any,
        remat: bool = False,
    ) -> Any:
        """Runs a function of one device's model and inputs, over the mesh.

        All inputs are split like the tokens. Of a state, rows come first in all arrays.
        Equal calls must have equal functions: a closure would be compiled each time.
        """
        specs = self.specs

        def run(model: DeepSeekV4, *inputs: Any) -> Any:
            return function(self._on_device(model, specs, split, remat), *inputs)

        in_specs = specs, *(split.spec for _ in inputs)
        mapped = jax.shard_map(
            run, mesh=self.mesh, in_specs=in_specs, out_specs=out_spec
        )
        # Constrained outside too, so that gradients have the weights' sharding.
        placed = jax.lax.with_sharding_constraint(self.model, self._shardings(specs))
        return mapped(placed, *inputs)

    def _on_device(
        self, model: DeepSeekV4, specs: Any, split: TokenSplit, remat: bool
    ) -> DeepSeekV4:
        """The model that one device runs: its parts of the arrays, with collectives."""
        # 1. Where tokens are split, weights are marked as varying. Each device then
        # adds up its gradients, and the sum over devices is taken here, once, instead
        # of in every iteration of every loop inside of a layer.
        axes = (*split.batch, *split.sequence)
        model = jax.tree.map(lambda x: varying(x, axes), model)
        # 2. Weights that `data` splits are gathered block by block, while a block runs.
        # This comes before the wrappers inside of blocks, which the specs do not have.
        if self.fsdp and self.mesh.shape[_FSDP] > 1:
            model = gather_in_use(model, specs, _FSDP, recomputed=remat)
        # 3. The embedding is an array, not a part: its wrapper replaces the array.
        if self._vocab_axis is not None:
            embedding = SplitEmbedding(model.embedding, _HEADS, split.sequence)
            model = eqx.tree_at(lambda model: model.embedding, model, embedding)
        # 4. Collectives between the parts.
        dimensions = dict(self.dimensions)
        return parallelize(model, self.mesh, split.sequence, dimensions=dimensions)

    def _placed(self, call: str, make: Callable, batch: int, capacity: int) -> Any:
        """A cache split by rows; abstract if the model is."""
        shapes = eqx.filter_eval_shape(lambda: make(self.model, batch, capacity))
        rows = token_split(call, (batch,), self.mesh).spec
        specs = jax.tree.map(lambda _: rows, shapes)
        if isinstance(self.model.embedding, jax.ShapeDtypeStruct):
            return place(shapes, specs, self.mesh)
        sizes = int(batch), int(capacity)
        return _made(make, self.model, sizes, self._shardings(specs))

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)


@compiled_once
def _made(make: Callable, model: DeepSeekV4, sizes: Any, shardings: Any) -> Any:
    return jax.lax.with_sharding_constraint(make(model, *sizes), shardings)


def _layers(run_layers: Callable, remat: bool, model: Any, ids: Array, *others: Any):
    return run_layers(model.layers, model.embed(ids), ids, *others, remat=remat)


def _new_tokens(extend: Callable, model: Any, ids: Array, *state: Any) -> Any:
    return extend(model.layers, model.embed(ids), ids, *state)


def _ahead(model: Any, streams: Array, ids: Array, *places: Any) -> Array:
    return model.mtp[0](streams, model.embedding[ids], ids, *places)


def _logits(gathered: str | None, model: Any, hidden: Array) -> Array:
    return model.unembed(_all_tokens(hidden, gathered))


def _nats(
    gathered: str | None,
    vocab: str | None,
    chunk: int | None,
    model: Any,
    hidden: Array,
    targets: Array,
) -> Array:
    def nats(unembedding: Array, hidden: Array, targets: Array) -> Array:
        logits = logits_from(hidden, unembedding)
        return cross_entropy_split_vocab(logits, targets, vocab)

    tokens = (_all_tokens(x, gathered) for x in (hidden, targets))
    return in_chunks(nats, chunk, model.unembedding, *tokens)


def _all_tokens(x: Array, axis: str | None) -> Array:
    return x if axis is None else gather(x, axis, _SEQ)


def model_on_device(call: str, model: Any) -> DeepSeekV4:
    """The `DeepSeekV4` itself, or the one inside of a `ShardedModel`."""
    inner = model.model if isinstance(model, ShardedModel) else model
    if not isinstance(inner, DeepSeekV4):
        name = type(model).__name__
        raise invalid_argument(call, "model", name, "a DeepSeekV4 or a ShardedModel")
    return inner
