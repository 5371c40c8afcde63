"""Checkpoints of a run: equal bits on any mesh, and nothing torn or of others."""

import errno
import functools
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.checkpoint.saving import one_layer
from tests.commands import ROOT
from tests.models import random_model
from tests.sharded import assert_same_bits, make_mesh
from tests.tiers import tiers

pytest.importorskip("orbax.checkpoint")
CONFIG = one_layer(vocab_size=96, n_routed_experts=6)
NANO = ROOT / "tests" / "data" / "nano-release"

model = functools.cache(lambda seed=0: random_model(CONFIG, seed))


@pytest.fixture
def checkpoints(tmp_path):
    with dsv4.TrainingCheckpoints(tmp_path / "run") as opened:
        yield opened


def state_of(model, seed=0):
    """Model, optimizer's state and key, none of them zero."""
    trained = eqx.filter(model, dsv4.trainable(model))
    transformation = dsv4.optimizer(trained, 1e-3)
    state = transformation.init(trained)
    counter = iter(range(1, 1000))

    def moved(x):
        """As after some steps: not zero."""
        values = np.asarray(x) + np.asarray(next(counter), x.dtype)
        return jax.device_put(values, x.sharding if x.committed else None)

    return model, jax.tree.map(moved, state), jax.random.key(seed)


def bits(tree):
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def assert_equal(found, expected):
    """The same structure, static fields too, and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_same_bits(bits(found), bits(expected))


def test_a_state_comes_back_with_its_step_and_its_place_in_the_data(checkpoints):
    state = state_of(model())
    assert checkpoints.restore(state) is None and checkpoints.steps == ()
    data = {"next_row": 12, "digest": "ab", "more": [None, 1.5, True]}
    checkpoints.save(3, state, data)
    found = checkpoints.restore(state_of(model(1), 1))
    assert (found.step, found.data) == (3, data)
    assert_equal(found.state, state)
    # A key is a key again, and what JAX may move is still free to be moved.
    assert jax.random.bits(found.state[2]) == jax.random.bits(state[2])
    assert not any(x.committed for x in jax.tree.leaves(found.state))


MESHES = {"expert=3": dict(expert=3), "data=2": dict(data=2, expert=2), "none": None}


def over(mesh, model):
    if mesh is None:
        return model
    return dsv4.shard(model, make_mesh(**mesh), fsdp="data" in mesh)


@pytest.mark.parametrize(
    "before, after",
    tiers(
        pairs := [("expert=3", "data=2"), ("data=2", "none"), ("none", "expert=3")],
        in_ci=pairs[1:],
        quick=pairs[:1],
    ),
)
def test_a_state_is_restored_on_another_mesh(before, after, checkpoints):
    saved = state_of(over(MESHES[before], model()))
    like = state_of(over(MESHES[after], model(1)), 1)
    checkpoints.save(1, saved)
    found = checkpoints.restore(like).state
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert_same_bits(bits(found), bits(saved))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert (x.sharding, x.committed) == (y.sharding, y.committed)


def test_a_state_may_be_restored_from_shapes_alone(checkpoints):
    sharded = over(MESHES["expert=3"], model())
    checkpoints.save(1, (sharded, jax.random.key(3)))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), sharded
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    found, found_key = checkpoints.restore((shapes, key)).state
    assert_equal(found, sharded)
    assert found.model.embedding.sharding == sharded.model.embedding.sharding
    assert jax.random.bits(found_key) == jax.random.bits(jax.random.key(3))


def test_leaves_of_every_kind_come_back_as_they_were(checkpoints):
    class Own(eqx.Module):
        weights: tuple
        nothing: None = None
        name: str = eqx.field(static=True, default="static")

    dtypes = "bool int8 uint8 int32 uint32 float16 bfloat16 float32".split()
    dtypes += ["float8_e4m3fn", "float8_e8m0fnu"]

    def make(value):
        arrays = tuple(jnp.full((2, 3), value, dtype) for dtype in dtypes)
        keys = jax.random.split(jax.random.key(value, impl="rbg"), 3)
        numpy = np.full(3, value, np.int64), np.float64(value), np.array(value, "f8")
        empty = jnp.zeros((0, 3), jnp.float16)
        numbers = dict(a=value, b=value / 3, c=value == 1, d=jax.nn.relu, e=None)
        return Own((*arrays, keys, *numpy, empty)), numbers

    saved, like = make(1), make(0)
    checkpoints.save(7, saved)
    (own, numbers), _ = checkpoints.restore(like).state, None
    assert numbers == saved[1] and list(map(type, numbers.values())) == list(
        map(type, saved[1].values())
    )
    assert own.name == "static" and own.nothing is None
    for found, expected in zip(own.weights, saved[0].weights, strict=True):
        assert type(found) is type(expected) and found.dtype == expected.dtype
        assert_same_bits(bits(found), bits(expected))


def test_packed_weights_come_back(checkpoints):
    packed = dsv4.from_pretrained(NANO, keep_quantized=True)
    checkpoints.save(1, packed)
    like = jax.tree.map(jnp.zeros_like, packed)
    assert_equal(checkpoints.restore(like).state, packed)


def test_what_is_saved_may_be_donated_at_once(checkpoints):
    values = jnp.arange(400_000, dtype=jnp.float32)
    expected = np.array(values)

    @functools.partial(jax.jit, donate_argnums=0)
    def spoil(x):
        return x * 0 - 1

    checkpoints.save(1, {"x": values})
    for _ in range(5):
        values = spoil(values)
    assert_same_bits([checkpoints.restore({"x": values}).state["x"]], [expected])


def test_the_newest_ones_are_kept(tmp_path):
    with dsv4.TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 6, 20):
            checkpoints.save(step, {"x": jnp.asarray(step)})
        checkpoints.wait()
        assert checkpoints.steps == (6, 20)
    with dsv4.TrainingCheckpoints(tmp_path) as checkpoints:
        like = {"x": jnp.asarray(0)}
        assert checkpoints.restore(like).state["x"] == 20
        assert checkpoints.restore(like, step=6).state["x"] == 6
        with pytest.raises(ValueError, match=r"step=5\): .* which has 6, 20"):
            checkpoints.restore(like, step=5)
        with pytest.raises(ValueError, match=r"save\(step=20\): .* has step 20"):
            checkpoints.save(20, like)


@pytest.mark.parametrize(
    "change, wrong",
    [
        (
            dict(vocab_size=97),
            r"\['m'\]\.embedding is .*\[96, 60\] in it and .*\[97, .*",
        ),
        (dict(num_nextn_predict_layers=1), r"it has no \['m'\]\.mtp\[0\]\S+, which .*"),
        (
            dict(n_routed_experts=7),
            r"\['m'\]\.layers\S+ is .*\[6.* it and .*\[7.* here",
        ),
    ],
)
def test_the_state_of_another_model_is_refused(change, wrong, checkpoints):
    checkpoints.save(4, {"m": model()})
    like = {
        "m": random_model(
            one_layer(**(dict(vocab_size=96, n_routed_experts=6) | change))
        )
    }
    wrong = rf"restore: step 4 in .* of another state: {wrong}\. Give a state made as"
    with pytest.raises(ValueError, match=wrong):
        checkpoints.restore(like)


def test_what_the_checkpoint_has_more_is_refused(checkpoints):
    checkpoints.save(4, {"a": jnp.ones(3), "b": 2})
    for like, wrong in [
        ({"a": jnp.ones(3)}, r"it has \['b'\], int, which is not here"),
        ({"a": jnp.ones(3), "b": 2.0}, r"\['b'\] is int in it and float here"),
        ({"a": jnp.ones(3, jnp.bfloat16), "b": 2}, r"is float32\[3\] in it and bfl"),
        ({"a": jnp.ones(3), "b": 2, "c": 1}, r"it has no \['c'\], which is int here"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            checkpoints.restore(like)


def files_of(directory):
    return sorted(
        path.relative_to(directory) for path in directory.rglob("*") if path.is_file()
    )


def spoiled(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:  # as a disk that lost power leaves it
        path.write_bytes(bytes(path.stat().st_size))


# Orbax leaves what it had begun to read besides.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["gone", "cut", "zeros"])
def test_a_torn_checkpoint_is_skipped_and_said(how, tmp_path):
    """Whichever file it is: what is restored is whole, or an older one with a word."""
    like = {"x": jnp.zeros(1000), "y": jnp.zeros(())}
    generator = np.random.default_rng(0)
    states = [
        {"x": jnp.asarray(generator.normal(size=1000), jnp.float32), "y": jnp.ones(())}
        for _ in range(2)
    ]
    with dsv4.TrainingCheckpoints(tmp_path / "run") as checkpoints:
        for step, state in enumerate(states, 1):
            checkpoints.save(step, state)
    skipped, files = 0, files_of(tmp_path / "run" / "2")
    kept = {file: (tmp_path / "run" / "2" / file).read_bytes() for file in files}
    for file in files:
        path = tmp_path / "run" / "2" / file
        spoiled(path, how)
        with dsv4.TrainingCheckpoints(tmp_path / "run") as checkpoints:
            found, said = restored(checkpoints, like)
        path.write_bytes(kept[file])
        assert_same_bits(found.state, states[found.step - 1])
        assert len(said) == (found.step == 1)
        if said:
            skipped += 1
            assert "step 2 cannot be read (" in said[0]
            assert said[0].endswith("; step 1 is the newest whole one.")
    assert skipped >= 3, files


def restored(checkpoints, like):
    """What is found, and the warnings."""
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checkpoints.restore(like)
    return found, [str(warning.message) for warning in said]


def test_a_run_goes_on_after_a_torn_checkpoint(tmp_path):
    like = {"x": jnp.zeros(3)}
    with dsv4.TrainingCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(3, 1.0 * step)})
    for step in (2, 3):
        for file in files_of(tmp_path / str(step) / "state"):
            spoiled(tmp_path / str(step) / "state" / file, "zeros")
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()  # as a killed process leaves it
    with dsv4.TrainingCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="no checkpoint in .* can be read: {3: "):
            checkpoints.restore(like, step=3)
        with pytest.warns(UserWarning, match="3 cannot .* 2 cannot .* 5 was not fin"):
            assert checkpoints.restore(like).step == 1
        checkpoints.save(2, {"x": jnp.full(3, 7.0)})
        assert checkpoints.restore(like).state["x"][0] == 7
        assert checkpoints.steps == (1, 2)
    # Nothing is thrown away that may hold something.
    assert len([*tmp_path.glob(".unreadable-[23]-*")]) == 2
    assert [*tmp_path.glob("*tmp*")] == []


def test_where_no_checkpoint_can_be_read_it_is_an_error(tmp_path):
    with dsv4.TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        checkpoints.wait()
        for file in files_of(tmp_path / "1"):
            spoiled(tmp_path / "1" / file, "zeros")
        with pytest.raises(ValueError, match="restore: no checkpoint in .* can be re"):
            checkpoints.restore({"x": jnp.zeros(3)})


def test_an_unfinished_one_alone_is_said(tmp_path):
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with dsv4.TrainingCheckpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="step 5 was not finished; none is whole"):
            assert checkpoints.restore({"x": 1}) is None


def test_what_could_not_be_written_is_said_and_is_no_checkpoint(
    checkpoints, monkeypatch
):
    checkpoints.save(1, {"x": jnp.ones(3)})
    checkpoints.wait()

    def fail(*paths):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        checkpoints.save(2, {"x": jnp.zeros(3)})
        with pytest.raises(OSError, match="full"):
            checkpoints.wait()
    assert checkpoints.steps == (1,)
    assert checkpoints.restore({"x": jnp.zeros(3)}).step == 1


@pytest.mark.usefixtures("without_shape_checks")
def test_arguments_that_do_not_fit_are_refused(tmp_path, checkpoints):
    (tmp_path / "file").write_text("")
    for wrong in (dict(keep=0), dict(directory=3), dict(directory=tmp_path / "file")):
        with pytest.raises(ValueError, match=rf"TrainingCheckpoints\({[*wrong][0]}="):
            dsv4.TrainingCheckpoints(**(dict(directory=tmp_path) | wrong))
    for step in (-1, 1.5, None):
        with pytest.raises(ValueError, match=r"save\(step="):
            checkpoints.save(step, {})
    for data in ((1, 2), {1: 2}, b"a", {"a": np.arange(3)}):
        with pytest.raises(ValueError, match=r"save\(data=.*what JSON holds"):
            checkpoints.save(1, {"x": 1}, data)
    assert checkpoints.steps == ()


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'dsv4-eqx\[train\]'"):
        dsv4.TrainingCheckpoints(tmp_path)
