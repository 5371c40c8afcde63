"""Eight CPU devices and strict promotion; pyproject.toml adds the other checks."""

import importlib.util
import pathlib

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Without the oracle, only what does not need it is collected.
ORACLE = (
    "torch",
    "from safetensors",
    "tests.captured",
    "tests.reference",
    "tests.model.test_block",
)
if importlib.util.find_spec("torch") is None:
    collect_ignore = [
        str(path)
        for path in pathlib.Path(__file__).parent.rglob("test_*.py")
        if any(name in path.read_text() for name in ORACLE)
    ]


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
