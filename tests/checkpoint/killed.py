"""Saves two versions of a model in processes that are killed at random moments.

    python -m tests.checkpoint.killed DIRECTORY KILLS

Prints what was seen. The processes are forked, so nothing here may start JAX's backend:
its threads would not be there in them.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
from jax._src import xla_bridge

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.names import sources
from dsv4_eqx.model.model import abstract_model
from tests.checkpoint.saving import contents, one_layer
from tests.models import random_tensors

MOST_FILE_BYTES = 100_000
# How the span of the moments follows the machine: saving takes two thirds of it.
IF_SAVED, IF_NOT = 0.95, 1.03


def numpy_model(seed):
    """What `random_model` gives, without JAX's arrays."""
    tensors = random_tensors(one_layer(), seed)
    model = abstract_model(one_layer(), np.dtype(np.float32))
    leaves = []
    for source, leaf in sources(model, official=True):
        leaves.append(np.empty(leaf.shape, leaf.dtype))
        for index in np.ndindex(source.names.shape):
            part = leaves[-1][(*index, ...)]
            part[...] = tensors[source.names[index]].reshape(part.shape)
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def start_saving(model, target, overwrite):
    """The process, and a pipe that it writes to when the model is saved."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(ours)
            dsv4.save_pretrained(
                model, target, overwrite=overwrite, most_file_bytes=MOST_FILE_BYTES
            )
            os.write(theirs, b"b" if xla_bridge.backends_are_initialized() else b"s")
        finally:
            os._exit(0)
    os.close(theirs)
    return process, ours


def ended(process, pipe):
    """What it wrote."""
    os.waitpid(process, 0)
    written = os.read(pipe, 1)
    os.close(pipe)
    return written


class Trial:
    """Versions, which of them is there, and what has been seen."""

    def __init__(self, directory):
        self.directory = directory
        self.models = [numpy_model(seed) for seed in (0, 1)]
        assert not xla_bridge.backends_are_initialized()
        self.seen = dict(kills=0, acknowledged=0, left_behind=0, faults=[])
        self.seen["backend"] = False
        self.versions, durations = [], []
        for version, model in enumerate(self.models):
            target, start = directory / f"version-{version}", time.monotonic()
            self.seen["backend"] |= ended(*start_saving(model, target, False)) != b"s"
            durations.append(time.monotonic() - start)
            self.versions.append(contents(target))
        self.span = max(durations)  # seconds
        shutil.copytree(directory / "version-0", directory / "model")
        self.seen["current"] = 0

    def kill_one(self, name, version, generator):
        """Whether it had been saved, and which version is there then."""
        is_there = name == "model"
        target = self.directory / name
        process, pipe = start_saving(self.models[version], target, is_there)
        time.sleep(generator.uniform(0, self.span))
        os.kill(process, signal.SIGKILL)
        acknowledged = ended(process, pipe) == b"s"
        self.span *= IF_SAVED if acknowledged else IF_NOT
        self.seen["kills"] += 1
        self.seen["acknowledged"] += acknowledged
        self.clear(name)
        found = contents(target) if target.exists() else None
        if found is not None and found not in self.versions:
            self.seen["faults"].append(f"{name}: is no version: {sorted(found)}")
            return acknowledged, None
        return acknowledged, None if found is None else self.versions.index(found)

    def clear(self, name):
        """Takes away what a killed process left; what it had renamed is put back."""
        for path in self.directory.glob(f".{name}.saving-*"):
            self.seen["left_behind"] += 1
            shutil.rmtree(path)
        for path in self.directory.glob(f".{name}.replaced-*"):
            if (self.directory / name).exists():
                shutil.rmtree(path)
            else:  # killed between two renames
                path.rename(self.directory / name)

    def replace(self, generator):
        """One version by the other."""
        old = self.seen["current"]
        acknowledged, found = self.kill_one("model", 1 - old, generator)
        allowed = (1 - old,) if acknowledged else (0, 1)
        if found not in allowed:
            self.seen["faults"].append(f"model: {found}, not of {allowed}")
        self.seen["current"] = found

    def make(self, generator):
        """A version under a name that is free."""
        acknowledged, found = self.kill_one("fresh", 0, generator)
        if found != 0 and (acknowledged or found is not None):
            self.seen["faults"].append(f"fresh: {found}, acknowledged {acknowledged}")
        shutil.rmtree(self.directory / "fresh", ignore_errors=True)


def main():
    """Kills, and at the end saves both undisturbed."""
    directory, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    generator, trial = random.Random(0), Trial(directory)
    for kill in range(kills):
        (trial.replace if kill % 2 else trial.make)(generator)
        if trial.seen["faults"]:
            break
    for name in ("model", "fresh"):
        version = trial.seen["current"] if name == "model" else 0
        model, target = trial.models[version], directory / name
        assert ended(*start_saving(model, target, True)) == b"s"
    shutil.rmtree(directory / "fresh")
    print(json.dumps(trial.seen))


if __name__ == "__main__":
    main()
