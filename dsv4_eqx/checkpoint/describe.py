"""A checkpoint in words and numbers, from its configuration and headers alone."""

import collections
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax
from jax.sharding import AbstractMesh, NamedSharding

from dsv4_eqx.checkpoint.directory import local_directory
from dsv4_eqx.checkpoint.faults import summary
from dsv4_eqx.checkpoint.inventory import Checkpoint, inspect_checkpoint
from dsv4_eqx.checkpoint.names import Source
from dsv4_eqx.checkpoint.quantized import QuantizedTensor, shared_width
from dsv4_eqx.checkpoint.tensors import NAME_OF_DTYPE
from dsv4_eqx.config.config import Config
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING
from dsv4_eqx.numerics.quantized_weight import codes_per_byte
from dsv4_eqx.sharding.rules import partition_specs

# The first that is in a leaf's path says which part it is.
_PARTS: Final = (
    ("mtp.", "prediction block"),
    ("indexer.", "indexers"),
    ("compressor.", "compressors"),
    ("attention.", "attention"),
    ("experts.", "routed experts"),
    ("shared.", "shared experts"),
    ("router.", "routers"),
    ("_connection.", "hyper-connections"),
    ("embedding", "embedding, unembedding"),
    ("", "norms and head"),
)


def describe(
    directory: str | os.PathLike,
    mesh_sizes: Mapping[str, int] | None = None,
    revision: str | None = None,
) -> tuple[str, bool]:
    """The description, and whether the checkpoint is complete and fits the mesh."""
    directory = local_directory("inspect", directory, revision)
    checkpoint, faults = inspect_checkpoint("inspect", directory, None)
    lines = [*_config_in_words(checkpoint.model.config), ""]
    lines += [*_parts_table(checkpoint), "", *_dtypes_table(checkpoint), ""]
    lines.append(
        f"{len(faults)} faults" if faults else "nothing missing, nothing extra"
    )
    lines += [f"  {line}" for line in summary(faults)]
    lines += checkpoint.notes
    fits = True
    if mesh_sizes is not None:
        line, fits = _over_mesh(checkpoint, mesh_sizes)
        lines += ["", line]
    return "\n".join(lines), fits and not faults


def _config_in_words(config: Config) -> Iterator[str]:
    kinds = collections.Counter(zip(config.layer_types, config.compress_ratios))
    words = {SLIDING: "sliding", CSA: "compressed sparse", HCA: "heavily compressed"}
    layers = ", ".join(
        f"{count} {words[kind]}" + (f" (1 entry for {ratio} tokens)" if ratio else "")
        for (kind, ratio), count in kinds.items()
    )
    hashed = config.mlp_layer_types.count(HASH_MOE)
    num_layers = config.num_hidden_layers
    yield f"DeepSeek-V4 of width {config.hidden_size:,}, {num_layers} layers"
    yield f"  attention: {layers}"
    yield (
        f"    {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.qk_rope_head_dim} of them rotary; query rank {config.q_lora_rank}; "
        f"{config.o_groups} output groups of {config.o_lora_rank}; window "
        f"{config.sliding_window}"
    )
    if CSA in config.layer_types:
        yield (
            f"    indexer: {config.index_n_heads} heads of {config.index_head_dim}, "
            f"the best {config.index_topk} entries"
        )
    yield (
        f"  experts: {config.n_routed_experts} of {config.moe_intermediate_size}, "
        f"{config.num_experts_per_tok} a token and a shared one; {hashed} layers route "
        "by token id"
    )
    yield (
        f"  vocabulary {config.vocab_size:,}; up to {config.max_position_embeddings:,} "
        f"positions; prediction blocks: {config.num_nextn_predict_layers}"
    )


def _parts_table(checkpoint: Checkpoint) -> Iterator[str]:
    parameters, num_bytes = collections.Counter(), collections.Counter()
    for source, leaf in checkpoint.wanted:
        part = next(label for piece, label in _PARTS if piece in source.path)
        parameters[part] += leaf.size
        num_bytes[part] += sum(t.num_bytes for t in checkpoint.stored(source))
    parameters["total"] = parameters.total()
    num_bytes["total"] = num_bytes.total()
    yield f"{'part':24}{'numbers':>22}{'bytes':>22}"
    for part in parameters:
        yield f"{part:24}{parameters[part]:>22,}{num_bytes[part]:>22,}"


def _dtypes_table(checkpoint: Checkpoint) -> Iterator[str]:
    tensors, num_bytes = collections.Counter(), collections.Counter()
    for tensor in checkpoint.tensors.values():
        tensors[tensor.dtype] += 1
        num_bytes[tensor.dtype] += tensor.num_bytes
    yield f"{'dtype':24}{'tensors':>22}{'bytes':>22}"
    for dtype in sorted(tensors, key=lambda dtype: -num_bytes[dtype]):
        name = NAME_OF_DTYPE[dtype]
        yield f"{name:24}{tensors[dtype]:>22,}{num_bytes[dtype]:>22,}"


def _over_mesh(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> tuple[str, bool]:
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    model = checkpoint.model
    try:
        specs = partition_specs(model, mesh=mesh)
    except ValueError as error:
        return f"mesh {shown}: does not fit: {error}", False
    arrays, packed = 0, 0.0  # bytes on a device
    specs = jax.tree.structure(model).flatten_up_to(specs)
    for (source, leaf), spec in zip(checkpoint.wanted, specs):
        local = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        arrays += math.prod(local) * leaf.dtype.itemsize
        of_number = _bytes_of_number(checkpoint, source, leaf, local[-1])
        packed += math.prod(local) * of_number
    dtype = model.embedding.dtype
    return (
        f"mesh {shown}: fits; bytes per device {arrays:,} as {dtype}, {packed:,.0f} "
        "with keep_quantized"
    ), True


def _bytes_of_number(
    checkpoint: Checkpoint, source: Source, leaf: Any, columns: int
) -> float:
    """What a number takes with `keep_quantized`, its share of the scales included."""
    weights = [checkpoint.weights.get(name) for name in source.names.flat]
    packed = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if len(packed) < len(weights):
        return leaf.dtype.itemsize
    width = shared_width(packed[0], source, slice(0, columns))
    scale_bytes = packed[0].scale_bits.itemsize
    return 1 / codes_per_byte(packed[0].code_dtype) + scale_bytes / width
