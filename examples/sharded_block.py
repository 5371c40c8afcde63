"""A small DeepSeek-V4 block, run over a mesh with `jax.shard_map`, on real text.

    python examples/sharded_block.py --data 2 --expert 2 --tensor 2 LICENSE

The batch is split over `data` and `expert`, heads, groups, hidden channels and the
vocabulary over `tensor`, whole experts over `expert`. The same step without a mesh says
whether loss and gradients are right.
"""

import argparse
import collections
import math
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import dsv4_eqx as dsv4
from dsv4_eqx.sharding.collectives import collectives
from dsv4_eqx.sharding.rules import annotated_leaves
from dsv4_eqx.sharding.shard import parallelize, place
from dsv4_eqx.sharding.tensor import cross_entropy_split_vocab, embed_split_vocab

BATCH, SEQ = 8, 128


class OneBlock(eqx.Module):
    """The smallest language model around one block."""

    embedding: Float[Array, "vocab dim"]
    block: dsv4.Block
    head: dsv4.HyperHead
    norm: dsv4.RMSNorm
    unembedding: Float[Array, "vocab dim"]

    def __init__(self, config: dsv4.Config, layer: int, *, key: Array):
        keys = jax.random.split(key, 5)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = jax.random.normal(keys[0], shape)
        self.block = dsv4.Block(config, layer, key=keys[1])
        # A new block treats all streams alike, and most of the hyper-connections'
        # gradients are zero: start where training would have taken them.
        self.block = eqx.tree_at(
            lambda block: block.attention_connection.base,
            self.block,
            replace_fn=lambda base: jax.random.normal(keys[4], base.shape),
        )
        self.head = dsv4.HyperHead(config, key=keys[2])
        self.norm = dsv4.RMSNorm(config.hidden_size)
        self.unembedding = 0.1 * jax.random.normal(keys[3], shape)

    def __call__(
        self, tokens: Int[Array, "batch seq+1"], vocab_axis: str | None = None
    ) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "batch seq"]]:
        """Logits, and the loss in nats of each next byte."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        x = embed_split_vocab(self.embedding, inputs, vocab_axis)
        streams = jnp.repeat(x[:, :, None], self.head.base.shape[0], axis=2)
        streams = self.block(streams, inputs, positions)
        hidden = self.norm(self.head(streams))
        logits = jnp.einsum("bsd,vd->bsv", hidden, self.unembedding)
        return logits, cross_entropy_split_vocab(logits, targets, vocab_axis)


def loss(model: OneBlock, tokens: Int[Array, "batch seq+1"]) -> tuple[Array, Array]:
    """Mean loss and the logits, on one device."""
    logits, nats = model(tokens)
    return jnp.mean(nats), logits


def sharded_loss(model_specs: OneBlock, mesh: Mesh):
    """The same function over a mesh: each device runs `step` on its own part."""
    batch_axes = tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1)
    vocab_axis = "tensor" if mesh.shape["tensor"] > 1 else None

    def step(model: OneBlock, tokens: Array) -> tuple[Array, Array]:
        logits, nats = model(tokens, vocab_axis)
        mean = jnp.mean(nats)
        return lax.pmean(mean, batch_axes) if batch_axes else mean, logits

    rows = P(batch_axes or None)
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(model_specs, rows),
        out_specs=(P(), P(batch_axes or None, None, vocab_axis)),
    )


def read_bytes(path: pathlib.Path) -> np.ndarray:
    """The text's first bytes as rows of tokens."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    needed = BATCH * (SEQ + 1)
    if data.size < needed:
        sys.exit(f"{path} has {data.size} bytes; the example needs {needed}.")
    return data[:needed].reshape(BATCH, SEQ + 1).astype(np.int32)


def print_leaves(model: OneBlock, specs: OneBlock, mesh: Mesh) -> None:
    """Name, annotation, sharding, local shape and bytes of every array."""
    print(f"{'leaf':54} {'annotation':36} {'spec':34} {'local shape':18} bytes/device")
    for leaf, spec in zip(annotated_leaves(model), jax.tree.leaves(specs)):
        shape = jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.array.shape)
        size = math.prod(shape) * leaf.array.dtype.itemsize
        dims = " ".join(leaf.dims or ())
        print(f"{leaf.name:54} {dims:36} {spec!s:34} {shape!s:18} {size:,}")


def print_collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """What the compiled step sends, by kind and axis."""
    groups = collections.defaultdict(list)
    for item in collectives(compiled, mesh):
        groups[item.kind, item.axes].append(item.num_bytes)
    print("\ncollectives in the compiled training step (one in a loop counts once)")
    for (kind, axes), sizes in sorted(groups.items()):
        over = " x ".join(axes)
        print(f"  {kind:20} over {over:24} {len(sizes):3} times {sum(sizes):12,} bytes")
    if not groups:
        print("  none")


def largest_difference(ours: OneBlock, theirs: OneBlock) -> float:
    """Largest relative L2 difference of any gradient."""

    def relative(a: Array, b: Array) -> float:
        expected = np.asarray(b, np.float64)
        difference = np.linalg.norm(np.asarray(a, np.float64) - expected)
        return float(difference / max(np.linalg.norm(expected), 1e-30))

    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    return max(relative(a, b) for a, b in pairs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default_text = pathlib.Path(__file__).parent.parent / "LICENSE"
    parser.add_argument("text", type=pathlib.Path, nargs="?", default=default_text)
    parser.add_argument("--data", type=int, default=2)
    parser.add_argument("--expert", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--layer", type=int, default=2, help="of Config.tiny(), 0 to 5")
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[Mesh, OneBlock]:
    """Mesh and model, or a message that says what does not fit."""
    sizes = dict(data=args.data, expert=args.expert, tensor=args.tensor)
    needed = math.prod(sizes.values())
    # As many CPU devices as the mesh needs; where there are GPUs, those are used.
    jax.config.update("jax_num_cpu_devices", max(needed, 1))
    try:
        mesh = dsv4.make_mesh(**sizes, devices=jax.devices()[: max(needed, 1)])
        if BATCH % (args.data * args.expert) != 0:
            raise ValueError(f"data x expert must divide the batch of {BATCH} rows.")
        model = OneBlock(dsv4.Config.tiny(), args.layer, key=jax.random.key(0))
        dsv4.partition_specs(model, mesh=mesh)
    except ValueError as error:
        sys.exit(f"This mesh does not fit: {error}")
    return mesh, model


def main() -> None:
    args = arguments()
    mesh, model = build(args)
    tokens = read_bytes(args.text)
    parallel = parallelize(model, mesh)
    specs = dsv4.partition_specs(parallel, mesh=mesh)
    print(
        f"mesh {dict(mesh.shape)} on {jax.devices()[0].device_kind}, {args.text.name}"
    )
    print_leaves(parallel, specs, mesh)

    def value_and_grad(loss):
        def with_grad(trained, rest, tokens):
            return jax.value_and_grad(
                lambda trained: loss(eqx.combine(trained, rest), tokens), has_aux=True
            )(trained)

        return jax.jit(with_grad)

    def split(model):
        return eqx.partition(model, eqx.is_inexact_array)

    placed = split(place(parallel, specs, mesh))
    compiled = (
        value_and_grad(sharded_loss(specs, mesh)).lower(*placed, tokens).compile()
    )
    print_collectives(compiled, mesh)
    (mean, logits), grads = compiled(*placed, tokens)
    (plain_mean, plain_logits), plain_grads = value_and_grad(loss)(
        *split(model), tokens
    )
    logits_off = float(np.max(np.abs(np.asarray(logits) - np.asarray(plain_logits))))
    grads_off = largest_difference(grads, plain_grads)
    print(
        f"\nloss {float(mean):.6f} nats a byte, {float(plain_mean):.6f} without a mesh"
    )
    print(f"largest difference of a logit {logits_off:.1e} (limit 2e-5)")
    print(f"largest relative difference of a gradient {grads_off:.1e} (limit 1e-4)")
    if not (logits_off <= 2e-5 and grads_off <= 1e-4):
        sys.exit("sharded and unsharded runs differ")


if __name__ == "__main__":
    main()
