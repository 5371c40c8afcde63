"""Eight CPU devices, nothing promoted in silence; pyproject.toml adds other checks."""

import gc
import importlib.util
import os
import pathlib
import shutil
import tempfile

import jax
import jaxtyping
import pytest

from tests.compiling import CACHE, compile_once, compile_quickly

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Begun last, they would keep one worker busy while the others wait.
LONG = {
    "test_examples_of_models.py",
    "test_examples_of_training.py",
    "test_sharded_model.py",
    "test_package.py",
    "test_benchmarks.py",
    "test_plan.py",
}
# Without the oracle, only what does not need it is collected.
ORACLE = (
    "torch",
    "from safetensors",
    "tests.captured",
    "tests.reference",
    "tests.attention.test_attention",
    "tests.model.test_block",
)
if importlib.util.find_spec("torch") is None:
    collect_ignore = [
        str(path)
        for path in pathlib.Path(__file__).parent.rglob("test_*.py")
        if any(name in path.read_text() for name in ORACLE)
    ]


def pytest_configure(config):
    """Workers inherit from the process that starts them where programs are kept."""
    compile_quickly()
    if not hasattr(config, "workerinput") and CACHE not in os.environ:
        directory = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
        os.environ[CACHE] = directory
    compile_once(os.environ[CACHE])


def pytest_collection_modifyitems(config, items):
    """Long files first; what is exhaustive is left out where `-m` does not name it."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if "exhaustive" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    """The garbage collector need not look again at all that is imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Programs on CPU hold memory maps, of which Linux allows a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def without_shape_checks():
    """What a user sees who has not asked for the checks of shapes and types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
