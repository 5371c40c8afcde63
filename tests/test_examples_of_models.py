"""The examples that load a checkpoint and continue a text, as a user runs them."""

import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.checkpoint.saving import one_layer
from tests.commands import ROOT, run_here, run_python
from tests.models import random_tensors
from tests.official import write_release
from tests.tiers import tiers

NANO = ROOT / "tests" / "data" / "nano-release"


def run(example, *args, run=run_python):
    return run(ROOT / "examples" / example, *args)


def assert_went_well(done):
    """It may show its progress, which it does where it has to wait."""
    warnings = [line for line in re.split(r"[\r\n]", done.stderr) if "%|" not in line]
    assert done.returncode == 0 and not "".join(warnings), done.stderr


@pytest.mark.slow
def test_example_predicts_over_a_mesh_from_packed_weights():
    mesh = "expert=2,tensor=2"
    done = run("load_checkpoint.py", NANO, "--mesh", mesh, "--keep-quantized")
    assert_went_well(done)
    assert "2,571,976 bytes on each of 4 devices" in done.stdout
    shown = re.findall(r"^ +([\d.]+)%  '", done.stdout, re.MULTILINE)
    assert len(shown) == 5
    assert [float(x) for x in shown] == sorted(map(float, shown), reverse=True)


@pytest.mark.parametrize("example", ["load_checkpoint.py", "generate.py"])
def test_example_says_what_is_wrong_without_a_traceback(example, tmp_path):
    done = run(example, tmp_path, run=run_here)
    assert done.returncode == 1 and done.stdout == ""
    assert re.match(rf"{example}: .*config.json", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, wrong",
    [("Größe", r"token id 195 at \[0, 2\]"), ("", "neither empty")],
)
def test_example_refuses_texts_that_are_no_tokens_of_the_model(text, wrong, tmp_path):
    arguments = (release_of_one_layer(tmp_path), "--text", text, "--bytes")
    done = run("load_checkpoint.py", *arguments, run=run_here)
    assert done.returncode == 1
    assert re.match(f"load_checkpoint.py: .*{wrong}", done.stderr), done.stderr


@pytest.mark.slow
def test_example_runs_the_whole_model_over_a_mesh():
    sizes = "--mesh data=2 --fsdp --steps 2 --layers 1".split()
    done = run("sharded_model.py", *sizes)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "continued alike: True" in done.stdout
    losses = re.findall(r"loss ([\d.]+) nats", done.stdout)
    assert len(losses) == 4 and float(losses[1]) < float(losses[0]) < 6
    whole, held = re.search(
        r"([\d,]+) bytes of.* ([\d,]+) on each", done.stdout
    ).groups()
    whole, held = (int(x.replace(",", "")) for x in (whole, held))
    assert whole / 2 < held < 0.55 * whole  # what has few elements is on both
    assert re.search(r"reduce-scatter +over data ", done.stdout)


@pytest.mark.parametrize(
    "mesh, wrong", [("tensor=3", "does not divide"), ("model=2", "no axis and size")]
)
def test_example_of_the_whole_model_says_what_does_not_fit(mesh, wrong, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda devices=jax.devices(): devices[:3])
    done = run("sharded_model.py", "--mesh", mesh, run=run_here)
    assert done.returncode == 1 and re.match(
        rf"sharded_model.py: .*{wrong}", done.stderr
    )


MESHES = [
    "expert=2 --layers 1",
    "data=2,expert=2 --fsdp --layers 2",
    "data=2,context=2 --fsdp",
]


@pytest.mark.parametrize("mesh", tiers(MESHES, in_ci=MESHES[:1]))
def test_example_of_several_processes_agrees_with_one(mesh):
    done = run("multi_process.py", "--steps", 1, "--mesh", *mesh.split())
    assert done.returncode == 0, done.stderr
    assert "they agree" in done.stdout
    size = int(re.search(r"([\d,]+) bytes in tiny", done.stdout)[1].replace(",", ""))
    found = re.findall(r"process (\d): [12] devices, read ([\d,]+) bytes", done.stdout)
    assert sorted(index for index, _ in found) == ["0", "1"]
    for _, read in found:  # half of the experts, which are a third, or of almost all
        assert 0 < int(read.replace(",", "")) < 0.85 * size


@pytest.mark.slow
def test_example_of_several_processes_leaves_none_when_it_is_killed():
    example = str(ROOT / "examples" / "multi_process.py")
    command = [sys.executable, example, str(NANO)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        found = {}
        while len(found) < 2:
            line = running.stdout.readline()
            assert line, found
            if match := re.search(r"process (\d) is pid (\d+)", line):
                found[match[1]] = int(match[2])
        running.kill()
    give_up = time.monotonic() + 30
    while any(map(is_running, found.values())):
        assert time.monotonic() < give_up, found
        time.sleep(0.2)


def is_running(pid):
    """Whether a process does anything yet; a zombie does not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "option, wrong",
    [("--processes=3", "4 devices over 3"), ("--steps=0", "a step or more")],
)
def test_example_of_several_processes_says_what_does_not_fit(option, wrong):
    done = run("multi_process.py", option)
    assert done.returncode == 1
    assert re.match(rf"multi_process.py: .*{wrong}", done.stderr)


def release_of_one_layer(directory):
    """Its tokens are the bytes of plain English."""
    config = one_layer(vocab_size=150)
    return write_release(directory, config, random_tensors(config))


@pytest.mark.slow
def test_example_continues_a_text(tmp_path):
    directory = release_of_one_layer(tmp_path)
    arguments = ["--dtype", "float32", "--prompt", "One, two,", "--max-new-tokens", 5]
    done = run("generate.py", directory, "--bytes", *arguments)
    assert_went_well(done)
    model = dsv4.from_pretrained(directory, dtype=np.float32)
    tokenizer = dsv4.ByteTokenizer()
    prompt = tokenizer.encode("One, two,")[None]
    out = dsv4.generate(model, prompt, max_new_tokens=5)
    assert done.stdout.startswith("One, two," + tokenizer.decode(out.tokens[0]))
    assert "5 tokens, " in done.stdout


@pytest.mark.slow
def test_example_continues_a_text_with_drafts():
    arguments = ["--dtype", "float32", "--prompt", "One, two,", "--max-new-tokens", 9]
    arguments += ["--bytes", "--speculative"]
    done = run("generate.py", NANO, *arguments, run=run_here)
    assert_went_well(done)
    tokenizer = dsv4.ByteTokenizer()
    stream = dsv4.generate_stream(
        dsv4.from_pretrained(NANO, dtype=np.float32),
        tokenizer.encode("One, two,")[None],
        max_new_tokens=9,
        speculative=True,
    )
    tokens = np.array([int(token) for (token,) in stream])
    assert done.stdout.startswith("One, two," + tokenizer.decode(tokens))
    drafts = f"{stream.num_accepted.sum()} of {stream.num_drafted.sum()} drafts stayed"
    assert "9 tokens, " in done.stdout and drafts in done.stdout


def test_example_says_that_drafts_need_a_prediction_block(tmp_path):
    arguments = (
        release_of_one_layer(tmp_path),
        "--prompt",
        "!",
        "--speculative",
        "--bytes",
    )
    done = run("generate.py", *arguments, run=run_here)
    assert done.returncode == 1
    wrong = "generate.py: generate_stream(speculative=True): the model has 0 prediction"
    assert done.stderr.startswith(wrong), done.stderr


@pytest.mark.slow
def test_example_trains_a_model_of_ones_own_over_a_mesh():
    pytest.importorskip("optax")
    done = run("own_model.py")
    assert_went_well(done)
    losses = re.findall(r"^step \d+: ([\d.]+) nats", done.stdout, re.MULTILINE)
    losses = [float(loss) for loss in losses]
    assert len(losses) == 20 and 5 < losses[0] < 7  # log(256) is 5.5: near guessing
    assert losses[-1] < losses[0] - 1
