"""The benchmarks run and find that both sides compute the same."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch")
BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def last_row(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_both_sides_compute_the_same():
    row = last_row("against_transformers.py", "--lengths", "150", "--backward")
    *_, difference, compared = row.split()
    assert float(difference) <= 5e-5 and int(compared) > 0


@pytest.mark.slow
def test_both_sides_generate_the_same():
    sizes = "--batches", "2", "--prompt", "9", "--new-tokens", "5"
    assert last_row("decoding.py", *sizes).split()[0] == "2"
