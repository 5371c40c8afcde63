"""Plans against compiled programs on eight devices, and the command."""

import collections
import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.plan.__main__ import main
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.plan.live import peak_bytes
from dsv4_eqx.plan.plan import abstract_sharded
from dsv4_eqx.plan.programs import decoding_step, program_of, training_step
from dsv4_eqx.plan.sent import Sent, on_the_wire, sent
from dsv4_eqx.sharding.mesh import AXES
from tests.models import QUICKLY
from tests.sharded import make_mesh
from tests.tiers import tiers

# No layer is scanned: a compiled program does not say how often a loop runs.
CONFIG = dataclasses.replace(
    dsv4.Config.tiny(),
    num_hidden_layers=2,
    layer_types=(HCA, CSA),
    compress_ratios=(8, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE),
    hc_sinkhorn_iters=2,
    num_nextn_predict_layers=0,
)
# The layer that has everything.
LAYER = dataclasses.replace(
    CONFIG,
    num_hidden_layers=1,
    layer_types=(CSA,),
    compress_ratios=(4,),
    mlp_layer_types=(HASH_MOE,),
)
BATCH, SEQ = 8, 48
# On CPU, XLA drops what keeps recomputed values apart before it merges equal ones, and
# with it the second gathering of weights in layers outside of the scan.
COMPILER_OPTIONS = QUICKLY | {"xla_disable_hlo_passes": "cse_barrier_expander"}
# Bytes of single numbers: the mean over the tokens of all devices, which no wrapper
# takes, and how many rounds experts need, which XLA may take over fewer axes.
SINGLE = 64


def forward(model, tokens):
    return model(tokens)


def split_sizes(sizes):
    """Sizes of all axes, and whether weights are split over data."""
    sizes = dict(sizes)
    fsdp = sizes.pop("fsdp", False)
    return {axis: sizes.get(axis, 1) for axis in AXES}, fsdp


def calls(model, mesh, real):
    """Steps and their arguments; on a real mesh arrays are placed as inputs are."""
    batch = tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1)
    context = "context" if mesh.shape["context"] > 1 else None

    def ids(shape, spec):
        sharding = NamedSharding(mesh, spec) if real else None
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    tokens = ids((BATCH, SEQ), P(batch or None, context))
    newest = ids((BATCH, 1), P(batch or None))
    return {
        "forward": (forward, model, tokens),
        "training": (training_step, model, tokens, tokens),
        "decoding": (decoding_step, model, newest, model.init_cache(BATCH, 64)),
    }


@functools.cache
def planned(config, mesh, step):
    sizes, fsdp = split_sizes(mesh)
    model = abstract_sharded(config, sizes, fsdp=fsdp, dtype=jnp.float32)
    return program_of(*calls(model, model.mesh, real=False)[step]), sizes


@functools.cache
def compiled(config, mesh, step):
    sizes, fsdp = split_sizes(mesh)
    real = make_mesh(**sizes)
    model = dsv4.shard(abstract_model(config, jnp.float32), real, fsdp=fsdp)
    function, *args = calls(model, real, real=True)[step]
    jitted = jax.jit(function, compiler_options=COMPILER_OPTIONS)
    return jitted.lower(*args).compile(), real


def mesh(**sizes):
    return tuple(sizes.items())


QUICK = [
    (CONFIG, mesh(data=2, expert=2, tensor=2, fsdp=True), "forward"),
    (CONFIG, mesh(context=2, tensor=2), "decoding"),
]
IN_CI = [
    (LAYER, mesh(data=2, expert=2, tensor=2, fsdp=True), "training"),
    (LAYER, mesh(expert=2, context=2, tensor=2), "training"),
    (LAYER, mesh(expert=8), "decoding"),
]
MORE = [
    (CONFIG, mesh(data=2, expert=2, tensor=2, fsdp=True), "training"),
    (CONFIG, mesh(expert=2, context=2, tensor=2), "training"),
    (CONFIG, mesh(data=8, fsdp=True), "training"),
    (CONFIG, mesh(data=8), "training"),
    (CONFIG, mesh(expert=4), "training"),
    (CONFIG, mesh(context=4), "training"),
    (CONFIG, mesh(tensor=4), "training"),
    (CONFIG, mesh(data=2, context=2, tensor=2, fsdp=True), "forward"),
    (CONFIG, mesh(data=2, expert=2, tensor=2, fsdp=True), "decoding"),
    (CONFIG, mesh(expert=8), "decoding"),
]
CASES = tiers([*QUICK, *IN_CI, *MORE], quick=QUICK, in_ci=IN_CI)


def name_of(value):
    if isinstance(value, str):
        return value
    if isinstance(value, dsv4.Config):
        return f"{value.num_hidden_layers}-layers"
    return "-".join(f"{axis}{size}" for axis, size in value)


@pytest.mark.parametrize("config, mesh, step", CASES, ids=name_of)
def test_a_plan_sends_what_the_compiled_program_sends(config, mesh, step):
    program, sizes = planned(config, mesh, step)
    wanted, found = collections.Counter(), collections.Counter()
    for item in sent(program, sizes):
        # In the program are further rounds between experts too, which may not run.
        wanted[item.kind, item.axes] += item.num_bytes * max(item.times, 1)
    executable, real = compiled(config, mesh, step)
    for item in collectives(executable, real):
        found[item.kind, item.axes] += item.num_bytes
    for key in wanted | found:
        assert abs(found[key] - wanted[key]) <= 0.02 * wanted[key] + SINGLE, key
    total = wanted.total()
    assert total > 0 and abs(found.total() - total) <= 0.02 * total


@pytest.mark.parametrize("config, mesh, step", CASES, ids=name_of)
def test_an_estimate_of_activations_is_near_what_is_allocated(config, mesh, step):
    program, _ = planned(config, mesh, step)
    executable, _ = compiled(config, mesh, step)
    allocated = executable.memory_analysis().temp_size_in_bytes
    assert 0.3 * allocated <= peak_bytes(program) <= 2 * allocated


def test_a_scan_counts_as_often_as_it_runs_and_a_branch_at_most():
    three = dataclasses.replace(
        LAYER,
        num_hidden_layers=3,
        layer_types=(CSA,) * 3,
        compress_ratios=(4,) * 3,
        mlp_layer_types=(TOPK_MOE,) * 3,
    )
    one = dataclasses.replace(LAYER, mlp_layer_types=(TOPK_MOE,))

    def of(config, sizes):
        model = abstract_sharded(config, sizes, fsdp=False, dtype=jnp.float32)
        step, *args = calls(model, model.mesh, real=False)["forward"]
        counts = collections.Counter()
        for item in sent(program_of(step, *args), sizes):
            counts["layers" if item.place.startswith("layers.") else "rest"] += (
                item.num_bytes * item.times
            )
            assert item.most >= item.times
        return counts

    for axis in ("tensor", "expert"):
        sizes = dict.fromkeys(AXES, 1) | {axis: 4}
        single, triple = of(one, sizes), of(three, sizes)
        assert triple["layers"] == 3 * single["layers"] > 0
        assert triple["rest"] == single["rest"]


@pytest.mark.parametrize(
    "kind, share",
    [
        ("all-gather", 0.75),
        ("all-to-all", 0.75),
        ("all-reduce", 1.5),
        ("reduce-scatter", 3),
        ("collective-permute", 1),
    ],
)
def test_bytes_on_the_wire_are_those_of_a_ring(kind, share):
    item = Sent("", kind, ("expert", "tensor"), 100, 5, 7)
    assert on_the_wire(item, dict(data=8, expert=2, context=1, tensor=2)) == share * 500


def test_live_bytes_of_a_program_worked_out_by_hand():
    def step(x):
        a = jnp.sin(x)  # 400 bytes
        b = jnp.dot(a, a)  # another 400
        c = jnp.cos(b)  # over b, but a is still needed
        return jnp.dot(c, a)  # the output costs nothing

    assert peak_bytes(program_of(step, jnp.ones((10, 10), jnp.float32))) == 800


def run(capsys, *arguments):
    """Exit code, output and errors."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


TINY = ("tiny", "--mesh", "data=2,expert=2,tensor=2", "--seq", 48)


def test_the_command_prints_the_bytes_that_devices_hold(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LAYER.to_hf()))
    mesh = "data=2,expert=2,tensor=2"
    options = ("--batch", BATCH, "--seq", SEQ, "--memory", 1, "--dtype", "float32")
    code, text, errors = run(capsys, tmp_path, "--mesh", mesh, "--fsdp", *options)
    assert (code, errors) == (0, "")
    make = functools.partial(dsv4.DeepSeekV4, LAYER, key=jax.random.key(0))
    model = dsv4.shard(make, make_mesh(**dict(mesh_of(mesh))), fsdp=True)

    def held(tree):
        return sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(tree))

    trained = [
        x for x in jax.tree.leaves(model) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    weights, grads, cache = map(held, (model, trained, model.init_cache(BATCH, SEQ)))
    assert weights > grads
    for row in (
        rf"parameters +{weights:,} +{weights:,}\n",
        rf"gradients +{grads:,} *\n",
        rf"optimizer state \(Adam's two moments\) +{2 * grads:,} *\n",
        rf"cache \(.*\) +{cache:,}\n",
        r"layer 0 +all-to-all +expert +9 ",
    ):
        assert re.search(row, text), row
    assert "activations (an estimate)" in text and "training fits" in text


def test_the_command_draws_the_mesh(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "mesh.png"
    (tmp_path / "config.json").write_text(json.dumps(LAYER.to_hf()))
    mesh = ("--mesh", "data=2,expert=2,tensor=2", "--seq", 3)
    code, _, errors = run(capsys, tmp_path, *mesh, "--plot", picture)
    assert (code, errors) == (0, "")
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_command_says_what_does_not_fit(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LAYER.to_hf()))
    options = ("--mesh", "data=2", "--seq", 48, "--memory", 0.001)
    code, text, _ = run(capsys, tmp_path, *options)
    assert code == 1 and "training does not fit" in text and "decoding fits" in text


def mesh_of(text):
    return tuple(
        (axis, int(size)) for axis, size in (x.split("=") for x in text.split(","))
    )


def test_all_that_does_not_divide_is_listed(capsys):
    code, text, errors = run(
        capsys,
        "tiny",
        "--mesh",
        "expert=5,context=5,tensor=3",
        "--batch",
        7,
        "--seq",
        48,
    )
    assert (code, text, errors.count("\n")) == (1, "", 1)
    for part in (
        "7 rows do not divide over data x expert = 5",
        "48 tokens do not divide over context=5",
        "experts of 16 do not divide over expert=5",
        "heads of 16 do not divide over tensor=3",
        "groups of 8 do not divide over tensor=3",
        "vocab of 256 do not divide over tensor=3",
    ):
        assert part in errors, part


WRONG = [
    (("huge", "--mesh", "data=2"), "none of flash, pro, tiny"),
    (("tiny", "--mesh", "data"), "no axis and size"),
    (
        ("tiny", "--mesh", "data=2", "--seq", 10**9),
        "seq=1000000000): must be an integer in [1, 4096]",
    ),
    (("tiny", "--mesh", "data=2", "--seq", 0), "seq=0"),
    (("tiny", "--mesh", "data=2", "--batch", 0), "batch=0"),
    (("tiny", "--mesh", "data=2", "--batch", -2), "batch=-2"),
    (("tiny", "--mesh", "data=2", "--dtype", "int8"), "dtype='int8'"),
    (("tiny", "--mesh", "data=2", "--memory", "nan"), "above 0"),
]


@pytest.mark.parametrize("arguments, part", WRONG)
def test_what_is_wrong_is_told_in_one_line(
    capsys, arguments, part, without_shape_checks
):
    code, text, errors = run(capsys, *arguments)
    assert (code, text, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: ") and part in errors


def test_a_picture_needs_its_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, errors = run(capsys, *TINY, "--plot", "mesh.png")
    assert code == 1 and "pip install 'dsv4-eqx[plot]'" in errors


# Rows of 4,096 tokens; a cache of as many.
RELEASED = {
    "flash": (dsv4.Config.flash, dict(data=8, expert=8)),
    "pro": (dsv4.Config.pro, dict(data=8, expert=64, tensor=2)),
}


def released(name):
    """The model and its cache, which no device holds, and how many rows there are."""
    make, sizes = RELEASED[name]
    sizes = dict.fromkeys(AXES, 1) | sizes
    batch = sizes["data"] * sizes["expert"]
    model = abstract_sharded(make(), sizes, fsdp=True, dtype=jnp.bfloat16)
    return model, model.init_cache(batch, 4096), batch


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_lie_over_meshes_without_devices(name):
    model, cache, batch = released(name)
    specs = jax.tree.leaves(model.specs, is_leaf=lambda x: isinstance(x, P))
    for leaf, spec in zip(jax.tree.leaves(model), specs, strict=True):
        given = leaf.sharding.spec  # without None at its end
        assert (*given, *[None] * (leaf.ndim - len(given))) == tuple(spec)
        assert leaf.sharding.mesh == model.mesh
    for leaf in jax.tree.leaves(cache):
        parts = np.divide(leaf.shape, leaf.sharding.shard_shape(leaf.shape))
        assert parts.prod() == batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("flash", marks=pytest.mark.exhaustive), "pro"]
)
def test_released_models_are_planned_without_devices(name):
    model, cache, batch = released(name)
    tokens = jax.ShapeDtypeStruct((batch, 4096), jnp.int32)
    traced = jax.jit(training_step).trace(model, tokens, tokens)
    _, grads = traced.out_info
    expected = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }
    gradients = jax.tree_util.tree_leaves_with_path(grads)
    assert len(gradients) == sum(jax.tree.leaves(dsv4.trainable(model)))
    for path, grad in gradients:
        leaf = expected[jax.tree_util.keystr(path)]
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
    newest = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    logits, after = jax.jit(decoding_step).trace(model, newest, cache).out_info
    assert logits.shape == (batch, 1, model.config.vocab_size)
    assert logits.dtype == jnp.float32
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
