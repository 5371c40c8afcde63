"""The example as a user runs it: what it prints, how it refuses."""

import functools
import math
import re

import pytest

from tests.commands import ROOT, run_here, run_python

EXAMPLE = ROOT / "examples" / "sharded_block.py"


@functools.cache
def printed(*args, run=run_here):
    """The output of a run that must succeed."""
    done = run(EXAMPLE, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def table(output):
    """Rows of the table of leaves: name, dimensions, spec, local shape, bytes."""
    rows = re.findall(
        r"^(\S+) +((?:\w+ )+) *P\((.*?)\) +\(([\d, ]+)\) +([\d,]+)$", output, re.M
    )
    return {
        name: (
            dims.split(),
            spec,
            [int(size) for size in shape.split(",") if size],
            int(num_bytes.replace(",", "")),
        )
        for name, dims, spec, shape, num_bytes in rows
    }


def collective_lines(text):
    return re.findall(r"^ +[a-z-]+ +over .* times +[\d,]+ bytes$", text, re.M)


def check(output):
    """What every run shows."""
    rows = table(output)
    assert len(rows) > 20
    for name, (dims, spec, shape, num_bytes) in rows.items():
        assert len(dims) == len(shape) == len(spec.rstrip(",").split(",")), name
        assert num_bytes == math.prod(shape) * 4, name
    total = re.search(r"^all +([\d,]+)$", output, re.M)
    assert int(total[1].replace(",", "")) == sum(row[3] for row in rows.values())
    logit = re.search(r"difference of a logit (\S+) \(limit 2e-5\)", output)
    gradient = re.search(r"difference of a gradient (\S+) \(limit 1e-4\)", output)
    assert float(logit[1]) <= 2e-5 and float(gradient[1]) <= 1e-4
    ours, plain = re.search(
        r"loss (\S+) nats a byte, (\S+) without a mesh", output
    ).groups()
    assert abs(float(ours) - float(plain)) <= 2e-5
    assert 5 < float(ours) < 7  # log(256) is 5.5: near guessing


@pytest.mark.slow
def test_example_on_eight_devices_splits_everything():
    output = printed(run=run_python)
    check(output)
    assert "'data': 2, 'expert': 2, 'context': 1, 'tensor': 2" in output
    rows = table(output)
    assert rows["embedding"][1:3] == ("'tensor', None", [128, 64])
    assert rows["block.moe.experts.gate_up"] == (
        ["experts", "2", "expert_hidden", "dim"],
        "'expert', None, 'tensor', None",
        [8, 2, 24, 64],
        8 * 2 * 24 * 64 * 4,
    )
    assert rows["block.attention.indexer.query_up"][1] == "None, None, None"
    lines = collective_lines(output)
    kinds = {tuple(re.split(r" over | +\d+ times", line)[:2]) for line in lines}
    kinds = {(kind.strip(), axes.strip()) for kind, axes in kinds}
    assert kinds == {
        ("all-reduce", "data"),
        ("all-reduce", "data x expert"),
        ("all-reduce", "tensor"),
        ("all-gather", "expert"),
        ("all-to-all", "expert"),
    }


@pytest.mark.slow
def test_readme_shows_the_collectives_that_the_example_prints():
    shown = collective_lines((ROOT / "README.md").read_text())
    assert len(shown) == 5
    assert shown == collective_lines(printed(run=run_python))


@pytest.mark.exhaustive
def test_example_on_one_device_sends_nothing():
    output = printed("--data", 1, "--expert", 1, "--tensor", 1, "--layer", 0)
    check(output)
    assert re.search(r"collectives in the compiled .*\n  none\n", output)
    assert collective_lines(output) == []
    assert table(output)["block.moe.experts.gate_up"][2] == [16, 2, 48, 64]
    assert "difference of a gradient 0.0e+00" in output


@pytest.mark.slow
def test_example_runs_another_layer_on_its_own_text_with_64_bit_types(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    path = tmp_path / "of my own.txt"
    path.write_text("Every good boy deserves favour. " * 40)
    output = printed(path, "--data", 1, "--layer", 3, run=run_python)
    check(output)
    assert "'data': 1, 'expert': 2, 'context': 1, 'tensor': 2" in output
    assert "layer 3, of my own.txt" in output
    assert {"data" in line for line in collective_lines(output)} == {False}


def invalid_argument(*args):
    """What a run says that must fail, without a traceback."""
    done = run_here(EXAMPLE, *args)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    return done.stderr


def slow(*args):
    return pytest.param(*args, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--data", 1, "--expert", 1, "--tensor", 3],
            r"does not fit: .*\.embedding has the shape \(256, 64\); the mesh axis "
            r"'tensor' of size 3 does not divide its dimension 'vocab' of size 256"
            r".* --data, --expert and --tensor",
        ),
        slow(["--data", 3, "--expert", 1], r"data x expert = 3 must divide the 8 rows"),
        slow(["--data", 0], r"data=0\): .*at least 1"),
        slow(["--data", -1, "--tensor", -1], r"data=-1\): .*at least 1"),
        slow(["--data", 10**6], r"needs 4000000 devices and there are 8.*--data"),
        slow(["--tensor", "two"], r"--tensor: invalid int value: 'two'"),
        slow(["--tensor", "2.5"], r"--tensor: invalid int value: '2.5'"),
        slow(["--layer", 6], r"--layer: invalid choice: 6 .*0, 1, 2, 3, 4, 5"),
        slow(["--layer", -1], r"--layer: invalid choice: -1"),
        slow(["--context=2"], r"unrecognized arguments: --context=2"),
        slow(["no/such/file"], r"no/such/file cannot be read: No such file"),
        slow([ROOT], r"cannot be read: Is a directory"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_example_says_what_does_not_fit(args, message):
    assert re.search(message, invalid_argument(*args))


def test_example_refuses_a_text_that_is_too_short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 1031)
    assert "short.txt has 1031 bytes; the example needs 1032." in invalid_argument(path)
