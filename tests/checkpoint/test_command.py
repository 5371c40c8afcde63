"""`python -m dsv4_eqx.checkpoint`, and names of the hub in place of directories."""

import json
import os
import pathlib
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint.__main__ import main
from dsv4_eqx.checkpoint.save import convert
from dsv4_eqx.model.model import abstract_model
from tests.checkpoint.saving import one_layer
from tests.models import random_tensors
from tests.official import write_release

FILE = "model.safetensors"
NANO = pathlib.Path(__file__).parents[1] / "data" / "nano-release"


def run(capsys, *arguments):
    """Exit code, output and errors."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def row(text, name):
    """The two numbers of a table's row."""
    match = re.search(rf"^{re.escape(name)} +([\d,]+) +([\d,]+)$", text, re.MULTILINE)
    return [int(number.replace(",", "")) for number in match.groups()]


def copy_of_nano(directory):
    shutil.copytree(NANO, directory)
    (directory / "expected.safetensors").unlink()
    return directory


def test_inspect_counts_everything(capsys):
    code, text, errors = run(capsys, "inspect", NANO)
    assert (code, errors) == (0, "")
    index = json.loads((NANO / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    headers = 0
    for file in files:
        with open(NANO / file, "rb") as opened:
            headers += 8 + int.from_bytes(opened.read(8), "little")
    stored = sum((NANO / file).stat().st_size for file in files) - headers
    model = abstract_model(dsv4.Config.from_hf(NANO), np.dtype("float32"))
    numbers = sum(x.size for x in jax.tree.leaves(model))
    assert row(text, "total") == [numbers, stored]
    assert row(text, "I64")[0] == 2
    assert row(text, "prediction block")[0] == sum(
        x.size for x in jax.tree.leaves(model.mtp)
    )
    assert "5 layers" in text and "nothing missing" in text


def test_inspect_says_what_fits_a_mesh(capsys):
    code, text, _ = run(capsys, "inspect", NANO, "--mesh", "expert=2, tensor=2")
    assert code == 0
    on_device = int(re.search(r"device ([\d,]+) as bfloat16", text)[1].replace(",", ""))
    packed = int(re.search(r"bfloat16, ([\d,]+) with", text)[1].replace(",", ""))
    mesh = dsv4.make_mesh(expert=2, tensor=2, data=2)
    for keep_quantized, expected in ((False, on_device), (True, packed)):
        model = dsv4.from_pretrained(NANO, mesh=mesh, keep_quantized=keep_quantized)
        leaves = jax.tree.leaves(model)
        assert sum(x.addressable_data(0).nbytes for x in leaves) == expected
    code, text, _ = run(capsys, "inspect", NANO, "--mesh", "expert=4")
    assert code == 1 and "does not fit" in text and "gate_up" in text


@pytest.mark.parametrize("mesh", ["experts=2", "expert", "expert=0", "expert=-2", ""])
def test_meshes_that_are_none(capsys, mesh):
    code, _, errors = run(capsys, "inspect", NANO, "--mesh", mesh)
    assert code == 1 and "data, expert, context, tensor" in errors


def test_meshes_that_give_an_axis_twice(capsys):
    code, _, errors = run(capsys, "inspect", NANO, "--mesh", "data=2,expert=2,data=4")
    assert code == 1 and "data is given twice" in errors


def test_inspect_lists_what_is_missing_and_extra(capsys, tmp_path):
    directory = copy_of_nano(tmp_path / "nano")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"o_lora_rank": 32}))
    code, text, _ = run(capsys, "inspect", directory)
    assert code == 1
    assert "layers.0.attn.wo_a.weight (model-00002-of-00007.safetensors) has" in text
    assert re.search(r"^\d+ faults$", text, re.MULTILINE)


def test_commands_say_what_is_wrong_without_a_traceback(capsys, tmp_path):
    code, _, errors = run(capsys, "inspect", tmp_path / "nothing")
    assert code == 1 and "no such directory" in errors
    code, _, errors = run(capsys, "convert", NANO, tmp_path)
    assert code == 0
    code, _, errors = run(capsys, "convert", NANO, tmp_path)
    assert code == 1 and "--overwrite" in errors
    code, _, errors = run(capsys, "convert", NANO, tmp_path / FILE / "new")
    assert code == 1 and errors.startswith("error: ") and "File exists" in errors
    size = ["--most-file-bytes", "-5"]
    code, _, errors = run(capsys, "convert", NANO, tmp_path / "new", *size)
    assert code == 1 and "most_file_bytes=-5" in errors
    assert not (tmp_path / "new").exists()


def test_convert_brings_what_is_beside_the_weights(tmp_path):
    source, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    config = one_layer()
    write_release(source, config, random_tensors(config))
    blobs.mkdir()
    (blobs / "a1").write_text("template")
    (source / "chat_template.jinja").symlink_to("../../blobs/a1")
    (source / "outside.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("not of the checkpoint")
    (source / "encoding").mkdir()
    brought = {"tokenizer.model", "generation_config.json", "LICENSE"}
    left = {".hidden", "large.txt", "more.gguf", "pytorch_model.bin.index.json"}
    for name in brought | left | {"pytorch_model.bin"}:
        (source / name).write_text(name)
    os.truncate(source / "large.txt", (64 << 20) + 1)
    raw = json.loads((source / "config.json").read_text())
    kept = {"id2label": {"0": "a"}, "use_cache": False, "eos_token_id": [7, 9]}
    files = {"expert_dtype": "fp4", "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(raw | kept | files))
    convert(source, tmp_path / "new", dtype="float16")
    brought |= {"chat_template.jinja", "config.json", FILE}
    assert {path.name for path in (tmp_path / "new").iterdir()} == brought
    copied = tmp_path / "new" / "chat_template.jinja"
    assert copied.read_text() == "template" and not copied.is_symlink()
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == config.to_hf() | kept | {"torch_dtype": "float16"}


@pytest.mark.parametrize("official", [False, True])
def test_convert_keeps_every_number(tmp_path, capsys, official):
    source = copy_of_nano(tmp_path / "nano")
    (source / "tokenizer.json").write_text("{}")
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [7, 9]}
    (source / "config.json").write_text(json.dumps(config))
    flag = ["--official"] if official else []
    command = ["convert", source, tmp_path / "new", "--dtype", "float32", *flag]
    assert run(capsys, *command, "--most-file-bytes", "2000000")[0] == 0
    assert len(list((tmp_path / "new").glob("model-0*.safetensors"))) > 3
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, [7, 9])
    new = dsv4.from_pretrained(tmp_path / "new")
    old = dsv4.from_pretrained(source, dtype=np.float32)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_names_of_the_hub_need_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'dsv4-eqx\[hf\]'"):
        dsv4.from_pretrained("someone/something")


def test_names_of_the_hub_are_downloaded(monkeypatch, tmp_path):
    """Into the layout of the hub's cache: links to files named by their content."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    copy_of_nano(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(pathlib.Path("..", "..", "blobs", path.name))
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(snapshot)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    model = dsv4.from_pretrained("someone/something", revision="v1")
    assert asked == [("someone/something", "v1")]
    np.testing.assert_array_equal(model.embedding, dsv4.from_pretrained(NANO).embedding)


def test_what_the_hub_does_not_give_is_told_in_one_line(monkeypatch, capsys):
    def snapshot_download(name, **_):
        raise RuntimeError("404 Not Found\nmore")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    code, _, errors = run(capsys, "inspect", "someone/something", "--revision", "v1")
    assert code == 1 and errors.count("\n") == 1
    assert errors.startswith("error: inspect: 'someone/something', revision 'v1'")
    assert "404 Not Found; see that" in errors


def test_a_revision_is_for_names_of_the_hub():
    with pytest.raises(ValueError, match="revision='v1'"):
        dsv4.from_pretrained(NANO, revision="v1")
