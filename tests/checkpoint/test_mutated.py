"""Checkpoints damaged at random: loaded as what they were, or refused."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.checkpoint.hostile import FORMS
from tests.checkpoint.mutations import check_mutations

ROOT = pathlib.Path(__file__).parents[2]
CHUNK = 150  # of each form, in CI
ALL = 2500
FEW = 15  # of each form, always


pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.mark.parametrize("form", FORMS)
def test_some_mutations(form, tmp_path):
    assert 0 < check_mutations(tmp_path / "checkpoint", form, range(FEW)) < FEW


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, last",
    [(FEW, CHUNK), pytest.param(CHUNK, ALL, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("form", FORMS)
def test_many_mutations(form, first, last):
    """In processes of their own: the tests' type checker triples the time of a load."""
    command = [sys.executable, "-m", "tests.checkpoint.mutations"]
    result = subprocess.run(
        [*command, form, str(first), str(last)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    loaded, word = result.stdout.split()
    assert word == "loaded" and 0 < int(loaded) < last - first
