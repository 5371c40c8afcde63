"""What loading two gigabytes takes and reads: as much as the share, hardly more.

Measured in processes of their own by the benchmark's code, with eight devices and with
two processes that have four each.
"""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "checkpoints.py"
MOST_EXTRA_BYTES = 300e6
MOST_READ = 1.05


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_checkpoints", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def directory(benchmark, tmp_path_factory):
    """Two gigabytes in bfloat16."""
    path = tmp_path_factory.mktemp("checkpoint") / "plain"
    benchmark.write(path, benchmark.config(2.0), False)
    yield path
    for file in path.iterdir():  # pytest keeps its directories
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("devices, processes", [(8, 1), (4, 2)])
def test_peak_memory_and_bytes_read(benchmark, directory, devices, processes):
    seen = benchmark.run(directory, devices=devices, processes=processes)
    assert len(seen) == processes
    whole = (directory / "model.safetensors").stat().st_size
    assert whole > 1.9e9
    for process in seen:
        assert process["share"] > 0.9 * whole / processes
        assert process["peak"] <= process["share"] + MOST_EXTRA_BYTES
        assert process["read"] <= MOST_READ * process["share"]
