"""What `pretrain.py` and `finetune.py` share: their options, data and loop.

The loop saves at intervals, at the end and on ctrl-C, and goes on with `--resume` as if
it had not been interrupted. It is for one process; `multi_process.py` shows several.
"""

import argparse
import itertools
import math
import pathlib
import shlex
import signal
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from training_log import TrainingLog, bigram_nats, draw, peak_flops

import dsv4_eqx as dsv4
from dsv4_eqx.sharding.mesh import mesh_sizes

HELD_OUT = 10  # one document of so many is not trained on


def parser_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that both have."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--texts", type=pathlib.Path, nargs="+", help="files, directories, .jsonl")
    add("--out", type=pathlib.Path, help="directory of the run")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--mesh", help="axes and sizes, as data=2,expert=4")
    add("--fsdp", action="store_true", help="split weights over data, too")
    add("--steps", type=int, help="of the optimizer, in all")
    add("--batch", type=int, help="rows at a time, over the whole mesh")
    add("--accumulate", type=int, help="so many times before a step")
    add("--length", type=int, help="tokens of a row")
    add("--learning-rate", type=float)
    add("--seed", type=int)
    add("--save-every", type=int, help="steps")
    add("--evaluate-every", type=int, help="steps")
    add("--held-out-rows", type=int, help="the most that are evaluated")
    add("--peak-tflops", type=float, help="of a device, for MFU; known for some")
    common = dict(accumulate=1, seed=0, save_every=100, evaluate_every=50)
    parser.set_defaults(**common | dict(held_out_rows=32) | defaults)
    return parser


def validate(asked: argparse.Namespace) -> None:
    """Refuses numbers below 1."""
    names = "steps batch accumulate length save_every evaluate_every held_out_rows"
    for name in names.split():
        if getattr(asked, name) < 1:
            option = f"--{name.replace('_', '-')} {getattr(asked, name)}"
            raise ValueError(f"{option}: must be at least 1")


def open_mesh(text: str | None) -> Any:
    """The mesh, over as many devices as it needs; CPU devices if need be."""
    if text is None:
        return None
    sizes = mesh_sizes(text)
    needed = math.prod(sizes.values())
    jax.config.update("jax_num_cpu_devices", needed)
    return dsv4.make_mesh(**sizes, devices=jax.devices()[:needed])


def split_documents(documents: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those to train on, and every tenth to try; of few, the last tenth of each."""
    if len(documents) >= HELD_OUT:
        unseen = documents[::HELD_OUT]
        return [x for i, x in enumerate(documents) if i % HELD_OUT], unseen
    ends = [len(x.tokens) - len(x.tokens) // HELD_OUT for x in documents]
    cut = [tuple(part[:end] for part in x) for x, end in zip(documents, ends)]
    return cut, [tuple(part[end:] for part in x) for x, end in zip(documents, ends)]


def accumulated(losses: Any, trained: Any, rest: Any, batch: Any) -> Any:
    """Gradients and values of all microbatches, as means over all targets.

    `losses(trained, rest, microbatch)` gives the loss, and with it the number of
    targets, values to show, and counts to add up.
    """

    def weighted(microbatch: Any) -> Any:
        gradient = jax.value_and_grad(losses, has_aux=True)
        (_, (weight, seen, counts)), gradients = gradient(trained, rest, microbatch)
        weight = weight.astype(jnp.float32)
        means = jax.tree.map(lambda x: weight.astype(x.dtype) * x, (gradients, seen))
        return means, weight, counts

    def add(total: Any, microbatch: Any) -> Any:
        return jax.tree.map(jnp.add, total, weighted(microbatch)), None

    shapes = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (sums, weight, counts), _ = jax.lax.scan(add, zeros, batch)
    weight = jnp.maximum(weight, 1)
    gradients, seen = jax.tree.map(lambda x: x / weight.astype(x.dtype), sums)
    return gradients, seen, counts


@eqx.filter_jit
def evaluate(model: Any, batch: Any) -> Any:
    """The nats of all targets together, and how many there are."""
    loss, parts = dsv4.next_token_loss(model, *batch)
    return loss * parts.num_targets.astype(loss.dtype), parts.num_targets


def mean_nats(model: Any, batches: list[Any]) -> float:
    """The mean over the targets of several batches."""
    totals = [evaluate(model, batch) for batch in batches]
    nats, targets = (sum(map(float, part)) for part in zip(*totals))
    return nats / max(targets, 1)


def changing(state: Any, marks: Any) -> Any:
    """What the steps change of model and optimizer; the rest need not be saved."""
    model, optimizer = state
    return model if marks is None else eqx.filter(model, marks), optimizer


def resumed(asked: Any, checkpoints: Any, state: Any, marks: Any, batches: Any) -> Any:
    """The state to go on from, and how many steps it has done."""
    if asked.resume:
        found = checkpoints.restore(changing(state, marks))
        if found is None:
            raise ValueError(f"--resume: there is no checkpoint in {asked.out}")
        batches.set_state(found.data)
        changed, optimizer = found.state
        return (eqx.combine(changed, state[0]), optimizer), found.step
    if checkpoints.steps:
        raise ValueError(f"{asked.out} has a run: give --resume or another --out")
    return state, 0


def seen_of(parts: Any) -> dict[str, Any]:
    """What the log shows of a `next_token_loss`."""
    seen = {"next_token": parts.next_token}
    return seen if parts.ahead is None else seen | {"ahead": parts.ahead}


def save_model(asked: Any, model: Any, tokenizer: Any) -> None:
    """Writes the whole model, in place of one of a former run."""
    target = asked.out / "model"
    dsv4.save_pretrained(model, target, tokenizer=tokenizer, overwrite=True)
    print(f"the model is in {target}")


def run(main: Any) -> None:
    """Calls `main`; what is wrong with what was asked is said in a line."""
    try:
        main()
    except (ValueError, ImportError, OSError, OverflowError) as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")


def train(
    asked: Any,
    documents: list[Any],
    model: Any,
    optimizer: Any,
    step: Any,
    schedule: Any,
    marks: Any = None,
) -> Any:
    """Trains as asked; the model, or None if it was interrupted.

    `step(model, optimizer, batch)` gives both anew, and values for the log; the batch
    has a leading dimension of microbatches. `optimizer` is its state, `schedule` its
    learning rate. `marks` tell what the steps change of the model: None for all.
    """
    seen, unseen = split_documents(documents)
    rows, unseen_rows = (dsv4.pack_documents(x, asked.length) for x in (seen, unseen))
    print(f"trained on: {rows.statistics}\nheld out: {unseen_rows.statistics}")
    batches = dsv4.PackedBatches(rows, asked.accumulate * asked.batch, seed=asked.seed)
    trial = dsv4.PackedBatches(unseen_rows, asked.batch, num_epochs=1)
    trial = [*itertools.islice(trial, max(1, asked.held_out_rows // asked.batch))]
    bigram = bigram_nats(seen, trial, model.config.vocab_size)
    stop = StopSignal()
    # The backward pass costs twice as much; as is usual, recomputing does not count.
    flops = 3 * dsv4.flops_per_token(model.config, asked.length)
    with dsv4.TrainingCheckpoints(asked.out / "checkpoints") as checkpoints:
        state = model, optimizer
        state, first = resumed(asked, checkpoints, state, marks, batches)
        peak = peak_flops(asked.peak_tflops)
        with TrainingLog(asked.out, first, asked.steps, flops, peak) as log, stop:
            for number in range(first + 1, asked.steps + 1):
                batch, is_last = next(batches), number == asked.steps
                num_tokens = (batch.segment_ids >= 0).sum()
                shape = asked.accumulate, asked.batch, asked.length
                batch = jax.tree.map(lambda x: x.reshape(shape), batch)
                *state, values = step(*state, batch)
                rate = {"learning_rate": schedule(number - 1)}
                log.step(number, values | rate, num_tokens)
                if is_last or number % asked.evaluate_every == 0:
                    log.held_out(number, mean_nats(state[0], trial))
                if is_last or stop.came or number % asked.save_every == 0:
                    kept = changing(state, marks)
                    checkpoints.save(number, kept, batches.get_state())
                if stop.came and not is_last:
                    break
    print(draw(asked.out, bigram))
    if stop.came:
        command = [*sys.argv, *["--resume"] * (not asked.resume)]
        print(f"saved; go on with\n  python {shlex.join(command)}")
        return None
    tell(mean_nats(state[0], trial), bigram)
    return state[0]


def tell(held_out: float, bigram: float | None) -> None:
    """What the trained model reaches on what it has not seen."""
    compared = "" if bigram is None else f"; a bigram model: {bigram:.3f}"
    print(f"held out: {held_out:.3f} nats a token{compared}")


class StopSignal:
    """Whether ctrl-C was pressed, or the process told to end; the second time ends."""

    came = False

    def __enter__(self) -> None:
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {x: signal.signal(x, self._note) for x in signals}

    def __exit__(self, *_: Any) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _note(self, *_: Any) -> None:
        self.came = True
        print("\nstops after this step and saves; again: at once", file=sys.stderr)
        self.__exit__()
