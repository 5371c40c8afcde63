"""A small DeepSeek-V4 block, run over a mesh with `jax.shard_map`, on real text.

    python examples/sharded_block.py --data 2 --expert 2 --tensor 2 LICENSE

The batch is split over `data` and `expert`, heads, groups, hidden channels and the
vocabulary over `tensor`, whole experts over `expert`. The same step without a mesh says
whether logits and gradients are right.
"""

import argparse
import collections
import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import dsv4_eqx as dsv4
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding.annotations import annotated_leaves
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from dsv4_eqx.sharding.tensor import cross_entropy_split_vocab, embed_split_vocab

BATCH, SEQ, MOST_DEVICES = 8, 128, 8
CONFIG: Final = dsv4.Config.tiny()
# What runs once takes longer to compile than to run: on CPU, LLVM may do less.
QUICKLY: Final = {"xla_backend_optimization_level": 0}


class OneBlock(eqx.Module):
    """The smallest language model around one block."""

    embedding: Float[Array, "vocab dim"]
    block: dsv4.Block
    head: dsv4.HyperHead
    norm: dsv4.RMSNorm
    unembedding: Float[Array, "vocab dim"]

    def __init__(self, config: dsv4.Config, layer: int, *, key: Array):
        keys = jax.random.split(key, 7)
        shape = (config.vocab_size, config.hidden_size)
        # Float32 by name: with jax_enable_x64 the default is another.
        std, wide = config.initializer_range, jnp.float32
        self.embedding = std * jax.random.normal(keys[0], shape, wide)
        block = dsv4.Block(config, layer, key=keys[1])
        head = dsv4.HyperHead(config.hidden_size, config.hc_mult, key=keys[2])
        # New hyper-connections treat all streams alike, so that most of their own
        # gradients cancel: start where training would have taken them.
        self.block = eqx.tree_at(
            lambda b: (b.attention_connection.base, b.moe_connection.base),
            block,
            [
                jax.random.normal(key, block.moe_connection.base.shape, wide)
                for key in keys[3:5]
            ],
        )
        base = jax.random.normal(keys[5], head.base.shape, wide)
        self.head = eqx.tree_at(lambda head: head.base, head, base)
        self.norm = dsv4.RMSNorm(config.hidden_size)
        self.unembedding = 0.1 * jax.random.normal(keys[6], shape, wide)

    def __call__(
        self, tokens: Int[Array, "batch seq+1"], vocab_axis: str | None = None
    ) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "batch seq"]]:
        """Logits, and the loss in nats of each next byte."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        if vocab_axis is None:
            x = self.embedding[inputs]
        else:
            x = embed_split_vocab(self.embedding, inputs, vocab_axis)
        streams = jnp.repeat(x[:, :, None], self.head.base.shape[0], axis=2)
        streams = self.block(streams, inputs, positions)
        hidden = self.norm(self.head(streams))
        logits = jnp.einsum("bsd,vd->bsv", hidden, self.unembedding)
        return logits, cross_entropy_split_vocab(logits, targets, vocab_axis)


def plain_loss(model: OneBlock, tokens: Array) -> tuple[Array, Array]:
    """Mean loss and the logits, on one device."""
    logits, nats = model(tokens)
    return jnp.mean(nats), logits


def sharded_loss(specs: OneBlock, mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    """The same over a mesh: each device runs `on_one_device` on its own part."""
    batch_axes = tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1)
    vocab_axis = "tensor" if mesh.shape["tensor"] > 1 else None

    def on_one_device(model: OneBlock, tokens: Array) -> tuple[Array, Array]:
        logits, nats = model(tokens, vocab_axis)
        mean = jnp.mean(nats)
        return lax.pmean(mean, batch_axes) if batch_axes else mean, logits

    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, P(batch_axes or None)),
        out_specs=(P(), P(batch_axes or None, None, vocab_axis)),
    )


def compile_step(loss: Callable, model: Any, tokens: np.ndarray) -> Any:
    """Loss, logits and gradients of every weight, compiled as one program."""
    step: Any = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    return step.lower(model, tokens).compile(compiler_options())


def compiler_options() -> dict[str, Any] | None:
    return QUICKLY if jax.default_backend() == "cpu" else None


def print_leaves(model: OneBlock, specs: OneBlock, mesh: Mesh) -> None:
    """Name, annotation, sharding, local shape and bytes of every array."""
    row = "{:48} {:34} {:34} {:18} {:>12}".format
    print(row("leaf", "annotated shape", "spec", "local shape", "bytes/device"))
    total = 0
    # The wrappers of a parallel model add no array: the order is the plain model's.
    leaves = zip(annotated_leaves(model), jax.tree.leaves(specs), strict=True)
    for leaf, spec in leaves:
        shape = NamedSharding(mesh, spec).shard_shape(leaf.array.shape)
        size = math.prod(shape) * leaf.array.dtype.itemsize
        dims = " ".join(leaf.dims or ())
        print(row(leaf.name.lstrip("."), dims, str(spec), str(shape), f"{size:,}"))
        total += size
    print(row("all", "", "", "", f"{total:,}"))


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


def largest_difference(ours: Any, theirs: Any) -> float:
    """Largest relative L2 difference of any gradient."""

    def relative(a: Array, b: Array) -> float:
        expected = np.asarray(b, np.float64)
        difference = np.linalg.norm(np.asarray(a, np.float64) - expected)
        return float(difference / max(np.linalg.norm(expected), 1e-30))

    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(relative(a, b) for a, b in pairs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default_text = pathlib.Path(__file__).parent.parent / "LICENSE"
    parser.add_argument("text", type=pathlib.Path, nargs="?", default=default_text)
    for axis in ("data", "expert", "tensor"):
        parser.add_argument(f"--{axis}", type=int, default=2, help="devices; 2")
    layers = range(CONFIG.num_hidden_layers)
    parser.add_argument("--layer", type=int, default=2, choices=layers)
    return parser.parse_args()


def read_tokens(path: pathlib.Path) -> np.ndarray:
    """The text's first bytes as rows of tokens."""
    needed = BATCH * (SEQ + 1)
    try:
        with path.open("rb") as file:
            data = np.frombuffer(file.read(needed), np.uint8)
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}.")
    if data.size < needed:
        sys.exit(f"{path} has {data.size} bytes; the example needs {needed}.")
    return data.reshape(BATCH, SEQ + 1).astype(np.int32)


def build(args: argparse.Namespace) -> tuple[Mesh, OneBlock]:
    """Mesh and model, or a message that says what does not fit."""
    sizes = dict(data=args.data, expert=args.expert, tensor=args.tensor)
    wanted = min(max(math.prod(sizes.values()), 1), MOST_DEVICES)
    # CPU devices are made as needed; where there are GPUs, those are used.
    jax.config.update("jax_num_cpu_devices", wanted)
    # Float32 products as they are: a GPU would round them to TF32 first.
    jax.config.update("jax_default_matmul_precision", "highest")
    make = functools.partial(OneBlock, CONFIG, args.layer, key=jax.random.key(0))
    try:
        mesh = dsv4.make_mesh(**sizes, devices=jax.devices()[:wanted])
        rows = args.data * args.expert
        if BATCH % rows != 0:
            raise ValueError(f"data x expert = {rows} must divide the {BATCH} rows.")
        dsv4.partition_specs(eqx.filter_eval_shape(make), mesh=mesh)
    except ValueError as error:
        hint = "Choose --data, --expert and --tensor (2 each by default) that do."
        sys.exit(f"This mesh does not fit: {error} {hint}")
    return mesh, jax.jit(make, compiler_options=compiler_options())()


def main() -> None:
    args = parse_arguments()
    tokens = read_tokens(args.text)
    mesh, model = build(args)
    parallel = parallelize(model, mesh)
    specs = dsv4.partition_specs(parallel, mesh=mesh)
    kind = jax.devices()[0].device_kind
    print(f"mesh {dict(mesh.shape)} on {kind}, layer {args.layer}, {args.text.name}\n")
    print_leaves(model, specs, mesh)

    placed = place(parallel, specs, mesh)
    step = compile_step(sharded_loss(specs, mesh), placed, tokens)
    print_collectives(step.compiled, mesh)
    (mean, logits), grads = step(placed, tokens)
    plain_step = compile_step(plain_loss, model, tokens)
    (plain_mean, plain_logits), plain_grads = plain_step(model, tokens)

    logits_off = float(np.max(np.abs(np.asarray(logits) - np.asarray(plain_logits))))
    grads_off = largest_difference(grads, plain_grads)
    print(f"\nloss {mean:.6f} nats a byte, {plain_mean:.6f} without a mesh")
    print(f"largest difference of a logit {logits_off:.1e} (limit 2e-5)")
    print(f"largest relative difference of a gradient {grads_off:.1e} (limit 1e-4)")
    if not (logits_off <= 2e-5 and grads_off <= 1e-4):
        sys.exit("sharded and unsharded runs differ")


if __name__ == "__main__":
    main()
