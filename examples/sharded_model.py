"""The whole model over any mesh, on real text, against itself on one device.

    python examples/sharded_model.py [TEXT] [--mesh context=2,expert=2,tensor=2]
        [--fsdp] [--steps 3] [--layers 6]

Each device makes its own part of a tiny DeepSeek-V4 with random weights. A few steps of
training on the text's bytes follow, then the text is continued from a cache. The same
on one device says whether losses and tokens are right.
"""

import argparse
import collections
import functools
import math
import pathlib
import sys
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import dsv4_eqx as dsv4
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding.mesh import mesh_sizes

BATCH, SEQ, NEW = 8, 128, 8
CONFIG: Final = dsv4.Config.tiny()
RATE = 0.02


def options():
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    text = pathlib.Path(__file__).parent.parent / "LICENSE"
    parser.add_argument("text", type=pathlib.Path, nargs="?", default=text)
    parser.add_argument("--mesh", default="context=2,expert=2,tensor=2")
    parser.add_argument("--fsdp", action="store_true", help="split weights over data")
    parser.add_argument("--steps", type=int, default=3, help="of training")
    layers = CONFIG.num_hidden_layers
    parser.add_argument("--layers", type=int, default=layers, help="the first ones")
    return parser.parse_args()


def read_tokens(path: pathlib.Path) -> np.ndarray:
    """The text's first bytes as rows of tokens."""
    needed = BATCH * (SEQ + 1)
    data = np.frombuffer(path.read_bytes()[:needed], np.uint8)
    if data.size < needed:
        raise ValueError(f"{path} has {data.size} bytes; the example needs {needed}.")
    return data.reshape(BATCH, SEQ + 1).astype(np.int32)


@jax.jit
def train_step(model, tokens):
    """A step of gradient descent: the model after it, and the loss in nats a byte."""
    trained, others = eqx.partition(model, dsv4.trainable(model))

    def mean_nats(trained):
        model = eqx.combine(trained, others)
        hidden = model.hidden(tokens[:, :-1], remat=True)
        return jnp.mean(model.cross_entropy(hidden, tokens[:, 1:]))

    loss, grads = jax.value_and_grad(mean_nats)(trained)
    moved = jax.tree.map(lambda x, d: x - RATE * d, trained, grads)
    return eqx.combine(moved, others), loss


def run(step, model, tokens, steps):
    """The losses of some steps, then what greedy decoding makes of the text."""
    losses = []
    for _ in range(steps):
        model, loss = step(model, tokens)
        losses.append(float(loss))
        print(f"  loss {losses[-1]:.6f} nats a byte", flush=True)
    out = dsv4.generate(model, tokens[:, :32], max_new_tokens=NEW)
    return losses, np.asarray(out.tokens)


def print_placement(model):
    """Bytes of the weights, in all and on each device."""
    whole, held = 0, collections.Counter()
    for leaf in jax.tree.leaves(model):
        whole += leaf.nbytes
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    print(f"{whole:,} bytes of weights, {max(held.values()):,} on each device")


def print_collectives(step, mesh):
    """What a compiled step sends, by kind and axis."""
    sizes = collections.defaultdict(list)
    for item in collectives(step, mesh):
        sizes[item.kind, item.axes].append(item.num_bytes)
    print("collectives of a step (one in a loop counts once)")
    for (kind, axes), found in sorted(sizes.items()):
        over = " x ".join(axes)
        print(f"  {kind:20} over {over:20} {len(found):3} times {sum(found):12,} bytes")


def main():
    """Builds, trains and continues, over the mesh and on one device."""
    asked = options()
    sizes = mesh_sizes(asked.mesh)
    # CPU devices are made as needed; where there are GPUs, those are used.
    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    jax.config.update("jax_default_matmul_precision", "highest")
    tokens = read_tokens(asked.text)
    mesh = dsv4.make_mesh(**sizes, devices=None)
    config = dsv4.Config.from_hf(CONFIG.to_hf(), num_hidden_layers=asked.layers)
    make = functools.partial(dsv4.DeepSeekV4, config, key=jax.random.key(0))
    model = dsv4.shard(make, mesh, fsdp=asked.fsdp)
    print(f"mesh {dict(mesh.shape)}, fsdp={asked.fsdp}, {asked.text.name}")
    print_placement(model)
    step = train_step.lower(model, tokens).compile()
    print_collectives(step, mesh)
    losses, new = run(step, model, tokens, asked.steps)
    print("on one device")
    plain_losses, plain_new = run(train_step, jax.jit(make)(), tokens, asked.steps)
    off = max(map(abs, np.subtract(losses, plain_losses)), default=0.0)
    print(f"largest difference of a loss {off:.1e} (limit 2e-5)")
    print(f"continued alike: {np.array_equal(new, plain_new)}")
    if off > 2e-5 or not np.array_equal(new, plain_new):
        sys.exit("sharded and unsharded runs differ")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sharded_model.py: {error}")
