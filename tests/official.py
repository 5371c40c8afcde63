"""Checkpoints as a release has them, with random codes and scales, and their meaning.

The meaning is computed here in float64 from the formats' definitions, apart from the
package's own reading.
"""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.config.kinds import CSA, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from tests.models import small_config

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_VALUES = np.concatenate([E2M1, -E2M1])
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
NAME_OF_DTYPE = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    BFLOAT16: "BF16",
    FP8: "F8_E4M3",
    E8M0: "F8_E8M0",
    np.dtype(np.int64): "I64",
    np.dtype(np.int8): "I8",
}
# Endings of the leaves that a release has in FP8, or the experts in FP4.
QUANTISED = (
    "query_down",
    "query_up",
    "key_value",
    "output_down.weight",
    "output_up",
    ".gate_up",
    ".down",
    "embedding_in",
    "streams_in",
)


def wide_config(**changes):
    """A layer where blocks of 128 and of 32 end in, and straddle, most dimensions.

    150 rows of `wo_a` and columns of `wo_b` are six groups of 25; the query's 264 rows
    are six heads of 44; gate and up are 72 rows each.
    """
    fields = dict(
        vocab_size=102,
        num_hidden_layers=1,
        layer_types=(CSA,),
        compress_ratios=(4,),
        mlp_layer_types=(TOPK_MOE,),
        num_nextn_predict_layers=0,
        hidden_size=150,
        moe_intermediate_size=72,
        head_dim=44,
        qk_rope_head_dim=8,
        q_lora_rank=134,
        o_groups=6,
        o_lora_rank=25,
        n_routed_experts=6,
    )
    return small_config(**(fields | changes))


def random_release(config, seed=0, *, fp4=True, official=True):
    """Tensors by name as a release has them; experts in FP8 without `fp4`."""
    generator = np.random.default_rng(seed)
    tensors = {}
    model = abstract_model(config, jnp.bfloat16)
    for source, leaf in sources(model, official=official):
        for name in source.names.flat:
            shape = source.tensor_shape
            if source.path.endswith(QUANTISED):
                is_fp4 = fp4 and ".moe.experts." in source.path
                codes, scales = random_codes(generator, shape, is_fp4)
                tensors |= {name: codes, scale_name(name, official): scales}
            elif leaf.dtype == jnp.int32:
                tensors[name] = generator.integers(0, config.n_routed_experts, shape)
            else:
                value = generator.normal(size=shape) / np.sqrt(shape[-1])
                value = 1 + 0.2 * value if "norm" in source.path else value
                tensors[name] = value.astype(leaf.dtype)
    return tensors


def scale_name(name, official=True):
    """What the scales of a weight are called."""
    return name.removesuffix("weight") + "scale" if official else f"{name}_scale_inv"


def random_codes(generator, shape, is_fp4):
    """Codes of every finite value, and scales that make them weights of usual size."""
    *outer, rows, columns = shape
    if is_fp4:
        codes = generator.integers(-128, 128, (*outer, rows, columns // 2), np.int8)
        blocks, exponents = (rows, -(-columns // 32)), (119, 125)
    else:
        codes = generator.integers(0, 255, shape, np.uint8)
        codes = np.where(codes & 127 == 127, 0, codes).astype(np.uint8).view(FP8)
        blocks, exponents = (-(-rows // 128), -(-columns // 128)), (112, 120)
    scales = generator.integers(*exponents, (*outer, *blocks), np.uint8)
    return codes, scales.view(E8M0)


def meaning(codes, scales):
    """float64 of a quantised weight."""
    exponents = scales.view(np.uint8).astype(np.int32) - 127
    if codes.dtype == FP8:
        values, blocks = codes.astype(np.float64), (128, 128)
    else:
        byte = codes.view(np.uint8)
        pairs = np.stack([byte & 15, byte >> 4], axis=-1)
        values, blocks = FP4_VALUES[pairs].reshape(*codes.shape[:-1], -1), (1, 32)
    for axis, block in zip((-2, -1), blocks):
        exponents = exponents.repeat(block, axis=axis)
    rows, columns = values.shape[-2:]
    return np.ldexp(values, exponents[..., :rows, :columns])


def meanings(tensors):
    """float32 of every weight, the scales gone; tables as they are."""
    found = {}
    for name, value in tensors.items():
        if value.dtype in (FP8, np.dtype(np.int8)):
            named = (scale_name(name, official) for official in (True, False))
            (scales,) = (tensors[scale] for scale in named if scale in tensors)
            found[name] = meaning(value, scales).astype(np.float32)
        elif value.dtype == np.int64:
            found[name] = value
        elif value.dtype != E8M0:
            found[name] = value.astype(np.float32)
    return found


def write_tensors(path, tensors):
    """A safetensors file."""
    header, data = {}, []
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": NAME_OF_DTYPE[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
        data.append(np.ascontiguousarray(value).tobytes())
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data))


def write_release(directory, config, tensors):
    """A checkpoint in one file; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    written = config.to_hf() | {"quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(written))
    write_tensors(directory / "model.safetensors", tensors)
    return directory
