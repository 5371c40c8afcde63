"""Trains something small, saving after every step; goes on where it was.

    python -m tests.training.resumed DIRECTORY LAST_STEP

Prints a line of JSON when it begins and after each step, which tells the bits of the
state, so that another process can kill it and compare.
"""

import hashlib
import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsv4_eqx as dsv4

VOCAB, WIDTH, LENGTH = 97, 3000, 13  # wide, so that saving takes its time


class Bigram(eqx.Module):
    """The next token from the last one."""

    embedding: jax.Array
    unembedding: jax.Array


def digest(state):
    """Tells the bits of two states apart."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def say(**what):
    print(json.dumps(what), flush=True)


def data():
    generator = np.random.default_rng(0)
    sizes = generator.integers(2, 20, 40)
    documents = [
        (generator.integers(0, VOCAB, size), np.ones(size, bool)) for size in sizes
    ]
    return dsv4.PackedBatches(dsv4.pack_documents(documents, LENGTH), 4, seed=1)


def initial(optimizer):
    keys = jax.random.split(jax.random.key(0), 2)
    model = Bigram(*(jax.random.normal(key, (VOCAB, WIDTH)) / 50 for key in keys))
    return model, optimizer.init(model), jax.random.key(5)


def mean_nats(model, batch, key):
    """With noise, so that the key matters."""
    hidden = model.embedding[batch.tokens[:, :-1]]
    hidden = hidden + 0.01 * jax.random.normal(key, hidden.shape)
    nats = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ model.unembedding.T, batch.tokens[:, 1:]
    )
    return jnp.mean(nats, where=batch.mask[:, 1:])


def main():
    """Trains up to the last step."""
    directory, last = sys.argv[1], int(sys.argv[2])
    optimizer, batches, first = optax.adamw(1e-2), data(), 0

    @jax.jit
    def train_step(state, batch):
        model, adam, key = state
        key, own = jax.random.split(key)
        loss, gradients = jax.value_and_grad(mean_nats)(model, batch, own)
        updates, adam = optimizer.update(gradients, adam, model)
        return (optax.apply_updates(model, updates), adam, key), loss

    state = initial(optimizer)
    with dsv4.TrainingCheckpoints(directory, keep=2) as checkpoints:
        found = checkpoints.restore(state)
        if found is not None:
            first, state = found.step, found.state
            batches.set_state(found.data)
        say(step=first, digest=digest(state), epoch=batches.epoch)
        for step in range(first + 1, last + 1):
            state, loss = train_step(state, next(batches))
            checkpoints.save(step, state, batches.get_state())
            say(step=step, digest=digest(state), loss=float(loss).hex())


if __name__ == "__main__":
    main()
