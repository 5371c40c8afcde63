"""A checkpoint's own tokenizer, and bytes in its place."""

import sys
import types

import numpy as np
import pytest

import dsv4_eqx as dsv4
from tests.checkpoint.saving import small_model

TEXT = "Größe: 3 × 5\n"


def test_bytes_are_tokens():
    tokenizer = dsv4.ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and tokenizer.vocab_size == 256
    assert bytes(ids.astype(np.uint8)) == TEXT.encode()
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([72, 300, 105, -1, -1]) == "H\ufffdi"  # a row that ended
    assert tokenizer.encode("").shape == (0,)


def test_a_directory_without_tokenizer_says_how_to_get_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json: .* ByteTokenizer\(\)"):
        dsv4.load_tokenizer(tmp_path)


def test_a_tokenizer_is_saved_beside_the_weights(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    tokenizer = own_tokenizer(old)
    (old / "chat_template.jinja").write_text("template")
    dsv4.save_pretrained(small_model(), new, tokenizer=tokenizer)
    assert dsv4.load_tokenizer(new).encode("five three").tolist() == [2, 1]
    assert (new / "chat_template.jinja").read_text() == "template"
    # It stays where the weights are replaced, and gives way to another.
    dsv4.save_pretrained(small_model(), new, overwrite=True)
    assert dsv4.load_tokenizer(new).vocab_size == 4
    (new / "tokenizer.json").write_text("{}")
    tokenizer.save_pretrained(tmp_path)
    dsv4.save_pretrained(small_model(), new, overwrite=True, tokenizer=tokenizer)
    assert dsv4.load_tokenizer(new).vocab_size == 4
    dsv4.save_pretrained(small_model(), tmp_path / "b", tokenizer=dsv4.ByteTokenizer())
    assert not (tmp_path / "b" / "tokenizer.json").exists()


@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_tokenizer_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"save_pretrained\(tokenizer='old'\)"):
        dsv4.save_pretrained(small_model(), tmp_path / "new", tokenizer="old")
    assert list(tmp_path.iterdir()) == []


def own_tokenizer(directory):
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[?]": 0, "three": 1, "five": 2}, unk_token="[?]")
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.add_special_tokens(["<end>"])
    own.save(str(directory / "tokenizer.json"))
    return dsv4.load_tokenizer(directory)


def test_a_tokenizer_of_its_own_is_read(tmp_path):
    tokenizer = own_tokenizer(tmp_path)
    ids = tokenizer.encode("five three nine <end>")
    assert ids.dtype == np.int32 and ids.tolist() == [2, 1, 0, 3]
    assert tokenizer.decode(ids) == "five three [?] <end>"
    assert tokenizer.decode(np.append(ids, [-1, -1])) == "five three [?] <end>"
    assert tokenizer.vocab_size == 4


def test_a_tokenizer_is_saved_though_its_file_is_gone(tmp_path):
    tokenizer = own_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "other").mkdir()
    tokenizer.save_pretrained(tmp_path / "other")
    again = dsv4.load_tokenizer(tmp_path / "other")
    assert again.encode("five three").tolist() == [2, 1]


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'dsv4-eqx\[hf\]'"):
        dsv4.load_tokenizer(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: is no tokenizer"):
        dsv4.load_tokenizer(tmp_path)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("text", ["a\ud800", b"a", None, 3])
def test_what_is_no_text_is_refused(text, tmp_path):
    for tokenizer in (dsv4.ByteTokenizer(), own_tokenizer(tmp_path)):
        with pytest.raises(ValueError, match=r"encode\(text=.*without half of a"):
            tokenizer.encode(text)


def test_of_a_name_on_the_hub_only_the_tokenizer_is_downloaded(monkeypatch, tmp_path):
    own_tokenizer(tmp_path)
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    tokenizer = dsv4.load_tokenizer("someone/something", revision="v1")
    assert tokenizer.vocab_size == 4
    ((name, options),) = asked
    assert name == "someone/something" and options["revision"] == "v1"
    patterns = options["allow_patterns"]
    assert patterns[0] == "tokenizer.json" and not any("*" in p for p in patterns)
