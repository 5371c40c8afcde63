"""The package as installed: what the README says, what it ships and what it imports."""

import importlib.resources
import re
import tomllib

import pytest

from tests.commands import ROOT, run_python


def blocks_of(page):
    """The Python programs in a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


README = (ROOT / "README.md").read_text()
BLOCKS = blocks_of(ROOT / "README.md")
PROGRAMS = blocks_of(ROOT / "docs" / "programs.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def names_of(requirements):
    return {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements}


# What only tests need: the oracle, its file format, the checker of types.
FOR_TESTS = names_of(EXTRAS["test"] + EXTRAS["check"]) - {"dsv4_eqx"}


def run(script):
    """What a program prints that must succeed."""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Runs a block like an interactive session: what an expression gives is printed.
SESSION = """
import ast
names = {}
for node in ast.parse(BLOCK).body:
    exec(compile(ast.Interactive([node]), "README", "single"), names)
"""


def test_readme_has_an_example_of_each_primitive():
    names = "RMSNorm UnweightedRMSNorm GroupedLinear RotaryEmbedding".split()
    assert (
        len(BLOCKS) == len(names) + 5
    )  # checkpoints, generation, chat, kernels, checks
    for name, block in zip(names, BLOCKS):
        assert f"dsv4.{name}(" in block


def said(block):
    """What the comments of a block's expressions say they give."""
    return re.findall(r"^(?![^#]* = )[^#\n]+  # (.+)$", block, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("", id="plain"),
        pytest.param(BLOCKS[-1], id="shape checks on", marks=pytest.mark.exhaustive),
    ],
)
def test_readme_code_runs_as_it_stands_and_gives_what_it_says(first):
    assert all(len(said(block)) >= 2 for block in BLOCKS[:-1])
    sessions = [SESSION.replace("BLOCK", repr(block)) for block in BLOCKS[:-1]]
    output = run("\n".join([first, *sessions]))
    assert output.splitlines() == [x for block in BLOCKS[:-1] for x in said(block)]


@pytest.mark.slow
def test_short_programs_run_as_they_stand_and_give_what_they_say():
    for program in PROGRAMS:
        assert len([line for line in program.splitlines() if line.strip()]) <= 15
    sessions = [SESSION.replace("BLOCK", repr(program)) for program in PROGRAMS]
    output = run("\n".join(sessions))
    expected = [x for program in PROGRAMS for x in said(program)]
    assert len(expected) == len(PROGRAMS) >= 10
    assert output.splitlines() == expected


@pytest.mark.slow
def test_readme_code_switches_the_shape_checks_on():
    # A wrong dtype is refused before the mathematics sees it, and all else is as ever.
    output = run(
        BLOCKS[-1]
        + """
import jax
import jax.numpy as jnp
import jaxtyping
config = dsv4_eqx.Config.tiny()
call = lambda key, tokens: dsv4_eqx.DeepSeekV4(config, key=key)(tokens)
print(jax.eval_shape(call, jax.random.key(0), jnp.zeros((2, 50), jnp.int32)).shape)
try:
    dsv4_eqx.RMSNorm(5)(jnp.ones(5, jnp.int32))
except jaxtyping.TypeCheckError as error:
    print("refused", type(error).__name__)
"""
    )
    assert output == "(2, 50, 256)\nrefused TypeCheckError\n"


def test_importing_the_package_imports_no_more_than_it_needs():
    loaded = run("import sys, dsv4_eqx; print(*sorted(sys.modules))").split()
    assert {"jax", "equinox", "jaxtyping", "dsv4_eqx.model.model"} <= set(loaded)
    extras = names_of(EXTRAS["train"] + EXTRAS["plot"] + EXTRAS["hf"])
    assert len(FOR_TESTS) >= 6 and (FOR_TESTS | extras) & set(loaded) == set()


def test_importing_the_package_starts_no_backend():
    # So that devices can still be configured afterwards.
    script = """
import dsv4_eqx, jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
jax.config.update("jax_num_cpu_devices", 3)
print(jax.device_count())
"""
    assert run(script) == "3\n"


def test_type_annotations_are_shipped():
    marker = importlib.resources.files("dsv4_eqx").joinpath("py.typed")
    assert marker.is_file()
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["dsv4_eqx"]
    # Hatchling leaves out what git ignores.
    assert "py.typed" not in (ROOT / ".gitignore").read_text()


def test_the_core_does_not_depend_on_what_only_tests_need():
    assert FOR_TESTS & names_of(PROJECT["project"]["dependencies"]) == set()
