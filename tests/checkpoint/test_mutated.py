"""Ten thousand checkpoints damaged at random: loaded as what they were, or refused."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.checkpoint.hostile import FORMS
from tests.checkpoint.mutations import check_mutations

ROOT = pathlib.Path(__file__).parents[2]
CHUNKS, CHUNK = 8, 1250
FEW = 15  # of each form, always


pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.mark.parametrize("form", FORMS)
def test_some_mutations(form, tmp_path):
    assert 0 < check_mutations(tmp_path / "checkpoint", form, range(FEW)) < FEW


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_ten_thousand_mutations(chunk):
    """In processes of their own: the tests' type checker triples the time of a load."""
    first = FEW + chunk * CHUNK
    form = FORMS[chunk % len(FORMS)]
    command = [sys.executable, "-m", "tests.checkpoint.mutations"]
    result = subprocess.run(
        [*command, form, str(first), str(first + CHUNK)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    loaded, word = result.stdout.split()
    assert word == "loaded" and 0 < int(loaded) < CHUNK
