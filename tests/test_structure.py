"""The shape of the code itself: who imports whom, and the limits of the house style."""

import ast
import dataclasses
import pathlib

import equinox as eqx
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dsv4_eqx"
FILES = sorted(PACKAGE.rglob("*.py"))

# What the files of each part may import of ours, besides the files of their own part:
# whatever lies on a lower floor. A part is a file or a folder.
FLOORS = (
    ("chat",),  # text alone
    ("dimensions", "numerics"),
    ("primitives", "kernels"),
    ("config",),
    ("hyper_connection", "attention", "moe"),
    ("model",),
    ("generation", "sharding"),
    ("training",),
    ("plan",),
    ("checkpoint",),
    ("__init__",),
)
MAY_IMPORT = {
    part: tuple(other for below in FLOORS[:floor] for other in below)
    for floor, parts in enumerate(FLOORS)
    for part in parts
}
# Everything else is written for one device. A chat has a context of its own.
MAY_NAME_DEVICES = ("sharding", "checkpoint", "training", "plan", "chat")
OF_DEVICES = set(
    "sharding shard_map Mesh PartitionSpec NamedSharding psum pmean pmax pmin ppermute "
    "psum_scatter all_gather all_to_all ragged_all_to_all axis_index axis_size "
    "with_sharding_constraint reshard pcast".split()
)
# Asks what an array's type says of axes that it does not name.
MAY_READ_TYPES = PACKAGE / "numerics" / "varying.py"
# A kernel asks which of its own program's threads it is; these are Pallas's mesh.
ARE_PROGRAMS = "hopper_"
MESH_AXES = {"data", "expert", "tensor", "context"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 50


def part_of(module):
    """The part of the package that a module (or a name in one) belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_faults(part, source):
    """Imports that break the direction."""
    for module in imports(source):
        ours = module.split(".")[0] == "dsv4_eqx"
        if ours and part_of(module) not in (part, *MAY_IMPORT[part]):
            yield f"{part} imports {module}"


def device_faults(part, source, allowed=()):
    """Meshes, shardings and collectives where the mathematics is."""
    if part in (*MAY_NAME_DEVICES, "__init__"):
        return
    forbidden = OF_DEVICES - set(allowed)
    for module in imports(source):
        if forbidden & set(module.split(".")):
            yield f"imports {module}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in forbidden:
            yield f"uses {node.attr}"
        if isinstance(node, ast.Constant) and node.value in MESH_AXES:
            yield f"names the axis {node.value}"


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def code_lines(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def public_definitions(tree):
    """Classes and functions of a module, and methods of classes, named without `_`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from public_definitions(node)


def style_faults(source):
    """What the house style forbids in a file of the package."""
    tree, lines = ast.parse(source), source.splitlines()
    if len(lines) > MOST_LINES:
        yield f"{len(lines)} lines"
    if lines and not ast.get_docstring(tree):
        yield "no paragraph at the top"
    if "__future__" in imports(source):
        yield "imports from __future__"
    for function in functions(tree):
        if code_lines(function) > MOST_LINES_OF_A_FUNCTION:
            yield f"{function.name} has {code_lines(function)} lines"
    for node in public_definitions(tree):
        if not ast.get_docstring(node):
            yield f"{node.name} has no docstring"


def own_part(path):
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_file_has_its_place_in_the_order():
    assert {own_part(path) for path in FILES} == MAY_IMPORT.keys()


def test_no_two_files_share_a_name():
    names = [path.name for path in FILES if not path.name.startswith("__")]
    assert len(set(names)) == len(names)


def test_few_files_lie_at_the_top():
    assert len([path for path in FILES if path.parent == PACKAGE]) <= 4


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_to_the_house_style(path):
    source = path.read_text()
    assert list(import_faults(own_part(path), source)) == []
    allowed = ["pcast", "sharding"] if path == MAY_READ_TYPES else []
    allowed += ["axis_index", "Mesh"] if path.name.startswith(ARE_PROGRAMS) else []
    assert list(device_faults(own_part(path), source, allowed)) == []
    assert list(style_faults(source)) == []
    assert path.name != "utils.py"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.name
)
def test_example_keeps_to_the_house_style(path):
    faults = [
        fault for fault in style_faults(path.read_text()) if "docstr" not in fault
    ]
    assert faults == []
    assert len(path.read_text().splitlines()) <= 250


def test_public_names_are_exported_as_themselves():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    exported = [node for node in body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in exported if node.module.startswith("dsv4_eqx")]
    assert len(ours) > 20
    for node in ours:
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} as {alias.asname}"


def own_docstring(public):
    """What was written; a dataclass without one is given its signature."""
    text = public.__doc__ or ""
    return "" if text.startswith(f"{public.__name__}(") else text


def test_public_names_have_docstrings():
    import dsv4_eqx

    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    names = {
        alias.name
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dsv4_eqx")
        for alias in node.names
    }
    for name in names - {"DEFAULT_RULES", "DEFAULT_TARGETS", "DIMENSIONS"}:
        assert own_docstring(getattr(dsv4_eqx, name)), name


@pytest.mark.parametrize("base", [object, eqx.Module])
def test_a_class_without_a_docstring_is_found(base):
    class Bare(base):
        size: int

    assert not own_docstring(Bare)
    assert not own_docstring(dataclasses.dataclass(Bare))


# The checks themselves, on sources that break one rule each.


@pytest.mark.parametrize(
    "part, line",
    [
        ("primitives", "from dsv4_eqx.config.config import Config"),
        ("primitives", "import dsv4_eqx"),
        ("primitives", "from dsv4_eqx.kernels.attend import attend"),
        ("config", "from dsv4_eqx.attention.attention import Attention"),
        ("hyper_connection", "from dsv4_eqx.moe.moe import MoE"),
        ("attention", "import dsv4_eqx.moe.moe"),
        ("moe", "from dsv4_eqx import attention"),
        ("model", "def f():\n    from dsv4_eqx.sharding.rules import partition_specs"),
        ("sharding", "from dsv4_eqx.checkpoint.load import from_pretrained"),
        ("plan", "from dsv4_eqx.checkpoint.load import from_pretrained"),
    ],
)
def test_import_in_the_wrong_direction_is_found(part, line):
    assert len(set(import_faults(part, f'"""Text."""\n\n{line}\n'))) >= 1


@pytest.mark.parametrize(
    "part, line",
    [
        ("primitives", "from dsv4_eqx.primitives.norm import RMSNorm"),
        ("moe", "from dsv4_eqx.numerics.product import project"),
        ("sharding", "from dsv4_eqx.model.model import DeepSeekV4"),
        ("model", "import jax.numpy as jnp"),
    ],
)
def test_import_in_the_right_direction_is_none(part, line):
    assert list(import_faults(part, f'"""Text."""\n\n{line}\n')) == []


@pytest.mark.parametrize(
    "line",
    [
        "from jax.sharding import Mesh",
        "import jax.sharding",
        "from jax import sharding",
        "from jax.lax import psum",
        "x = jax.lax.all_gather(x, axis)",
        "f = jax.shard_map(f, mesh=mesh)",
        "x = lax.with_sharding_constraint(x, s)",
        "x = jax.reshard(x, s)",
        "from jax.lax import pcast",
        "x = f(x, axis='tensor')",
    ],
)
def test_device_in_the_mathematics_is_found(line):
    source = f'"""Over the data of a mesh."""\n\n{line}\n'
    assert len(list(device_faults("moe", source))) >= 1
    assert list(device_faults("sharding", source)) == []


def test_mathematics_without_devices_is_clean():
    source = '"""Data."""\nfrom jax import lax\nx = lax.pcast(x, axes, to="varying")\n'
    assert list(device_faults("primitives", source, ["pcast"])) == []
    assert list(device_faults("primitives", source)) == ["uses pcast"]


LONG_BODY = "    x = 1\n" * 50
LONG_DOCSTRING = '    """' + "line\n" * 60 + '"""\n'
STYLE = {
    '"""A."""\n' + "x = 1\n" * 400: ["401 lines"],
    '"""A."""\n' + "x = 1\n" * 399: [],
    "x = 1\n": ["no paragraph at the top"],
    "": [],
    '"""A."""\nfrom __future__ import annotations\n': ["imports from __future__"],
    f'"""A."""\ndef _f():\n{LONG_BODY}': ["_f has 51 lines"],
    f'"""A."""\ndef _f():\n{LONG_DOCSTRING}{LONG_BODY[:-10]}': [],
    '"""A."""\ndef f(): pass\n': ["f has no docstring"],
    '"""A."""\nclass A:\n  """B."""\n  def f(self): pass\n': ["f has no docstring"],
    '"""A."""\nclass A:\n  def __init__(self): pass\n': ["A has no docstring"],
    '"""A."""\ndef f():\n  """B."""\n  def inner(): pass\n': [],
}


@pytest.mark.parametrize("source, faults", STYLE.items())
def test_breach_of_style_is_found(source, faults):
    assert list(style_faults(source)) == faults
