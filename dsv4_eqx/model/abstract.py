"""The methods of a DeepSeek-V4, on one device or over a mesh.

Methods that differ between the two are abstract; those that follow from them are here.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from dsv4_eqx.attention.cache import AttentionCache, Extended
from dsv4_eqx.attention.documents import validate_segment_ids
from dsv4_eqx.config.config import Config
from dsv4_eqx.model.given_experts import GivenExperts
from dsv4_eqx.model.inputs import (
    Lengths,
    SegmentIds,
    TokenIds,
    validate_prediction_block,
    validate_token_ids,
    validate_two_tokens,
)
from dsv4_eqx.model.mtp import MTPCache
from dsv4_eqx.model.observed import LayerValues
from dsv4_eqx.numerics.validation import validate_counts


class Cache(eqx.Module):
    """The state of the model after some tokens, for `DeepSeekV4.extend`.

    Rows come first in every array: `jax.tree.map(lambda x: x[order], cache)` is the
    cache of those rows, in this order.
    """

    lengths: Int32[Array, " batch"]  # tokens of each row so far
    layers: tuple[AttentionCache, ...]  # as in `Layers`: first, repeated, last
    capacity: int = eqx.field(static=True)


class Lookahead(eqx.Module):
    """The state of the model with new tokens, before it is decided how many are kept.

    It cannot be extended again; the cache that `keep` returns can.
    """

    before: Int32[Array, " batch"]  # tokens of each row before the new tokens
    lengths: Int32[Array, " batch"]  # new tokens of each row
    layers: Extended
    capacity: int = eqx.field(static=True)

    def keep(self, lengths: Lengths) -> Cache:
        """The cache after the first `lengths` of each row's new tokens.

        Raises ValueError if `lengths` are not one integer for each row or, except under
        `jit`, one is not from 0 to the number that `lookahead` was given.
        """
        lengths = validate_counts("Lookahead.keep", lengths, self.lengths)
        lengths = jnp.asarray(lengths, jnp.int32)
        layers = self.layers.keep(lengths)
        return Cache(self.before + lengths, layers, self.capacity)


class AbstractModel(eqx.Module):
    """A language model with a cache, residual streams, and prediction blocks."""

    config: eqx.AbstractVar[Config]

    @property
    @abc.abstractmethod
    def num_mtp(self) -> int:
        """Number of prediction (MTP) blocks."""

    def __call__(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position, float32.

        Several sequences are rows of a batch. `jax.vmap` over rows, each given as
        `tokens[None]`, or over models gives the same numbers, but on GPU and TPU some
        kernels then run one after another.

        A row may hold several documents, of any lengths, one after another: with
        `segment_ids`, each is computed as if it were alone. The logits at a document's
        last token are of a token that would continue this document. Padding is one more
        document: give it another id, and ignore its output.

        **Arguments:**

        - `tokens`: token ids, each in `[0, vocab)`.
        - `segment_ids`: document of each token, where rows hold several: any integers,
            the same throughout a document, and different for a row's documents.
        - `remat`: keep only each layer's input for the backward pass.
        - `experts`: for each layer, each token's experts, in place of those that the
            layer's router would choose: what `observe` shows as `routing.experts`.
            Their weights are from this model's scores and have gradients. A layer with
            None chooses; one that hashes does so in any case. The prediction block is
            not given any.

        Routing as by older parameters, while losses have spikes (paper section 4.2.3):

            _, layers = older.observe(tokens)
            logits = model(tokens, experts=[x.routing.experts for x in layers])

        Routing as by the model that sampled the tokens, which another has trained
        since, or that has another precision (replay, in reinforcement learning):

            _, layers = sampler.observe(tokens)
            experts = [np.asarray(x.routing.experts) for x in layers]  # to be kept
            log_probs = token_log_probs(model, tokens, experts=experts)

        **Raises:** ValueError if `tokens` is not an array of integers of two
        dimensions, is empty, or is longer than `max_position_embeddings`; if
        `segment_ids` is not an array of integers of the same shape; and if a token is
        outside the vocabulary, or a segment id comes back after another one. The last
        two are not checked under `jit`, where an id that comes back begins a new
        document. Also if `experts` has not an entry for each layer, of integers of
        shape (batch, seq, slots), or has entries for some only of the layers that run
        in one loop; and, except under `jit`, if an expert does not exist or is twice in
        a token.
        """
        options = _options(remat, experts)
        return self.unembed(self.hidden(tokens, segment_ids, **options))

    def hidden(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> Float[Array, "batch seq dim"]:
        """The final hidden activations, for `unembed`; arguments as for calling."""
        options = _options(remat, experts)
        return self.collapse(self.streams(tokens, segment_ids, **options))

    def observe(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> tuple[Float[Array, "batch seq dim"], tuple[LayerValues, ...]]:
        """The final hidden activations, and what each layer computed on the way.

        The activations are those of `hidden`, and have its gradients. Inside `jit`, a
        value that your function neither uses nor returns is not kept; where layers
        repeat, it is kept for all repetitions or for none. The prediction block is not
        shown.

        **Arguments:** as for calling.

        **Returns:** the activations, and for each layer its output, the log-sum-exp of
        its attention, what its indexer selected and how far its scores are from
        attention, and its routing's experts, weights and scores. These arrays begin
        with the dimensions batch and seq, which over a mesh are split like the tokens;
        `routing.counts` counts all tokens together.
        """
        options = _options(remat, experts)
        streams, values = self.observe_streams(tokens, segment_ids, **options)
        return self.collapse(streams), values

    def observe_streams(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> tuple[Float[Array, "batch seq streams dim"], tuple[LayerValues, ...]]:
        """Calls `streams`, and returns what each layer computed beside them.

        A model of your own shows nothing, unless it has its own method.
        """
        return self.streams(tokens, segment_ids, **_options(remat, experts)), ()

    @abc.abstractmethod
    def streams(
        self,
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
        *,
        remat: bool = False,
        experts: GivenExperts = None,
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after the last layer; arguments as for calling."""

    @abc.abstractmethod
    def collapse(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> Float[Array, "*batch dim"]:
        """The final hidden activations, from `streams` or `extend_streams`."""

    @abc.abstractmethod
    def unembed(
        self, hidden: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Logits of the next token, at least float32, from `hidden` or `collapse`."""

    @abc.abstractmethod
    def cross_entropy(
        self,
        hidden: Float[Array, "*batch dim"],
        targets: Int[Array | np.ndarray, "*batch"],
        mask: Bool[Array | np.ndarray, "*batch"] | None = None,
        *,
        chunk: int | None = None,
    ) -> Float[Array, "*batch"]:
        """Cross-entropy of each target in nats, at least float32.

        **Arguments:**

        - `hidden`: from `hidden` or `collapse`.
        - `targets`: the next token at each position.
        - `mask`: which targets count; all by default. The cross-entropy of the others
            is 0, whatever they are: the mean is `nats.sum() / mask.sum()`.
        - `chunk`: the most tokens whose logits are held at once, over a mesh those of
            each device; all by default. Logits are computed again for the gradient.

        **Raises:** ValueError if targets or mask do not have one value for each
        position, or a target that counts is outside the vocabulary, or `chunk` is not a
        positive integer. Under `jit`, where values are unknown, the cross-entropy of
        such a target is NaN.
        """

    @abc.abstractmethod
    def hidden_ahead(
        self,
        streams: Float[Array, "batch seq streams dim"],
        tokens: TokenIds,
        segment_ids: SegmentIds = None,
    ) -> Float[Array, "batch seq dim"]:
        """The prediction block's hidden activations, for `unembed` or `cross_entropy`.

        Those at position p predict token p + 2, from the streams at p and token p + 1.
        At the last position of a row or document they are meaningless, and at the last
        but one there is no token to predict.

        **Arguments:**

        - `streams`: from `streams` or `observe_streams` of the same tokens.
        - `tokens`, `segment_ids`: as for calling; at least two tokens.

        **Raises:** ValueError if the model has no prediction block, there is a single
        token or the streams have another shape, and as for calling.
        """

    def multi_token_logits(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "batch seq-1 vocab"]]:
        """Logits of the next token, and of the token after next.

        The second array has one position less, since it needs the next token itself.

        With `segment_ids`, both predict within documents. Leave out of the loss what
        has no target there: at a document's last position, both logits (the second
        array is meaningless there); at its last position but one, the second.

        **Arguments:** as for calling; at least two tokens.

        **Raises:** ValueError if the model has no prediction block or there is a single
        token, and as for calling.
        """
        call = "multi_token_logits"
        validate_prediction_block(call, self.num_mtp)
        token_ids = validate_token_ids(call, tokens, self.config.vocab_size)
        validate_two_tokens(call, token_ids)
        if segment_ids is not None:
            validate_segment_ids(call, segment_ids, token_ids.shape)
        streams = self.streams(token_ids, segment_ids, remat=remat)
        ahead = self.hidden_ahead(streams, token_ids, segment_ids)
        logits = self.unembed(self.collapse(streams))
        return logits, self.unembed(ahead)[:, :-1]

    @abc.abstractmethod
    def init_cache(self, batch: int, capacity: int) -> Cache:
        """The state before any token, for `extend`.

        **Arguments:**

        - `batch`: number of rows.
        - `capacity`: the most tokens that a row can have.

        **Raises:** ValueError if either is not a positive integer, or the capacity is
        above `max_position_embeddings`.
        """

    def extend(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """The final hidden activations of tokens that follow those in the cache.

        One function for a prompt, a part of a prompt, a single new token, or several
        tokens to verify. Rows may have different numbers of old and new tokens. The
        given cache is not changed: to go back, continue from it. With the kernels for
        CPUs there is no reverse-mode derivative, since entries are written in a loop of
        unknown length: train by calling the model.

        **Arguments:**

        - `tokens`: the new token ids of each row, then padding of any values.
        - `cache`: from `init_cache` or another call.
        - `lengths`: new tokens of each row, 0 to `seq`; all of them by default.

        **Returns:** the hidden activations, which are meaningless at the padding, and
        the cache after the new tokens.

        **Raises:** ValueError if the tokens are not as for calling, the cache does not
        have the shapes of this model's caches for this batch, or `lengths` do not match
        the tokens; and, except under `jit`, if a row would have more tokens than the
        capacity.
        """
        streams, cache = self.extend_streams(tokens, cache, lengths)
        return self.collapse(streams), cache

    @abc.abstractmethod
    def extend_streams(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Cache]:
        """The residual streams of new tokens after the last layer, and the cache.

        **Arguments, raises:** as for `extend`.
        """

    @abc.abstractmethod
    def lookahead(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Lookahead]:
        """Runs new tokens like `extend_streams`; how many are kept is decided later.

        **Arguments, raises:** as for `extend`.

        **Returns:** the streams, and a `Lookahead`, whose `keep` returns the cache
        after the tokens that are kept.
        """

    @abc.abstractmethod
    def init_mtp_cache(self, batch: int, capacity: int) -> MTPCache:
        """The state of the prediction block before any token.

        **Arguments, raises:** as for `init_cache`, and ValueError without such a block.
        """

    @abc.abstractmethod
    def extend_mtp(
        self,
        streams: Float[Array, "batch seq streams dim"],
        following: Int[Array, "batch seq"],
        cache: MTPCache,
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], MTPCache]:
        """The prediction block's hidden activations, as `unembed` takes them.

        **Arguments:**

        - `streams`: of the main model at new tokens, then padding of any values.
        - `following`: the token after each new token.
        - `cache`: from `init_mtp_cache` or another call.
        - `lengths`: new tokens of each row.

        **Raises:** ValueError if there is no prediction block, or streams, ids, cache
        and lengths do not match, as for `extend`.
        """


def _options(remat: bool, experts: GivenExperts) -> dict[str, Any]:
    """Keywords of `streams`; a model of one's own need not take experts."""
    return dict(remat=remat) if experts is None else dict(remat=remat, experts=experts)
