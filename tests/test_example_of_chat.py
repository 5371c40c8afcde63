"""A conversation in the terminal, its input scripted."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.chat.special import DSML, END_THINK, EOS, TASKS
from tests.chat.stand_ins import TOOLS, F, accept_stand_ins, write_encoding
from tests.checkpoint.saving import one_layer
from tests.commands import ROOT, run_here
from tests.models import random_tensors
from tests.official import write_release

NANO = ROOT / "tests" / "data" / "nano-release"
CALLS = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="x" '
    f'string="false">[1]</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
)


@pytest.fixture
def talk(monkeypatch):
    """What the example prints for lines of input."""

    def run(lines, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        return run_here(ROOT / "examples" / "chat.py", *args)

    return run


class Scripted:
    """`generate_stream` that answers with these texts, and keeps the prompts."""

    def __init__(self, *replies):
        self.replies, self.prompts = list(replies), []

    def __call__(self, model, tokens, **_):
        self.prompts.append(dsv4.ByteTokenizer().decode(tokens[0]))
        reply = self.replies.pop(0)
        ids = dsv4.ByteTokenizer().encode(reply.removesuffix(EOS)).tolist()
        ids += [-1, 1] if reply.endswith(EOS) else []  # an end, after no second token
        return iter([np.array([token]) for token in ids])


@pytest.fixture
def scripted(monkeypatch):
    """Answers without a model, of bytes, whose end is token 1."""

    class Model:
        config = dsv4.Config.from_hf(NANO)

    def use(*replies):
        stream = Scripted(*replies)
        monkeypatch.setattr(dsv4, "generate_stream", stream)
        monkeypatch.setattr(dsv4, "DeepSeekV4", lambda *_, **__: Model())
        monkeypatch.setattr(dsv4, "from_pretrained", lambda *_, **__: Model())
        return stream

    return use


def shown(done):
    """What was printed, without the prompts and the times."""
    assert done.returncode == 0, done.stderr
    text = re.sub(r"\[(\d+) tokens, [\d.]+ a second\]", r"[\1]", done.stdout)
    return text.replace("> ", "")


def test_thinking_is_dimmed_and_older_thinking_is_left_out(talk, scripted):
    stream = scripted(f"so ö{END_THINK}Hello.{EOS}", f"sum{END_THINK}4.{EOS}")
    done = talk(["Hi", "", "2+2?"], "--dim", "--system", "Be brief.")
    dim = "\x1b[2m{}\x1b[0m".format
    text = shown(done)
    for character in "so ö":
        assert dim(character) in text
    plain = re.sub(r"\x1b\[\dm", "", text)
    assert plain == "so öHello.\n[20]\nsum4.\n[14]\n\n"
    assert "Hello." in text.replace("\x1b[0m", "")  # not dimmed
    first, second = stream.prompts
    assert first.endswith("Be brief.<｜User｜>Hi<｜Assistant｜><think>")
    assert second == first.replace("<think>", END_THINK) + (
        f"Hello.{EOS}<｜User｜>2+2?<｜Assistant｜><think>"
    )


def test_calls_are_shown_and_answered(talk, scripted, tmp_path, monkeypatch):
    accept_stand_ins(monkeypatch)
    write_encoding(tmp_path, f"TOOLS_TEMPLATE = {TOOLS!r}\n")
    (tmp_path / "tools.json").write_text(json.dumps([F]))
    stream = scripted(f"I call.{CALLS}{EOS}", f"It is 3.{EOS}")
    release = "--release", tmp_path, "--tools", tmp_path / "tools.json"
    done = talk(["f?", "three"], "--no-thinking", "--bytes", *release)
    text = shown(done)
    assert text.startswith(f"I call.{CALLS}\n") and "\x1b" not in text
    assert 'f({"x": [1]}) returns: It is 3.\n' in text
    first, second = stream.prompts
    assert "Follow them.\n<｜User｜>f?" in first
    assert second.startswith(first)
    expected = f"{CALLS}{EOS}<｜User｜><tool_result>three</tool_result><｜Assistant｜>"
    assert f"I call.{expected}{END_THINK}" in second


def test_an_answer_that_is_not_of_the_format_is_left_out(talk, scripted):
    stream = scripted(f"no end{EOS}", f"cut off{END_THINK}here")
    text = shown(talk(["Hi", "Again"]))
    assert "left out: parse: the thinking has no end" in text
    assert stream.prompts[1] == stream.prompts[0].replace("Hi", "Again")


@pytest.mark.parametrize("more", [["--effort", "max"], ["--tools", "tools.json"]])
def test_what_a_release_lacks_is_said_before_it_is_read(more, talk, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([F]))
    more = [tmp_path / m if m == "tools.json" else m for m in more]
    done = talk(["Hi"], "--release", tmp_path, *more)
    assert done.returncode == 1 and done.stdout == ""
    assert re.match(r"chat.py: encode\(\w+=.*encoding_dsv4.py, which is", done.stderr)


def of_letters(directory):
    """A tokenizer of letters and special tokens, within the 128 tokens of a model."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["<｜begin▁of▁sentence｜>", EOS, "\n", *map(chr, range(32, 127))]
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    own = tokenizers.Tokenizer(model)
    own.add_special_tokens(letters[:2])
    others = ["<｜User｜>", "<｜Assistant｜>", "<think>", END_THINK, DSML]
    own.add_tokens([*others, *TASKS.values()])
    own.decoder = tokenizers.decoders.Fuse()
    own.save(str(directory / "tokenizer.json"))


@pytest.mark.slow
def test_a_release_answers_in_its_own_tokens(talk, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(NANO, release)
    of_letters(release)
    few = "--max-new-tokens", 5, "--temperature", 0, "--release", release
    done = talk(["Hi <think> there"], *few)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[\d tokens, [\d.]+ a second\]", done.stdout)


def test_a_release_answers_in_bytes(talk, tmp_path):
    config = one_layer(vocab_size=256)
    release = write_release(tmp_path, config, random_tensors(config))
    few = "--max-new-tokens", 3, "--temperature", 0, "--no-thinking", "--bytes"
    done = talk(["Größe?"], *few, "--release", release)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[[123] tokens, [\d.]+ a second\]\n", done.stdout)
