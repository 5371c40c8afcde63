"""Machines to compile for have a form of kernels, and rates where they are stated."""

import pytest

from dsv4_eqx.plan.absent import Launches
from dsv4_eqx.plan.compiled import CompiledStep, compiled_report
from dsv4_eqx.plan.machines import is_gpu, machine


@pytest.mark.parametrize(
    "target, form", [("h100", "hopper"), ("h200", "hopper"), ("b200", "gpu")]
)
def test_a_gpu_is_described(target, form):
    found = machine(target)
    assert found.form == form
    assert f'"NVIDIA {target.upper()}"' in found.description
    assert f"memory_bandwidth: {found.bandwidth}" in found.description


def test_a_description_in_a_file_tells_the_form_and_the_memory(tmp_path):
    file = tmp_path / "other.txtpb"
    file.write_text("memory_bandwidth: 5\ncuda_compute_capability { major: 9 }")
    assert machine(str(file)) == ("hopper", None, 5.0, file.read_text())
    file.write_text("cuda_compute_capability { major: 8 minor: 9 }")
    assert machine(str(file)) == ("gpu", None, None, file.read_text())


def test_a_tpu_needs_no_description():
    assert not is_gpu("v5p:2x2x1") and is_gpu("h100")
    assert machine("v5p:2x2x1") == ("tpu", 459e12, 2.77e12, None)
    assert machine("v2:2x2") == ("tpu", None, None, None)


@pytest.mark.parametrize("target", ["a100x", "v5p", "nowhere/gpu.txtpb", ""])
def test_unknown_machine_is_refused(target):
    with pytest.raises(ValueError, match="one of h100, h200, b200, a file, or a TPU"):
        machine(target)


def test_a_report_says_what_the_rates_allow():
    launched = Launches(7, ("loop",))
    step = CompiledStep(30_000_000, 11, 3_523_200, 989e9, None, launched, [])
    lines = list(compiled_report("h100", {"training": step}))
    assert lines[-3] == (
        "a step of training takes at least 1.00 ms to multiply, at 989 TFLOP/s"
    )
    assert lines[-2] == (
        "a step of training takes at least 0.01 ms to read its arguments and write its "
        "results, at 3.35 TB/s"
    )
    assert lines[-1].startswith("a step of training launches 7 kernels, and has 1 loop")


def test_what_nobody_states_is_not_said():
    step = CompiledStep(1, 2, 3, 4.0, 5.0, None, [])
    assert not any(
        "at least" in line for line in compiled_report("v2:2x2", {"decoding": step})
    )
