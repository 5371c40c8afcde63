"""Checkpoints damaged by hand: each is refused at once, in little memory, by name.

Nothing outside the checkpoint's directory is opened and nothing in it is executed.
"""

import os
import re
import shutil

import jax
import jaxtyping
import numpy as np
import pytest

from dsv4_eqx import from_pretrained
from dsv4_eqx.checkpoint.faults import FaultyCheckpoint
from tests.checkpoint import damaged_configs, damaged_files, damaged_tensors
from tests.checkpoint.hostile import (
    CONFIG,
    FORMS,
    INDEX,
    SHARDS,
    SINGLE,
    intact,
    link,
    with_header,
    write,
)
from tests.checkpoint.watched import in_little_memory, nothing_outside, without_hanging

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("config", damaged_configs.CASES),
        ("tensors", damaged_tensors.CASES),
        ("file", damaged_files.FILES),
        ("index", damaged_files.INDEXES),
    )
    for name, case in cases.items()
}
# Numbers beyond float32, which a packed weight holds.
FITS_PACKED = ("tensors: scale too large",)
# These say that something is large, or are: their memory is traced.
LARGE = re.compile(
    "experts|layers|prediction blocks|2\\*\\*|too long|huge|nested|many|million|digits"
    "|header of|header longer|of numbers|of 100,000|brackets"
)


@pytest.fixture(autouse=True)
def unchecked():
    """Users run without jaxtyping's checks, which would answer before ours do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """All is imported and compiled that the first load takes."""
    for form in FORMS:
        directory = tmp_path_factory.mktemp("warm") / "checkpoint"
        write(directory, intact(form))
        for keep_quantized in (False, True):
            from_pretrained(directory, keep_quantized=keep_quantized)
            from_pretrained(directory, dtype="bfloat16", keep_quantized=keep_quantized)


def some_of_them_quick(cases):
    """Every eighth runs in the quick tier, the others with what is slow."""
    marks = [[], *[[pytest.mark.slow]] * 7]
    return [pytest.param(case, marks=marks[i % 8]) for i, case in enumerate(cases)]


def refused(directory, **options):
    """The text of the error, which is not long, and everything that it lists."""
    with pytest.raises(ValueError) as error:
        from_pretrained(directory, **options)
    assert error.type in (ValueError, FaultyCheckpoint)
    text = str(error.value)
    assert text.count("\n") <= 60
    return "\n".join([text, *getattr(error.value, "faults", ())])


@pytest.mark.parametrize("case", some_of_them_quick(CASES))
def test_a_damaged_checkpoint_is_refused(case, tmp_path):
    damage, *expected = CASES[case]
    directory = tmp_path / "checkpoint"
    write(directory, intact("packed"))
    (tmp_path / "secret.safetensors").write_bytes((directory / SHARDS[0]).read_bytes())
    damage(directory)
    options = {"dtype": "bfloat16"} if "bfloat16" in case else {}
    with (
        in_little_memory(directory, traced=False),
        nothing_outside(directory),
        without_hanging(),
    ):
        text = refused(directory, **options)
    if LARGE.search(case):
        with in_little_memory(directory, traced=True):
            refused(directory, **options)
    texts = [text]
    if case.startswith("tensors") and case not in FITS_PACKED:
        texts.append(refused(directory, keep_quantized=True, **options))
    for text in texts:
        for part in (*expected, str(directory)):
            assert part in text, text[:2000]


def test_no_pickle_was_opened():
    """One that is would run a command here, in the directory of the tests."""
    assert not os.path.exists("executed")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, INDEX, SHARDS[0]])
def test_a_file_that_may_not_be_read_is_refused(name, tmp_path):
    directory = tmp_path / "checkpoint"
    write(directory, intact("packed"))
    (directory / name).chmod(0)
    text = refused(directory)
    assert str(directory / name) in text and "Permission denied" in text


@pytest.mark.parametrize("form", FORMS)
def test_a_snapshot_in_the_hubs_cache_loads(form, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    files = intact(form)
    write(repository / "blobs", {f"blob-of-{name}": files[name] for name in files})
    snapshot.mkdir(parents=True)
    for name in files:
        link(name, f"../../blobs/blob-of-{name}")(snapshot)
    with nothing_outside(snapshot, repository / "blobs"):
        model = from_pretrained(snapshot)
    assert_same(model, load(form, tmp_path))


def test_weights_are_found_through_links_beside_another_configuration(tmp_path):
    """One copy of the files, several configurations."""
    there, here = tmp_path / "there", tmp_path / "here"
    files = intact("packed")
    write(there, files)
    write(here, {CONFIG: files[CONFIG]})
    for name in (INDEX, *SHARDS):
        link(name, f"../there/{name}")(here)
    with nothing_outside(here, there):
        model = from_pretrained(here)
    assert_same(model, load("packed", tmp_path))


def test_a_link_within_the_directory_loads(tmp_path):
    directory = tmp_path / "checkpoint"
    write(directory, intact("packed"))
    (directory / "weights").mkdir()
    shutil.move(directory / SHARDS[1], directory / "weights" / "second")
    link(SHARDS[1], "weights/second")(directory)
    with nothing_outside(directory):
        model = from_pretrained(directory)
    assert_same(model, load("packed", tmp_path))


def test_a_linked_directory_loads(tmp_path):
    write(tmp_path / "there", intact("packed"))
    (tmp_path / "here").symlink_to("there")
    with nothing_outside(tmp_path / "there"):
        model = from_pretrained(tmp_path / "here")
    assert_same(model, load("packed", tmp_path))


@pytest.mark.parametrize("first", [0x3C, 0x80])
def test_a_length_may_begin_like_another_kind_of_file(first, tmp_path):
    """As HTML and pickles do."""
    directory = tmp_path / "checkpoint"
    files = intact("plain in one file")
    raw = files[SINGLE]
    length = int.from_bytes(raw[:8], "little")
    more = (first - length) % 256
    raw = with_header(raw[8 : 8 + length] + b" " * more, raw[8 + length :])
    assert raw[0] == first
    write(directory, files | {SINGLE: raw})
    assert_same(from_pretrained(directory), load("plain in one file", tmp_path))


def load(form, tmp_path):
    """The intact model."""
    write(tmp_path / "intact", intact(form))
    return from_pretrained(tmp_path / "intact")


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)
