"""A model of one's own from DeepSeek-V4's parts, without a Config, trained over a mesh.

    python examples/own_model.py

Each device runs the layers on its part of the weights and rows; `parallelize` adds the
sums over devices that the parts need. It needs optax; on a CPU it makes eight devices.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import dsv4_eqx as dsv4
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place

norm = dsv4.UnweightedRMSNorm()


class Layer(eqx.Module):
    connections: list[dsv4.HyperConnection]
    attention: dsv4.Attention
    moe: dsv4.MoE

    def __init__(self, dim: int, key: Array):
        keys, rope = jax.random.split(key, 9), dsv4.RotaryEmbedding(16)
        self.connections = [dsv4.HyperConnection(dim, 4, key=key) for key in keys[:2]]
        entries = dsv4.Compressor(dim, 32, 4, overlap=True, rope=rope, key=keys[2])
        scored = dsv4.Compressor(dim, 24, 4, overlap=True, rope=rope, key=keys[3])
        indexer = dsv4.Indexer(dim, 40, 8, 8, compressor=scored, key=keys[4])
        sizes = dict(q_rank=40, num_groups=4, out_per_group=24, window=16)
        parts: Any = dict(rope=rope, compressor=entries, indexer=indexer)
        self.attention = dsv4.Attention(dim, 8, 32, **sizes, **parts, key=keys[5])
        router = dsv4.TopKRouter(dim, 16, 2, key=keys[6])
        experts = dsv4.Experts(dim, 48, 16, key=keys[7])
        self.moe = dsv4.MoE(router, experts, dsv4.SharedExpert(dim, 48, key=keys[8]))

    def __call__(self, streams: Array, tokens: Array, positions: Array) -> Array:
        first, second = self.connections
        x, mixing = first.read(streams)
        streams = first.write(streams, self.attention(norm(x), positions), mixing)
        x, mixing = second.read(streams)
        return second.write(streams, self.moe(norm(x), tokens), mixing)


class Model(eqx.Module):
    embedding: Float[Array, "vocab dim"]
    layers: list[Layer]

    def loss(self, tokens: Array) -> Array:
        tokens, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        streams = jnp.repeat(self.embedding[tokens][:, :, None], 4, axis=2)
        for layer in self.layers:
            streams = layer(streams, tokens, positions)
        logits = norm(streams.mean(axis=2)) @ self.embedding.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    *layer_keys, key = jax.random.split(jax.random.key(0), 4)
    embedding = 0.02 * jax.random.normal(key, (256, 64))
    model: Any = Model(embedding, [Layer(64, key) for key in layer_keys])
    mesh, optimizer = dsv4.make_mesh(data=2, expert=2, tensor=2), optax.adamw(3e-3)
    jax.set_mesh(mesh)
    rules, rows = {**dsv4.DEFAULT_RULES, "vocab": None}, ("data", "expert")
    specs = dsv4.partition_specs(model, rules, mesh=mesh)
    model = place(model, specs, mesh)

    def local(model: Model, tokens: Array) -> Array:
        return jax.lax.pmean(parallelize(model, mesh).loss(tokens), rows)

    loss = jax.shard_map(local, in_specs=(specs, jax.P(rows)), out_specs=jax.P())

    @jax.jit
    def step(model: Any, state: optax.OptState, tokens: Array) -> tuple:
        nats, gradients = jax.value_and_grad(loss)(model, tokens)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, nats

    tokens = np.fromfile(__file__, np.uint8, 4 * 129).reshape(4, 129).astype(np.int32)
    state = optimizer.init(model)
    for i in range(20):
        model, state, nats = step(model, state, tokens)
        print(f"step {i}: {nats:.3f} nats a byte")


if __name__ == "__main__":
    main()
