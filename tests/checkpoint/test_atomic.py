"""A checkpoint appears whole or not at all, whatever happens to who saves it."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.checkpoint import atomic, write
from tests.checkpoint.saving import contents, one_layer, small_model
from tests.models import random_model
from tests.sharded import assert_same_bits

FILE = "model.safetensors"


def test_a_checkpoint_is_replaced_only_when_told_to(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty directory is free
    dsv4.save_pretrained(small_model(), target, most_file_bytes=40_000)
    (target / "tokenizer.json").write_text("{}")
    (target / "original").mkdir()
    (target / "original" / "notes.txt").write_text("notes")
    before = contents(target)
    other = random_model(one_layer(), seed=5)
    with pytest.raises(ValueError, match="has a checkpoint; .*overwrite=True"):
        dsv4.save_pretrained(other, target)
    assert contents(target) == before
    dsv4.save_pretrained(other, target, overwrite=True)
    assert_same_bits(dsv4.from_pretrained(target), other)
    after = contents(target)
    kept = {"tokenizer.json", "original/notes.txt"}
    assert after.keys() == kept | {"config.json", FILE}
    assert all(after[name] == before[name] for name in kept)
    assert os.listdir(tmp_path) == ["model"]


def test_the_name_never_lacks_a_whole_checkpoint_while_it_is_replaced(
    tmp_path, monkeypatch
):
    target = tmp_path / "model"
    dsv4.save_pretrained(small_model(), target)
    before, seen = contents(target), []
    flush = os.fsync

    def look(handle):
        seen.append(contents(target) == before)
        flush(handle)

    monkeypatch.setattr(os, "fsync", look)
    other = random_model(one_layer(), seed=5)
    dsv4.save_pretrained(other, target, overwrite=True)
    # Only when everything is on the disk, and before the parent directory is.
    assert len(seen) == 4 and seen == [True] * 3 + [False]
    assert_same_bits(dsv4.from_pretrained(target), other)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["files", "file", "link"])
def test_what_is_no_checkpoint_is_never_touched(kind, overwrite, tmp_path):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    else:
        place = tmp_path / "place" if kind == "link" else target
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        if kind == "link":
            (place / FILE).write_text("mine")
            target.symlink_to(place)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is there and is no checkpoint's directory"):
        dsv4.save_pretrained(small_model(), target, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write_file", "_write_json"])
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
    if is_there:
        assert os.listdir(target.parent) == ["model"]
    else:  # nor the directories that it was to be in
        assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    dsv4.save_pretrained(other, target, overwrite=is_there)
    assert_same_bits(dsv4.from_pretrained(target), other)


def test_a_directory_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    target = tmp_path / "model"
    run = write._write_file

    def meanwhile(*arguments):
        run(*arguments)
        target.mkdir()
        (target / "notes.txt").write_text("mine")

    monkeypatch.setattr(write, "_write_file", meanwhile)
    with pytest.raises(ValueError, match="is there already"):
        dsv4.save_pretrained(small_model(), target)
    assert os.listdir(tmp_path) == ["model"]
    assert contents(target) == {"notes.txt": b"mine"}


def test_abandoned_directories_are_taken_away_and_those_in_use_are_not(tmp_path):
    dead, live, other = (
        tmp_path / f".{name}{'0' * 12}"
        for name in ("model.saving-dead", "model.saving-feed", "others.saving-dead")
    )
    for directory in (dead, live, other):
        directory.mkdir()
        (directory / FILE).write_text("half")
    handle = os.open(live, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        dsv4.save_pretrained(small_model(), tmp_path / "model")
        names = {"model", live.name, other.name}
        assert set(os.listdir(tmp_path)) == names
        assert contents(live) == {FILE: b"half"}
    finally:
        os.close(handle)
    dsv4.save_pretrained(small_model(), tmp_path / "model", overwrite=True)
    assert set(os.listdir(tmp_path)) == names - {live.name}


def test_a_file_system_without_an_exchange_keeps_what_is_there(tmp_path, monkeypatch):
    target = tmp_path / "model"
    dsv4.save_pretrained(small_model(), target)
    before = contents(tmp_path)
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(ValueError, match="cannot be replaced in one step"):
        dsv4.save_pretrained(random_model(one_layer()), target, overwrite=True)
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["model"]
    dsv4.save_pretrained(small_model(), tmp_path / "other")


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path):
    """Only whole versions are ever seen, and what was saved stays."""
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["faults"] == [] and not seen["backend"]
    assert seen["kills"] == 200
    # Spread over all of the saving.
    assert seen["left_behind"] >= 40 and seen["acknowledged"] >= 10, seen
    for version in (0, 1):
        expected = random_model(one_layer(), seed=version)
        model = dsv4.from_pretrained(tmp_path / f"version-{version}")
        assert_same_bits(model, expected)
    assert sorted(os.listdir(tmp_path)) == ["model", "version-0", "version-1"]
    current = dsv4.from_pretrained(tmp_path / "model")
    wanted = random_model(one_layer(), seed=seen["current"])
    assert_same_bits(current, wanted)
