"""A model whose next token can be computed by hand, and compiles in no time.

Its cache is a state h, which each token changes to h / 2 + E[token]; h @ U are the
logits. The prediction block does the same with a state of its own, which the pair of a
token and the next one changes. Everything before a token matters, in order.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv4_eqx import AbstractModel, Cache
from dsv4_eqx.attention.cache import AttentionCache, Extended
from dsv4_eqx.model.abstract import Lookahead
from dsv4_eqx.model.mtp import MTPCache
from tests.models import small_config

VOCAB = 7


def layers_of(states):
    """States of one layer, which stand where its window's keys would."""
    return (AttentionCache(states, None, None),)


def states_after(state, inputs):
    """The state, then those after each input."""

    def step(state, x):
        state = state / 2 + x
        return state, state

    _, states = lax.scan(step, state[:, 0], jnp.swapaxes(inputs, 0, 1))
    return jnp.concatenate([state, jnp.swapaxes(states, 0, 1)], axis=1)


class Recurrent(AbstractModel):
    embedding: jax.Array  # [vocab, dim]
    following: jax.Array  # [vocab, dim], of the prediction block
    unembedding: jax.Array  # [dim, vocab]
    config: object = eqx.field(static=True)
    blocks: int = eqx.field(static=True)

    def __init__(self, seed=0, dim=5, scale=2.0, num_mtp=1):
        draw = np.random.default_rng(seed).normal
        arrays = draw(size=(3, VOCAB, dim)).astype(np.float32)
        self.embedding, self.following = map(jnp.asarray, arrays[:2])
        self.unembedding = jnp.asarray(scale * arrays[2].T)
        self.config = small_config(vocab_size=VOCAB)
        self.blocks = num_mtp

    @property
    def num_mtp(self):
        return self.blocks

    def init_cache(self, batch, capacity):
        zeros = jnp.zeros((batch, 1, self.embedding.shape[1]))
        return Cache(jnp.zeros(batch, jnp.int32), layers_of(zeros), capacity)

    def init_mtp_cache(self, batch, capacity):
        zeros = jnp.zeros((batch, 1, self.embedding.shape[1]))
        return MTPCache(jnp.zeros(batch, jnp.int32), AttentionCache(zeros, None, None))

    def lookahead(self, tokens, cache, lengths=None):
        before = cache.layers[0].window_keys
        states = states_after(before, self.embedding[tokens])
        layers = Extended(layers_of(states), tokens.shape[1])
        after = Lookahead(cache.lengths, lengths, layers, cache.capacity)
        return states[:, 1:, None], after

    def extend_streams(self, tokens, cache, lengths=None):
        streams, after = self.lookahead(tokens, cache, lengths)
        return streams, after.keep(lengths)

    def extend_mtp(self, streams, following, cache, lengths):
        inputs = streams[:, :, 0] + self.following[following]
        states = states_after(cache.attention.window_keys, inputs)
        kept = jax.vmap(lambda row, i: row[i])(states, lengths)[:, None]
        cache = MTPCache(cache.lengths + lengths, AttentionCache(kept, None, None))
        return states[:, 1:], cache

    def collapse(self, streams):
        return streams[..., 0, :]

    def unembed(self, hidden):
        return hidden @ self.unembedding

    def streams(self, tokens, *, remat=False):
        raise NotImplementedError

    cross_entropy = hidden_ahead = streams

    # By hand, in numpy.

    def logits_after(self, tokens):
        """Of the token after each of a row's tokens."""
        states = self._states(np.asarray(self.embedding)[tokens])
        return states @ np.asarray(self.unembedding)

    def draft_states_after(self, tokens):
        """Of the prediction block, after each token but the first."""
        states = self._states(np.asarray(self.embedding)[tokens])
        return self._states(states[:-1] + np.asarray(self.following)[tokens[1:]])

    def _states(self, inputs):
        states = [np.zeros(inputs.shape[1])]
        for x in inputs:
            states.append(states[-1] / 2 + x)
        return np.array(states[1:])

    def likeliest(self, prompt, new):
        """The likeliest new tokens, and how many drafts of them are right."""
        row = list(prompt)
        for _ in range(new):
            row.append(int(self.logits_after(row)[-1].argmax()))
        draft_logits = self.draft_states_after(row) @ np.asarray(self.unembedding)
        drafts = draft_logits.argmax(-1)  # of row[2:], and one more
        drafted = accepted = 0
        at = len(prompt) + 1  # the first token is chosen from the prompt alone
        while at < len(row):
            is_judged = len(row) - at >= 2
            is_right = drafts[at - 2] == row[at]
            drafted, accepted = drafted + is_judged, accepted + (is_judged and is_right)
            at += 2 if is_judged and is_right else 1
        return row[len(prompt) :], drafted, accepted
