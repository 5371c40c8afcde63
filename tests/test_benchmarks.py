"""The benchmark runs and finds that both sides compute the same."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch")
SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks/against_transformers.py"


@pytest.mark.slow
def test_both_sides_compute_the_same():
    command = [sys.executable, str(SCRIPT), "--lengths", "150", "--backward"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, difference, compared = done.stdout.splitlines()[-1].split()
    assert float(difference) <= 5e-5 and int(compared) > 0
