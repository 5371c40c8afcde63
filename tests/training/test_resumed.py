"""A run that is killed at any moment goes on as if it had not been."""

import functools
import json
import random
import socket
import subprocess
import sys
import time

import equinox as eqx
import jax
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.checkpoint.saving import one_layer
from tests.models import QUICKLY, random_model, random_tokens
from tests.sharded import make_mesh
from tests.tiers import tiers

optax = pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")


def start(directory, last):
    command = [sys.executable, "-m", "tests.training.resumed", directory, last]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(process, most=None):
    """What it prints, up to so many lines."""
    found = []
    while most is None or len(found) < most:
        line = process.stdout.readline()
        if not line:
            break
        found.append(json.loads(line))
    return found


def kill_one(directory, last, generator):
    """What a run printed that was killed after a few steps, and its warnings."""
    with start(directory, last) as process:
        found = lines_of(process, generator.randint(1, 4))
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        return found + lines_of(process), process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("kills", tiers([3, 20], in_ci=[3]))
def test_a_killed_run_goes_on_bit_by_bit(kills, tmp_path):
    generator, last = random.Random(0), 4 * kills
    with start(tmp_path / "unbroken", last) as process:
        unbroken = {line["step"]: line for line in lines_of(process)}
        assert process.wait() == 0, process.stderr.read()
    assert unbroken.keys() == set(range(last + 1))
    reached, warned = 0, 0
    for kill in range(kills + 1):
        if kill < kills:
            lines, said = kill_one(tmp_path / "killed", last, generator)
        else:
            with start(tmp_path / "killed", last) as process:
                lines, said = lines_of(process), process.stderr.read()
            assert lines[-1]["step"] == last, said
        warned += "was not finished" in said
        # At most the step whose saving had not ended is done again, or the one after.
        assert lines[0]["step"] >= reached - 2
        for line in lines:
            assert line["digest"] == unbroken[line["step"]]["digest"], line
            if "loss" in line:
                assert line["loss"] == unbroken[line["step"]]["loss"]
        reached = lines[-1]["step"]
    assert warned > 0 or kills < 20


@pytest.mark.slow
def test_two_processes_save_their_parts_and_restore_them(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.members"]
    both = [
        subprocess.Popen(
            [*command, str(index), str(port), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    found = []
    for process in both:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        found.append(json.loads(out.splitlines()[-1]))
    assert [x["part"] for x in found] == [0, 1] and all(x["equal"] for x in found)
    tokens = [token for x in found for token in x["tokens"]]
    assert len(set(tokens)) == 4 and set(tokens) < set(range(1, 8))


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(tmp_path):
    config = one_layer(vocab_size=96, n_routed_experts=6)
    tokens = [random_tokens(i, 12, 6, config) for i in range(3)]
    compiled = functools.partial(jax.jit, compiler_options=QUICKLY)

    def run(mesh, first, last):
        """The losses; saves the state after one step, or goes on from there."""
        model = dsv4.shard(random_model(config), mesh)
        trained, rest = eqx.partition(model, dsv4.trainable(model))
        transformation = optax.adam(1e-2)
        state = trained, transformation.init(trained)
        if first > 0:
            state = checkpoints.restore(state, step=first).state

        @compiled
        def step(state, rest, tokens):
            def loss(trained):
                model = eqx.combine(trained, rest)
                return dsv4.next_token_loss(model, tokens)[0]

            trained, adam = state
            value, gradients = jax.value_and_grad(loss)(trained)
            updates, adam = transformation.update(gradients, adam, trained)
            return (optax.apply_updates(trained, updates), adam), value

        losses = []
        for i in range(first, last):
            state, value = step(state, rest, tokens[i])
            losses.append(float(value))
            if i == 0:
                checkpoints.save(1, state)
        return losses

    with (
        dsv4.TrainingCheckpoints(tmp_path) as checkpoints,
        jax.numpy_dtype_promotion("standard"),  # as optax needs it
    ):
        unbroken = run(make_mesh(expert=2), 0, 3)
        resumed = run(make_mesh(data=3), 1, 3)
    np.testing.assert_allclose(resumed, unbroken[1:], 1e-6)
    assert abs(unbroken[2] - unbroken[1]) > 1e-3
