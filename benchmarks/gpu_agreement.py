"""Whether a model computes what transformers' does: the part `agreement` of `gpu.py`.

A small model with a layer of each kind, on the same device and with the same weights,
which are such as bfloat16 has. In float32 experts and entries are chosen freely; for
bfloat16, where rounding would choose others, experts are looked up by token and all
entries selected. Errors are relative to transformers' float32.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Final

import equinox as eqx
import gpu_checks
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import KINDS, Case, check_config
from gpu_child import begin_compiling, emit, end_if_fatal, error_text, wanted

from dsv4_eqx import Config, from_state_dict
from dsv4_eqx.config.kinds import HASH_MOE, TOPK_MOE

_WAIT: Final = 100  # seconds, for transformers and then for the compiler


def models(tiny: bool) -> dict[str, tuple[Config, np.ndarray]]:
    """Configurations and tokens, by whether choices are free."""
    config = gpu_checks.tiny_config() if tiny else check_config()
    layer_types, ratios = zip(*KINDS.values())
    config = dataclasses.replace(
        config,
        num_hidden_layers=len(KINDS),
        layer_types=layer_types,
        compress_ratios=ratios,
        mlp_layer_types=(TOPK_MOE,) * len(KINDS),
        num_nextn_predict_layers=0,
    )
    forced = dataclasses.replace(
        config, mlp_layer_types=(HASH_MOE,) * len(KINDS), index_topk=512
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 333))
    ids = ids.astype(np.int32)
    return {"free": (config, ids), "forced": (forced, ids)}


def cases(
    choices: str, config: Config, found: Any, forms: tuple[str, ...]
) -> Iterator[Case]:
    """Logits and the embedding's gradient in each dtype and form."""
    weights = {
        name.removeprefix("weight "): found[name]
        for name in found
        if name.startswith("weight ")
    }
    variants = [("float32", forms[0])]
    if choices == "forced":
        variants += [("bfloat16", form) for form in forms]
    for dtype, form in variants:
        model = from_state_dict(config, weights, dtype=jnp.dtype(dtype))
        arrays, rest = eqx.partition(model, eqx.is_array)
        operands = (arrays, jnp.asarray(found["ids"]), jnp.asarray(found["seed"]))

        def function(arrays, ids, seed, rest=rest):
            model = eqx.combine(arrays, rest)

            def loss(embedding):
                own = eqx.tree_at(lambda model: model.embedding, model, embedding)
                logits = own(ids).astype(jnp.float32)
                return jnp.sum(logits * seed), logits

            gradient, logits = jax.grad(loss, has_aux=True)(model.embedding)
            return logits, gradient

        yield Case(
            dict(choices=choices, dtype=dtype, form=form),
            gpu_checks.precisely(function, dtype),
            lambda kept, operands=operands: operands,
            jax.eval_shape(lambda operands=operands: operands),
            form=form,
        )


def compared(found: Any, logits: Any, gradient: Any) -> dict[str, float]:
    """Columns of a row: how far both are from transformers' in float32."""
    wide = found["logits float32"], found["gradient float32"]
    logits, gradient = (np.asarray(x, dtype=np.float32) for x in (logits, gradient))
    return dict(
        logits=gpu_checks.relative([logits], [wide[0]]),
        largest=float(np.abs(logits - wide[0]).max()),
        gradient=gpu_checks.relative([gradient], [wide[1]]),
    )


def run_theirs(folder: str, args: argparse.Namespace) -> None:
    """transformers' results, in a process that gives the device's memory back."""
    script = pathlib.Path(__file__).parent / "gpu_transformers.py"
    command = [sys.executable, str(script), "--part", "references"]
    command += ["--device", args.device, "--folder", folder] + ["--tiny"] * args.tiny
    done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"gpu_transformers.py: {done.stderr.strip()[-250:]}")


def agreement(args: argparse.Namespace) -> None:
    """transformers' bfloat16 and ours, against transformers' float32."""
    emit(begin="transformers")
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_theirs(folder, args)
        except Exception as error:
            return emit(case="transformers", error=error_text(error))
        every, found = [], {}
        for choices, (config, _) in models(args.tiny).items():
            with np.load(pathlib.Path(folder) / f"{choices}.npz") as file:
                found[choices] = dict(file)
            every += cases(choices, config, found[choices], args.forms)
    own = found["forced"]
    row = compared(own, own["logits bfloat16"], own["gradient bfloat16"])
    columns = dict(choices="forced", dtype="bfloat16", form="transformers")
    emit(case="transformers", **columns, **row)
    every = [case for case in every if wanted(case.columns, args)]
    programs = begin_compiling(every)
    for case in every:
        emit(begin=case.name)
        try:
            program, _ = programs.pop(case.name).result(timeout=_WAIT)
            out = program(*case.make({}))
            row = compared(found[case.columns["choices"]], *out)
        except TimeoutError:
            row = dict(error="not compiled in time")
        except Exception as error:
            row = dict(error=error_text(error))
        emit(case=case.name, **case.columns, **row)
        end_if_fatal(str(row.get("error", "")))
