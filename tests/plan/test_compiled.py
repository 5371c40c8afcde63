"""Layers of Flash, compiled for devices that are not there, stay within bounds."""

import importlib.util

import pytest

from tests.commands import ROOT, run_python

# Launches, and temporaries in GB of 10**9.
ON_H100 = {
    ("sliding", "forward"): (150, 1.0),
    ("CSA", "forward"): (250, 1.0),
    ("HCA", "forward"): (200, 1.0),
    ("CSA", "forward + backward"): (500, 3.0),
    ("sliding", "decoding"): (150, 0.1),
    ("CSA", "decoding"): (220, 0.1),
    ("HCA", "decoding"): (170, 0.1),
}


def row(target, compiler, kind, what, folder):
    """The benchmark's numbers for one program; skipped without the compiler."""
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"the compiler for {target}, {compiler}, is not installed")
    done = run_python(
        ROOT / "benchmarks/compiled.py",
        *(target, "--layers", kind, "--passes", what, "--output", folder),
        warnings="default",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    names, _, numbers = ([x.strip() for x in line.split("|")] for line in lines)
    return dict(zip(names, numbers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind, what", ON_H100)
def test_launches_and_temporaries_on_a_gpu(kind, what, tmp_path):
    found = row("h100", "jax_cuda13_plugin", kind, what, tmp_path)
    launches, temporaries = ON_H100[kind, what]
    assert int(found["launches"]) <= launches
    assert found["loops of unknown trips"] == "0"
    assert float(found["temporaries, GB"]) <= temporaries


@pytest.mark.slow
def test_temporaries_and_bytes_moved_on_a_tpu(tmp_path):
    found = row("v5p:2x2x1", "libtpu", "CSA", "forward", tmp_path)
    assert float(found["temporaries, GB"]) <= 1.5
    assert float(found["bytes moved, GB"]) <= 27
