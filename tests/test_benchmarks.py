"""The benchmarks run and find that both sides compute the same."""

import pytest

from tests.commands import ROOT, run_python

pytest.importorskip("torch")


def last_row(script, *arguments):
    done = run_python(ROOT / "benchmarks" / script, *arguments, warnings="default")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_both_sides_compute_the_same():
    row = last_row("against_transformers.py", "--lengths", "150")
    *_, difference, compared = row.split()
    assert float(difference) <= 5e-5 and int(compared) > 0


@pytest.mark.exhaustive
def test_both_sides_generate_the_same():
    sizes = "--batches", "2", "--prompt", "9", "--new-tokens", "5", "--units", "1"
    assert last_row("decoding.py", *sizes).split()[0] == "2"


@pytest.mark.exhaustive
def test_memory_of_a_prompt_is_about_what_is_predicted():
    sizes = "--contexts", "40", "--steps", "2", "--prompts", "1024"
    length, _, _, cache, predicted, peak = last_row("contexts.py", *sizes).split()
    assert length == "1,024" and float(cache) > 0
    assert 0.5 < float(peak) / float(predicted) < 2
