"""A checkpoint appears whole or not at all, and nobody's files are lost for it."""

import errno
import json
import os
import subprocess
import sys

import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint import write
from tests.checkpoint.saving import contents, one_layer, small_model
from tests.models import random_model
from tests.sharded import assert_same_bits

FILE = "model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A directory with a checkpoint in it."""
    dsv4.save_pretrained(small_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unwritten(monkeypatch):
    """Whatever is refused is refused before anything is written."""
    monkeypatch.setattr(write, "new_directory", None)


def refused(match, target):
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=match):
            dsv4.save_pretrained(small_model(), target, overwrite=overwrite)


def test_a_checkpoint_is_replaced_only_when_told_to(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty directory is free
    dsv4.save_pretrained(small_model(), target, most_file_bytes=40_000)
    (target / "tokenizer.json").write_text("{}")
    before = contents(target)
    other = random_model(one_layer(), seed=5)
    with pytest.raises(ValueError, match="has a checkpoint; .*overwrite=True"):
        dsv4.save_pretrained(other, target)
    assert contents(target) == before
    dsv4.save_pretrained(other, target, overwrite=True)
    assert_same_bits(dsv4.from_pretrained(target), other)
    after = contents(target)
    assert after.keys() == {"tokenizer.json", "config.json", FILE}
    assert after["tokenizer.json"] == b"{}"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "model-00001-of-00002.safetensors", ".mine", "a/b"]
)
def test_a_checkpoint_beside_what_would_be_lost_is_not_replaced(name, saved, unwritten):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"somebody's")
    before = contents(saved)
    with pytest.raises(ValueError, match=f"has {name.split('/')[0]}, .* would be lost"):
        dsv4.save_pretrained(small_model(), saved, overwrite=True)
    assert contents(saved) == before


def test_the_name_has_a_whole_checkpoint_until_the_new_one_is_on_the_disk(
    saved, monkeypatch
):
    before, seen = contents(saved), []
    flush = os.fsync

    def look(handle):
        seen.append(contents(saved) == before)
        flush(handle)

    monkeypatch.setattr(os, "fsync", look)
    other = random_model(one_layer(), seed=5)
    dsv4.save_pretrained(other, saved, overwrite=True)
    # Two files, their directory, and then the one that holds the name.
    assert seen == [True] * 3 + [False]
    assert_same_bits(dsv4.from_pretrained(saved), other)


@pytest.mark.parametrize("kind", ["files", "file", "link"])
def test_what_is_no_checkpoint_is_never_touched(kind, tmp_path):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    else:
        place = tmp_path / "place" if kind == "link" else target
        place.mkdir()
        (place / "config.json").write_text("mine")
        if kind == "link":
            (place / FILE).write_text("mine")
            target.symlink_to(place)
    before = contents(tmp_path)
    refused("is there and is no checkpoint's directory", target)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["model", "nothing"])
def test_a_link_is_refused_whatever_it_leads_to(kind, saved, unwritten, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / kind)
    refused(f"but a link to {os.readlink(link)}; give the path", link)


def test_the_working_directory_is_refused(saved, unwritten, monkeypatch):
    (saved / "below").mkdir()
    for place, target in ((saved, "."), (saved / "below", "..")):
        monkeypatch.chdir(place)
        refused("is the working directory or above it", target)


@pytest.mark.parametrize(
    "step, error",
    [
        ("write_file", KeyboardInterrupt()),
        ("write_json", OSError(errno.ENOSPC, "full")),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_an_exception_while_writing_leaves_nothing_behind(
    is_there, step, error, tmp_path, monkeypatch
):
    target = tmp_path / "some" / "where" / "model"
    if is_there:
        dsv4.save_pretrained(small_model(), target)
    before, calls = contents(tmp_path), []
    run = getattr(write, step)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # one file of weights, and the index, are written
            raise error
        run(*arguments)

    monkeypatch.setattr(write, step, fail)
    other = random_model(one_layer(), seed=5)
    with pytest.raises(type(error)):
        dsv4.save_pretrained(other, target, overwrite=is_there, most_file_bytes=40_000)
    assert contents(tmp_path) == before
    assert os.listdir(target.parent) == (["model"] if is_there else [])
    monkeypatch.undo()
    dsv4.save_pretrained(other, target, overwrite=is_there)
    assert_same_bits(dsv4.from_pretrained(target), other)


def test_a_checkpoint_that_cannot_be_replaced_is_put_back(saved, monkeypatch):
    before, rename = contents(saved), os.rename

    def fail(source, target):
        if ".saving-" in str(source):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        dsv4.save_pretrained(random_model(one_layer()), saved, overwrite=True)
    assert contents(saved) == before and os.listdir(saved.parent) == ["model"]


def test_where_another_saver_comes_between_it_is_said_where_the_old_one_is(
    saved, tmp_path, monkeypatch
):
    old, rename = contents(saved), os.rename
    other = tmp_path / "other"
    dsv4.save_pretrained(random_model(one_layer(), seed=5), other)
    new = contents(other)

    def between(source, target):
        rename(source, target)
        if source == saved:
            rename(other, saved)

    monkeypatch.setattr(os, "rename", between)
    with pytest.raises(OSError) as error:
        dsv4.save_pretrained(small_model(), saved, overwrite=True)
    assert contents(saved) == new
    (replaced,) = tmp_path.glob(".model.replaced-*")
    assert contents(replaced) == old and str(replaced) in error.value.__notes__[0]
    assert sorted(os.listdir(tmp_path)) == sorted([replaced.name, "model"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_appears_meanwhile_stays(overwrite, tmp_path, monkeypatch):
    target = tmp_path / "model"
    run = write.write_file

    def meanwhile(*arguments):
        run(*arguments)
        target.mkdir()
        (target / "notes.txt").write_text("mine")

    monkeypatch.setattr(write, "write_file", meanwhile)
    with pytest.raises(ValueError, match="is there and is no checkpoint's"):
        dsv4.save_pretrained(small_model(), target, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["model"]
    assert contents(target) == {"notes.txt": b"mine"}


def test_what_is_put_beside_it_while_it_is_written_stays(saved, monkeypatch):
    run = write.write_file

    def meanwhile(*arguments):
        run(*arguments)
        (saved / "notes.txt").write_text("mine")

    monkeypatch.setattr(write, "write_file", meanwhile)
    dsv4.save_pretrained(small_model(), saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"


def test_directories_that_are_made_are_flushed(tmp_path, monkeypatch):
    flush, flushed = os.fsync, set()

    def look(handle):
        flushed.add(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    monkeypatch.setattr(os, "fsync", look)
    dsv4.save_pretrained(small_model(), tmp_path / "some" / "where" / "model")
    assert {str(tmp_path), str(tmp_path / "some"), str(tmp_path / "some/where")} <= (
        flushed
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills, left_behind, acknowledged",
    [(40, 4, 2), pytest.param(200, 40, 10, marks=pytest.mark.exhaustive)],
)
def test_kill_at_random_moments(kills, left_behind, acknowledged, tmp_path):
    """Only whole versions are ever seen, and what was saved stays."""
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(tmp_path)]
    command.append(str(kills))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["faults"] == [] and not seen["backend"]
    assert seen["kills"] == kills
    # Spread over all of the saving.
    assert seen["left_behind"] >= left_behind
    assert seen["acknowledged"] >= acknowledged
    for version in (0, 1):
        expected = random_model(one_layer(), seed=version)
        model = dsv4.from_pretrained(tmp_path / f"version-{version}")
        assert_same_bits(model, expected)
    current = dsv4.from_pretrained(tmp_path / "model")
    wanted = random_model(one_layer(), seed=seen["current"])
    assert_same_bits(current, wanted)
