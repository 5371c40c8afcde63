"""transformers' DeepSeek-V4 on the same GPU: the part `transformers` of `gpu.py`.

One decoder layer of each kind at the sizes of Flash in bfloat16, with random weights
made on the device, and the fastest settings that transformers has: experts through
torch's grouped product; attention is eager, for there is no other with sinks and heads
of 512 channels; float32 products may take TF32, as XLA's do. What a model computes once
for all layers, rotations and the window's mask, is not timed.

It also writes what a small model of all kinds computes, for `gpu_checks.py` to compare
with. No JAX runs in this process: the GPU's memory is torch's.
"""

import argparse
import gc
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch

# The oracle is in `tests`, beside this folder, wherever the command is given.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from gpu_cases import KINDS, PASSES, Sizes, layer_flops, name_of, one_layer
from gpu_child import arguments, ceilings, emit, error_text, wanted
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4

from dsv4_eqx import Config
from tests.reference import reference_config, reference_model

_ENOUGH: Final = 2.0  # seconds of timed calls
_TOO_MUCH: Final = 8.0  # after which fewer calls must do


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if args.device == "gpu" else "cpu")


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def decoder_layer(config: Config, device: torch.device) -> tuple[Any, Any]:
    """A layer and its rotary embedding; only matrices are in half precision."""
    theirs = reference_config(config)
    theirs._experts_implementation = "grouped_mm"
    torch.set_default_dtype(dtype_of(device))
    with device:
        layer = deepseek_v4.DeepseekV4DecoderLayer(theirs, 0)
        rotary = deepseek_v4.DeepseekV4RotaryEmbedding(theirs)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, config.initializer_range)
            elif name.endswith(("sinks", "base")):
                parameter.zero_()
            else:
                parameter.fill_(1)
    return layer.eval(), rotary


def inputs(config: Config, rotary: Any, tokens: int, device: torch.device) -> tuple:
    """Streams, the output's gradient, and the rest of what the layer takes."""
    dtype = dtype_of(device)
    with device:
        shape = (1, tokens, config.hc_mult, config.hidden_size)
        streams = torch.randn(shape, dtype=dtype)
        seed = torch.randn(shape, dtype=dtype)
        positions = torch.arange(tokens)[None]
        before = positions.mT - positions  # of each key before each query
        hidden = (before < 0) | (before >= config.sliding_window)
        mask = torch.zeros((1, 1, tokens, tokens), dtype=dtype)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
    rotations = {
        name: rotary(streams, position_ids=positions, layer_type=name)
        for name in ("main", "compress")
    }
    rest = dict(
        input_ids=positions % config.vocab_size,
        position_embeddings=rotations,
        position_ids=positions,
        attention_mask=mask,
    )
    return streams, seed, rest


def passes(layer: Any, streams: Any, seed: Any, rest: dict) -> Iterator[Callable]:
    """Forward alone, and with the gradients of streams and weights."""

    @torch.no_grad()
    def forward():
        return layer(streams, **rest)

    def backward():
        layer.zero_grad(set_to_none=True)
        streams.grad = None
        layer(streams.requires_grad_(), **rest).backward(seed)

    yield forward
    yield backward


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Median of calls that each wait for the device."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        timed()
    taken: list[float] = []
    while len(taken) < 5 or (sum(taken) < _ENOUGH and len(taken) < 30):
        taken.append(timed())
        if len(taken) >= 2 and sum(taken) > _TOO_MUCH:
            break
    return statistics.median(taken)


def measured(
    run: Callable[[], Any], flops: float, floor: float, device: torch.device
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(run, device)
    row = dict(ms=1e3 * seconds)
    if device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row | dict(
        TFLOPs=flops / seconds / 1e12, floor_ms=1e3 * floor, share=floor / seconds
    )


def time_layer(
    kind: str, tokens: int, wants: list[dict], made: tuple, args: argparse.Namespace
) -> None:
    """The passes of one layer over one sequence; what fails is a row too."""
    config, layer, rotary = made
    device, rates = device_of(args), ceilings(args)
    flops = layer_flops(config, kind, tokens)
    weights = sum(p.nbytes for p in layer.parameters())
    streams, seed, rest = inputs(config, rotary, tokens, device)
    for index, run in enumerate(passes(layer, streams, seed, rest)):
        row: dict[str, Any] = columns_of(kind, tokens, index)
        if row not in wants:
            continue
        emit(begin=name_of(row))
        row = dict(case=name_of(row)) | row
        moved = (1, 3)[index] * weights + (2, 4)[index] * streams.nbytes
        floor = max(moved / rates[0], flops[index] / rates[1])
        try:
            row |= measured(run, flops[index], floor, device)
        except RuntimeError as error:  # torch's own, for want of memory too
            row["error"] = error_text(error)
        emit(**row)
        failed = row.get("error", "")
        if "CUDA error" in failed and "memory" not in failed:
            os._exit(3)  # the device may be of no more use to this process
        layer.zero_grad(set_to_none=True)
        streams.grad = None
        free()


def columns_of(kind: str, tokens: int, index: int) -> dict[str, Any]:
    return dict(kind=kind, tokens=tokens, pass_=PASSES[index], form="transformers")


def layers(args: argparse.Namespace) -> None:
    """A layer of each kind, forward and forward + backward."""
    torch.set_float32_matmul_precision("high")
    device = device_of(args)
    sizes = Sizes.tiny() if args.tiny else Sizes.flash()
    for kind in KINDS:
        wants = [
            columns
            for tokens in sizes.lengths
            for index in range(len(PASSES))
            if wanted(columns := columns_of(kind, tokens, index), args)
        ]
        if not wants:
            continue
        config = one_layer(sizes.config, kind)
        made = (config, *decoder_layer(config, device))
        for tokens in dict.fromkeys(columns["tokens"] for columns in wants):
            time_layer(kind, tokens, wants, made, args)
        del made
        free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halve(model: Any) -> None:
    """Matrices to half precision; the rest stays float32, as in transformers."""
    wide = deepseek_v4.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict
    for name, parameter in model.named_parameters():
        if not any(part in wide for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()


def write_reference(config: Config, ids: np.ndarray, path: pathlib.Path, device: Any):
    """Weights, logits and the embedding's gradient, of float32 and of bfloat16.

    The weights are such as bfloat16 has.
    """
    torch.set_float32_matmul_precision("highest")
    model = reference_model(config)
    halve(model)
    state = {k: v.detach() for k, v in model.float().state_dict().items()}
    found = {f"weight {name}": value.numpy().copy() for name, value in state.items()}
    seed = torch.randn((*ids.shape, config.vocab_size), dtype=torch.float32)
    found |= dict(ids=ids, seed=seed.numpy())
    tokens = torch.tensor(ids).long().to(device)
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16":
            halve(model)
        model.to(device).zero_grad(set_to_none=True)
        grouped = dtype == "bfloat16"
        model.config._experts_implementation = "grouped_mm" if grouped else "eager"
        logits = model(tokens, use_cache=False).logits.float()
        (logits * seed.to(device)).sum().backward()
        gradient = model.get_input_embeddings().weight.grad.float()
        found[f"logits {dtype}"] = logits.detach().cpu().numpy()
        found[f"gradient {dtype}"] = gradient.cpu().numpy()
    np.savez(path, **found)


def references(args: argparse.Namespace) -> None:
    """What `gpu_agreement.py` compares with, in the folder that it names."""
    from gpu_agreement import models

    for name, (config, ids) in models(args.tiny).items():
        path = pathlib.Path(args.folder) / f"{name}.npz"
        write_reference(config, ids, path, device_of(args))


if __name__ == "__main__":
    given = arguments()
    references(given) if given.part == "references" else layers(given)
