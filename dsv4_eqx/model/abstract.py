"""What DeepSeek-V4 can do, whether on one device or over a mesh.

The methods that differ are abstract; what follows from them is here.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from dsv4_eqx.attention.cache import AttentionCache, Extended
from dsv4_eqx.config.config import Config
from dsv4_eqx.model.inputs import Lengths, SegmentIds, TokenIds
from dsv4_eqx.model.mtp import MTPCache
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
    """The state of the model with new tokens, before it is settled how many stay.

    It cannot be extended again: `keep` gives the cache that can.
    """

    before: Int32[Array, " batch"]  # tokens of each row without the new ones
    lengths: Int32[Array, " batch"]  # new tokens of each row
    layers: Extended
    capacity: int = eqx.field(static=True)

    def keep(self, lengths: Lengths) -> Cache:
        """The cache after the tokens that stay: no copy of more than their windows.

        **Arguments:**

        - `lengths`: of each row's new tokens, those that stay: 0 to as many as
            `lookahead` was told of.

        **Raises:** ValueError if there is not an integer for each row, or one of them
        is out of its range, which is not checked under `jit`.
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
        """Prediction blocks."""

    def __call__(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position, float32.

        Rows are the batch: `jax.vmap` over calls works outside of `jit` alone.

        A row may hold several documents, of any lengths, one after another: with
        `segment_ids`, each is computed as if it were alone. At a document's last token
        the logits are of a token that would continue it. Padding is one more document:
        give it an id of its own, and leave its output unread.

        **Arguments:**

        - `tokens`: token ids, each in `[0, vocab)`.
        - `segment_ids`: document of each token, where rows hold several: any integers,
            the same throughout a document, each in one document of a row.
        - `remat`: keep only each layer's input for the backward pass.

        **Raises:** ValueError if the tokens are no array of integers of two dimensions,
        are empty, or longer than `max_position_embeddings`; if the segment ids are no
        integers of the same shape; and if a token is outside the vocabulary or a
        segment id comes back after another one. These two are not checked under `jit`,
        where an id that comes back is another document.
        """
        return self.unembed(self.hidden(tokens, segment_ids, remat=remat))

    def hidden(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> Float[Array, "batch seq dim"]:
        """What the unembedding turns into logits.

        **Arguments:** as for calling.
        """
        return self.collapse(self.streams(tokens, segment_ids, remat=remat))

    @abc.abstractmethod
    def streams(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> Float[Array, "batch seq streams dim"]:
        """The residual streams after the last layer.

        **Arguments:** as for calling.
        """

    @abc.abstractmethod
    def collapse(
        self, streams: Float[Array, "*batch streams dim"]
    ) -> Float[Array, "*batch dim"]:
        """What the unembedding turns into logits.

        **Arguments:**

        - `streams`: from `streams` or `extend_streams`.
        """

    @abc.abstractmethod
    def unembed(
        self, hidden: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Logits, at least float32.

        **Arguments:**

        - `hidden`: from `hidden` or `collapse`.
        """

    @abc.abstractmethod
    def cross_entropy(
        self,
        hidden: Float[Array, "*batch dim"],
        targets: Int[Array | np.ndarray, "*batch"],
        mask: Bool[Array | np.ndarray, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Cross-entropy of each target in nats, at least float32.

        **Arguments:**

        - `hidden`: from `hidden` or `collapse`.
        - `targets`: the tokens that followed.
        - `mask`: which targets count; all by default. The others cost 0, whatever they
            are: the mean over those that count is `nats.sum() / mask.sum()`.

        **Raises:** ValueError if the targets, or the mask, are not one for each
        position, or a target that counts is outside the vocabulary; under `jit`, which
        does not know them, the cross-entropy of such a one is NaN.
        """

    @abc.abstractmethod
    def multi_token_logits(
        self, tokens: TokenIds, segment_ids: SegmentIds = None, *, remat: bool = False
    ) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "batch seq-1 vocab"]]:
        """Logits of the next token, and of the one after it.

        The second has one position less: it needs the next token itself.

        With `segment_ids`, both predict within documents. In a document's last position
        p, token p+1 is another document's: no target for the first, and the second
        means nothing. In the last but one, p+2 is another document's: no target for the
        second. Leave these out of the loss.

        **Arguments:** as for calling; at least two tokens.

        **Raises:** ValueError if the model has no prediction block or there is a single
        token, and as for calling.
        """

    @abc.abstractmethod
    def init_cache(self, batch: int, capacity: int) -> Cache:
        """The state before any token, for `extend`.

        **Arguments:**

        - `batch`: rows.
        - `capacity`: tokens that each row will have room for.

        **Raises:** ValueError if either is no positive integer, or the capacity is
        above `max_position_embeddings`.
        """

    def extend(
        self,
        tokens: TokenIds,
        cache: Cache,
        lengths: Lengths | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """What the unembedding turns into logits, for tokens after those in the cache.

        One function for a prompt, a part of one, a single new token, or several to
        verify. Rows may be of different lengths, new and old. The given cache stays as
        it was: to go back, go on from there. Under `jit` it has no derivative in
        reverse, for entries are written in a loop of unknown length: train by calling
        the model.

        **Arguments:**

        - `tokens`: the new token ids of each row, then anything as padding.
        - `cache`: from `init_cache` or another call.
        - `lengths`: new tokens of each row, 0 to `seq`; all of them by default.

        **Returns:** the hidden activations, which mean nothing at the padding, and the
        cache after the new tokens.

        **Raises:** ValueError if the tokens are not as for calling, the cache has
        another shape than this model's for this batch, or `lengths` do not fit the
        tokens; and if a row would have more tokens than the capacity, which is not
        checked under `jit`.
        """
        streams, cache = self.extend_streams(tokens, cache, lengths)
        return self.collapse(streams), cache

    @abc.abstractmethod
    def extend_streams(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Cache]:
        """The residual streams after the last layer, and the cache.

        **Arguments:** as for `extend`.

        **Raises:** ValueError as `extend` does.
        """

    @abc.abstractmethod
    def lookahead(
        self, tokens: TokenIds, cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "batch seq streams dim"], Lookahead]:
        """As `extend_streams`, where what is seen decides which tokens stay.

        **Arguments:** as for `extend`.

        **Returns:** the streams, and what gives the cache after as many of each row's
        new tokens as its method `keep` is told.

        **Raises:** ValueError as `extend` does.
        """

    @abc.abstractmethod
    def init_mtp_cache(self, batch: int, capacity: int) -> MTPCache:
        """The state of the prediction block before any token.

        **Arguments:** as for `init_cache`.

        **Raises:** ValueError as `init_cache` does, and if there is no such block.
        """

    @abc.abstractmethod
    def extend_mtp(
        self,
        streams: Float[Array, "batch seq streams dim"],
        following: Int[Array, "batch seq"],
        cache: MTPCache,
        lengths: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq dim"], MTPCache]:
        """What the unembedding turns into logits of the token after next.

        **Arguments:**

        - `streams`: of the main model at new tokens, then anything as padding.
        - `following`: the token after each of them.
        - `cache`: from `init_mtp_cache` or another call.
        - `lengths`: new tokens of each row.

        **Raises:** ValueError if there is no prediction block, or ids, cache and
        lengths do not fit each other, as for `extend`.
        """
