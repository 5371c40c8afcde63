"""What is in the way of a checkpoint, or beside the one that it replaces."""

import os
import pathlib
import socket
import stat

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


@pytest.mark.parametrize("kind", ["model", "empty", "nothing"])
@pytest.mark.usefixtures("saved", "unwritten")
def test_a_link_is_refused_whatever_it_leads_to(kind, tmp_path):
    (tmp_path / "empty").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / kind)
    before = sorted(os.listdir(tmp_path))
    refused(f"but a link to {os.readlink(link)}; give the path", link)
    assert sorted(os.listdir(tmp_path)) == before and link.is_symlink()


def test_the_working_directory_is_refused(saved, unwritten, monkeypatch):
    (saved / "below").mkdir()
    for place, target in ((saved, "."), (saved / "below", ".."), (saved, saved)):
        monkeypatch.chdir(place)
        refused("is the working directory or above it", target)


def test_what_is_beside_a_checkpoint_is_carried_over_as_it_is(saved):
    (saved / "notes").mkdir()
    (saved / "notes" / "log.txt").write_text("log")
    (saved / "notes" / "latest").symlink_to("log.txt")
    (saved / "here").symlink_to("notes")
    (saved / "dangling").symlink_to("/nowhere")
    (saved / "tokenizer.json").write_text("{}")
    names = ("notes/log.txt", "tokenizer.json")

    def same_files():
        found = [os.stat(saved / name) for name in names]
        return [(x.st_ino, x.st_mode, x.st_uid, x.st_mtime_ns) for x in found]

    before = same_files()
    saved.chmod(0o2750)
    other = random_model(one_layer(), seed=5)
    dsv4.save_pretrained(other, saved, overwrite=True)
    assert_same_bits(dsv4.from_pretrained(saved), other)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o2750
    assert same_files() == before
    for name, place in (
        ("notes/latest", "log.txt"),
        ("here", "notes"),
        ("dangling", "/nowhere"),
    ):
        assert os.readlink(saved / name) == place
    assert os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize("folder", [".", "notes"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_cannot_be_carried_over_is_refused(
    kind, folder, saved, unwritten, monkeypatch
):
    monkeypatch.chdir(saved.parent)
    (saved / folder).mkdir(exist_ok=True)
    path = pathlib.Path("model", folder, "odd")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    with pytest.raises(ValueError, match="odd cannot be carried over"):
        dsv4.save_pretrained(small_model(), saved, overwrite=True)


def test_a_name_that_is_taken_is_seen_before_writing(saved, unwritten):
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"somebody's")
    half = (saved / FILE).stat().st_size * 2 // 3
    with pytest.raises(ValueError, match="would be lost"):
        dsv4.save_pretrained(small_model(), saved, overwrite=True, most_file_bytes=half)


def test_what_is_put_beside_it_while_it_is_written_stays(saved, monkeypatch):
    run = write._write_file

    def meanwhile(*arguments):
        run(*arguments)
        (saved / "notes.txt").write_text("mine")

    monkeypatch.setattr(write, "_write_file", meanwhile)
    dsv4.save_pretrained(small_model(), saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"


def test_only_what_is_certainly_left_behind_is_taken_away(tmp_path):
    token = "0123456789abcdef"
    names = [
        ".[m]odel.saving-mine",
        f".model.saving-{token}",
        f".[m]odel.saving-{token}0",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text("mine")
    (tmp_path / f".[m]odel.saving-{token}").mkdir()
    dsv4.save_pretrained(small_model(), tmp_path / "[m]odel")
    assert set(os.listdir(tmp_path)) == {"[m]odel", *names}
    assert all(contents(tmp_path / name) == {FILE: b"mine"} for name in names)


def test_directories_that_are_made_are_flushed(tmp_path, monkeypatch):
    flush, flushed = os.fsync, []

    def look(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    monkeypatch.setattr(os, "fsync", look)
    dsv4.save_pretrained(small_model(), tmp_path / "some" / "where" / "model")
    assert flushed[:2] == [str(tmp_path), str(tmp_path / "some")]
