"""Documents of text files and JSON lines: their tokens, their targets, what is left."""

import json
import warnings

import numpy as np
import pytest

import dsv4_eqx as dsv4

BYTES = dsv4.ByteTokenizer()


def text_of(document):
    return bytes(document.tokens.astype(np.uint8)).decode()


def target_text(document):
    return bytes(document.tokens[document.is_target].astype(np.uint8)).decode()


def write_lines(path, *records):
    lines = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_files_of_a_directory_are_documents_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b.md").write_text("Größe")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_bytes(b"\xef\xbb\xbffirst")  # a byte order mark
    (tmp_path / "c.py").write_text("no text")
    found = dsv4.read_documents(tmp_path, BYTES)
    assert list(map(text_of, found)) == ["first", "Größe"]
    assert all(document.is_target.all() for document in found)
    assert found[0].tokens.dtype == np.int32
    (python,) = dsv4.read_documents([tmp_path], BYTES, suffixes=[".py"])
    assert text_of(python) == "no text"
    both = dsv4.read_documents([tmp_path / "c.py", tmp_path / "b.md"], BYTES)
    assert list(map(text_of, both)) == ["no text", "Größe"]


def test_of_prompt_and_completion_only_the_completion_is_a_target(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"text": "whole", "source": "ignored"},
        b"",
        {"prompt": "2 + 3 =", "completion": " 5"},
        {"prompt": "", "completion": "all"},
    )
    found = dsv4.read_documents(path, BYTES, begin_id=1, end_id=2)
    shown = [(text_of(x), target_text(x)) for x in found]
    assert shown == [
        ("\1whole\2", "\1whole\2"),
        ("\0012 + 3 = 5\2", " 5\2"),
        ("\1all\2", "\1all\2"),
    ]


def encode_messages(messages):
    """Every answer is a target, questions are none."""
    if any(message["role"] == "tool" for message in messages):
        raise ValueError("no tools")
    parts = [(BYTES.encode(m["content"]), m["role"] == "assistant") for m in messages]
    tokens = np.concatenate([part for part, _ in parts])
    return tokens, np.repeat([mask for _, mask in parts], [len(x) for x, _ in parts])


def chat(*roles):
    return {"messages": [{"role": role, "content": role} for role in roles]}


def test_messages_are_encoded_by_the_users_function(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", chat("user", "assistant", "user"))
    (found,) = dsv4.read_documents(path, BYTES, encode_messages=encode_messages)
    assert text_of(found) == "userassistantuser" and target_text(found) == "assistant"


@pytest.mark.parametrize(
    "encode, wrong",
    [
        (None, "give encode_messages"),
        (lambda messages: "text", "gave str"),
        (lambda messages: ([1, 2], [True]), r"gave int64\[2\] and bool\[1\]"),
        (lambda messages: ([1.5], [True]), r"gave float64\[1\]"),
    ],
)
def test_messages_without_a_function_that_fits_are_refused(encode, wrong, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", chat("user"))
    with pytest.raises(ValueError, match=f"read_documents: .*{wrong}.*line 1") as error:
        dsv4.read_documents(path, BYTES, encode_messages=encode)
    assert "read_documents" in str(error.value)


def test_what_cannot_be_read_is_counted_and_said_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text("")
    write_lines(
        tmp_path / "c.jsonl",
        {"text": "kept"},
        b"\xff",
        b'{"text": ',
        [1],
        {"text": ""},
        {"text": "a", "prompt": "b", "completion": "c"},
        {"prompt": "without completion"},
        {"prompt": "with an empty one", "completion": ""},
        {"messages": []},
        {"text": 3},
        b'{"text": "half a pair \\ud800"}',
        b"[" * 100_000,
        chat("tool"),
    )
    with pytest.warns(UserWarning) as said:
        (kept,) = dsv4.read_documents(tmp_path, BYTES, encode_messages=encode_messages)
    assert text_of(kept) == "kept"
    (warning,) = said
    assert str(warning.message) == (
        "read_documents: left out 14 documents (2 not UTF-8, 2 empty, 2 not JSON, "
        "1 not a JSON object, 4 without text, prompt and completion, or messages "
        "alone, 1 with an empty completion, 2 refused by the tokenizer or "
        f"encode_messages), the first {tmp_path / 'a.txt'}."
    )


def test_where_nothing_is_left_it_is_an_error_with_the_counts(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "\ud800"})
    with pytest.raises(
        ValueError, match=r"no document in 1 files: 1 documents \(1 ref"
    ):
        dsv4.read_documents(tmp_path, BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"no document in 1 files\."):
            dsv4.read_documents(write_lines(tmp_path / "b.jsonl"), BYTES)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "change, wrong",
    [
        (dict(paths="no/such"), "no/such: there is no such file or directory"),
        (dict(paths=[]), "no file ends in .txt or .md or .jsonl in no paths"),
        (dict(paths=3), r"paths=3\): must be a path, or several"),
        (dict(suffixes=".txt"), r"suffixes='.txt'\): must be like"),
        (dict(tokenizer=3), r"tokenizer=3\): must be with a method encode"),
        (dict(encode_messages=3), r"encode_messages=3\): must be a function"),
        (dict(begin_id=-1), r"begin_id=-1\): must be an integer, at least 0"),
        (dict(vocab_size=0), r"vocab_size=0\): must be an integer, at least 1"),
        (dict(vocab_size=100), r"a.txt has the token id 122, .* in \[0, 100\)"),
        (dict(end_id=256, vocab_size=256), r"a.txt has the token id 256"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change, wrong, tmp_path):
    (tmp_path / "a.txt").write_text("z")
    arguments = dict(paths=tmp_path, tokenizer=BYTES) | change
    with pytest.raises(ValueError, match=f"read_documents.*{wrong}"):
        dsv4.read_documents(**arguments)
