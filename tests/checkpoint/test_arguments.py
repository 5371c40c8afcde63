"""What is no path, dtype or flag is refused by name before anything is done."""

import functools
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.describe import describe
from dsv4_eqx.checkpoint.save import convert
from tests.checkpoint.saving import one_layer, small_model
from tests.models import random_tensors
from tests.official import write_release
from tests.sharded import assert_same_bits

NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"
REPOSITORY = "someone/something"  # its package would be asked for next
TAKE_PATHS = {
    "from_pretrained(directory": dsv4.from_pretrained,
    "save_pretrained(directory": functools.partial(dsv4.save_pretrained, small_model()),
    "convert(directory": lambda path: convert(path, "new"),
    "convert(target": functools.partial(convert, NANO),
    "inspect(directory": describe,
    "load_tokenizer(directory": dsv4.load_tokenizer,
    "Config.from_hf(source": dsv4.Config.from_hf,
}
pytestmark = pytest.mark.usefixtures("without_shape_checks")


def refuses(start, call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert message.startswith(start) and "\n" not in message, message


@pytest.mark.parametrize("call", TAKE_PATHS)
def test_what_is_no_path_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (None, b"x", "", "a\0b", 3):
        refuses(f"{call}={path!r}): must be a path", TAKE_PATHS[call], path)
    assert list(tmp_path.iterdir()) == []


def test_the_home_directory_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    dsv4.save_pretrained(small_model(), "~/old")
    convert("~/old", pathlib.Path("~/new"))
    assert_same_bits(dsv4.from_pretrained("~/new"), small_model())
    assert dsv4.Config.from_hf("~/new") == one_layer()
    with pytest.raises(ValueError, match="home/new/tokenizer.json: there is no"):
        dsv4.load_tokenizer("~/new")
    assert describe("~/new")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_other_arguments_are_refused(tmp_path):
    load = functools.partial(dsv4.from_pretrained, REPOSITORY)
    change = functools.partial(convert, REPOSITORY, tmp_path / "new")
    for dtype in ("nonsense", "automatic", "f4,", jnp.int32, [1], "float8_e4m3fn"):
        refuses("from_pretrained(dtype=", load, dtype=dtype)
        refuses("convert(dtype=", change, dtype=dtype)
    refuses("from_pretrained(keep_quantized='no')", load, keep_quantized="no")
    refuses("from_pretrained(revision=3)", load, revision=3)
    refuses("from_pretrained(mesh='x')", load, mesh="x")
    save = functools.partial(dsv4.save_pretrained, small_model(), tmp_path / "new")
    for name, function in (("save_pretrained", save), ("convert", change)):
        for flag in ("official", "overwrite"):
            refuses(f"{name}({flag}='hf')", function, **{flag: "hf"})
        for size in (0, -5, True, "x"):
            start = f"{name}(most_file_bytes={size!r})"
            refuses(start, function, most_file_bytes=size)
    refuses("from_state_dict(config=None)", dsv4.from_state_dict, None, {})
    refuses("from_state_dict(tensors=", dsv4.from_state_dict, one_layer(), [1])
    assert list(tmp_path.iterdir()) == []
    save(most_file_bytes=np.int64(50_000))
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1


def test_models_without_numbers_are_refused(tmp_path):
    save = functools.partial(dsv4.save_pretrained, directory=tmp_path / "new")
    abstract = eqx.filter_eval_shape(lambda model: model, small_model())
    embedding = small_model().embedding + 1
    donated = eqx.tree_at(lambda model: model.embedding, small_model(), embedding)
    donated.embedding.delete()
    refuses("save_pretrained: embedding has no numbers", save, abstract)
    refuses("save_pretrained: embedding has no numbers", save, donated)
    refuses("save_pretrained: embedding has no numbers", jax.jit(save), small_model())
    refuses("save_pretrained(model='NoneType')", save, None)
    assert list(tmp_path.iterdir()) == []


def test_float64_is_kept_or_refused(tmp_path):
    config, tensors = one_layer(), random_tensors(one_layer())
    tensors["embed.weight"] = tensors["embed.weight"].astype(np.float64) / 3
    old = write_release(tmp_path / "old", config, tensors)
    small = dsv4.from_pretrained(old, dtype="float32")
    assert small.embedding.dtype == jnp.float32
    with jax.enable_x64(True):
        model = dsv4.from_pretrained(old)
        np.testing.assert_array_equal(model.embedding, tensors["embed.weight"])
        dsv4.save_pretrained(model, tmp_path / "saved")
        convert(tmp_path / "saved", tmp_path / "new")
        assert_same_bits(dsv4.from_pretrained(tmp_path / "new"), model)
    wanted = "the weights would be float64.*jax_enable_x64"
    for call in (
        lambda: dsv4.from_pretrained(old),
        lambda: dsv4.from_pretrained(REPOSITORY, dtype=np.float64),
        lambda: dsv4.from_state_dict(config, tensors),
        lambda: convert(old, tmp_path / "other"),
        lambda: convert(REPOSITORY, tmp_path / "other", dtype="float64"),
        lambda: dsv4.save_pretrained(model, tmp_path / "other"),
    ):
        with pytest.raises(ValueError, match=wanted):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"old", "saved", "new"}
