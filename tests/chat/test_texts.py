"""The long texts of a checkpoint: read as literals, compared, never run."""

import json

import pytest

from dsv4_eqx import chat
from tests.chat.stand_ins import (
    ABSOLUTE,
    BEYOND,
    OFFICIAL,
    TOOLS,
    F,
    accept_stand_ins,
    write_encoding,
)

EFFORTS = {"low": "", "high": ABSOLUTE, "max": BEYOND}
OFFICIAL_FILE = (
    f"from typing import Dict\nREASONING_EFFORT_PROMPTS: Dict[str, str] = {EFFORTS!r}\n"
    f"OTHER: int\nA = B = 3\nTOOLS_TEMPLATE = {TOOLS!r}\nraise SystemExit(3)\n"
)
PREVIEW_FILE = f"REASONING_EFFORT_MAX = {ABSOLUTE!r}\nTOOLS_TEMPLATE = {TOOLS!r}\n"
HI = {"role": "user", "content": "Hi"}


def test_the_texts_of_later_releases_are_read_without_running_anything(
    tmp_path, monkeypatch
):
    accept_stand_ins(monkeypatch)
    path = write_encoding(tmp_path, OFFICIAL_FILE)
    texts = chat.read_texts(str(tmp_path))
    assert texts == chat.ChatTexts(EFFORTS, TOOLS, str(path))
    options = dict(thinking=True, effort="max", tools=[F])
    expected = chat.encode([HI], texts=OFFICIAL, **options)
    assert chat.encode([HI], texts=texts, **options) == expected


def test_the_previews_largest_effort_is_the_high_one_of_later_releases(
    tmp_path, monkeypatch
):
    accept_stand_ins(monkeypatch)
    write_encoding(tmp_path, PREVIEW_FILE)
    texts = chat.read_texts(tmp_path)
    assert texts.efforts == {"high": "", "max": ABSOLUTE} and texts.tools == TOOLS


def test_without_the_file_the_texts_are_missing_by_name(tmp_path):
    texts = chat.read_texts(tmp_path)
    assert chat.encode([HI], thinking=True, texts=texts) == chat.encode(
        [HI], thinking=True
    )
    for more in ({"effort": "high"}, {"tools": [F]}):
        with pytest.raises(ValueError, match=f"{tmp_path}.*encoding_dsv4.py, which is"):
            chat.encode([HI], thinking=True, texts=texts, **more)


def test_without_a_text_in_the_file_it_alone_is_missing(tmp_path, monkeypatch):
    accept_stand_ins(monkeypatch)
    write_encoding(tmp_path, f"TOOLS_TEMPLATE = {TOOLS!r}\n")
    texts = chat.read_texts(tmp_path)
    assert texts.tools == TOOLS and texts.efforts is None


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("Think much", "Think", r"PROMPTS\['high'\] has 8 bytes with the SHA-256"),
        ("more", "most", r"PROMPTS\['max'\] has .* DeepSeek-V4's has"),
        ("Follow them", "Follow him", "TOOLS_TEMPLATE has"),
        ("'low': ''", "'low': 3", r"PROMPTS\['low'\] has 0 bytes"),
        ("'low'", "'least'", r"must have \['low', 'high', 'max'\]"),
        ("{'low'", "dict(**{'low'", "cannot be read for"),
        ("{'low'", "open('low') or {'low'", "cannot be read for"),
        ("import", "impört ä", "cannot be read for"),
        ("OTHER", "-" * 100_000 + "OTHER", "cannot be read for"),
        ("OTHER", "#" * (1 << 20) + "\nOTHER", "more than 1048576 bytes"),
    ],
)
def test_texts_that_are_not_the_releases_are_refused(
    old, new, match, tmp_path, monkeypatch
):
    accept_stand_ins(monkeypatch)
    write_encoding(tmp_path, OFFICIAL_FILE.replace(old, new))
    with pytest.raises(ValueError, match=match):
        chat.read_texts(tmp_path)


def test_the_stand_ins_themselves_are_refused(tmp_path):
    """The digests are the releases': nothing else passes."""
    for file in (OFFICIAL_FILE, PREVIEW_FILE):
        directory = tmp_path / str(len(file))
        directory.mkdir()
        write_encoding(directory, file)
        with pytest.raises(ValueError, match="DeepSeek-V4's has 476 with f7a24f3b"):
            chat.read_texts(directory)


def test_another_models_directory_is_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "deepseek_v4"}))
    assert chat.read_texts(tmp_path).efforts is None
    config.write_text(json.dumps({"model_type": "deepseek_v41"}))
    with pytest.raises(ValueError, match="'deepseek_v41', whose chat format is"):
        chat.read_texts(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        chat.read_texts(tmp_path)
    config.unlink()
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv41.py").write_text("")
    with pytest.raises(ValueError, match=r"encoding_dsv41.*no encoding_dsv4.py"):
        chat.read_texts(tmp_path)
