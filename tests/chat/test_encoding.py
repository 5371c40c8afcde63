"""Conversations as prompts: the format's vectors, its properties, what is refused."""

import copy
import hashlib
import os
import pathlib
import re

import pytest

from dsv4_eqx import chat
from tests.chat.stand_ins import (
    ABSOLUTE,
    BEYOND,
    OFFICIAL,
    VECTORS,
    F,
    filled_tools,
    texts_like,
)

HI = {"role": "user", "content": "Hi"}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
by_name = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
# The type checker of the test run would answer before ours does.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


def digest(text):
    data = text.encode()
    return len(data), hashlib.sha256(data).hexdigest()[:16]


@by_name
def test_a_vector_of_the_format_is_encoded_as_it_is_there(vector):
    expected, messages = vector["text"], copy.deepcopy(vector["messages"])
    if "⟦" not in expected:
        assert digest(expected) == (vector["bytes"], vector["sha256"])
    for mark, text in {
        "ABS": ABSOLUTE,
        "BEY": BEYOND,
        "TOOLS": filled_tools(F),
    }.items():
        expected = expected.replace(f"⟦{mark}⟧", text)
    options = texts_like(vector["options"])
    assert chat.encode(messages, **options) == expected
    assert chat.encode(messages, **options) == expected
    assert messages == vector["messages"]  # left alone


@pytest.mark.exhaustive
@pytest.mark.skipif("DSV4_CHECKPOINT" not in os.environ, reason="needs a release")
@by_name
def test_a_vector_with_a_checkpoints_own_texts_has_its_digest(vector):
    """The directory is that of a release, DSV4_CHECKPOINT."""
    texts = chat.read_texts(pathlib.Path(os.environ["DSV4_CHECKPOINT"]))
    options = texts_like(vector["options"]) | {"texts": texts}
    if "family" in vector["options"]:
        efforts = {"high": "", "max": texts.efforts["high"]}
        options["texts"] = chat.ChatTexts(efforts, texts.tools)
    found = chat.encode(vector["messages"], **options)
    assert digest(found) == (vector["bytes"], vector["sha256"])


def test_what_is_in_the_context_is_looked_at_and_not_written():
    hello = {"role": "assistant", "reasoning_content": "greet", "content": "Hello."}
    sum_ = {"role": "user", "content": "2+2?"}
    first = chat.encode([HI, hello], thinking=True)
    expected = f"{BOS}<｜User｜>Hi<｜Assistant｜><think>greet</think>Hello.{EOS}"
    assert first == expected
    then = chat.encode([sum_], thinking=True, context=[HI, hello])
    assert then == "<｜User｜>2+2?<｜Assistant｜><think>"
    whole = chat.encode([HI, hello, sum_], thinking=True)
    assert whole == first.replace("<think>greet</think>", "</think>") + then


def test_of_a_context_whose_turns_are_dropped_no_new_message_is_lost():
    developer = {"role": "developer", "content": "D"}
    answer = {"role": "assistant", "reasoning_content": "R", "content": "A"}
    found = chat.encode([HI], thinking=True, context=[developer, answer])
    assert found == "<｜User｜>Hi<｜Assistant｜><think>"


def test_tools_are_written_in_the_first_message_or_before_it():
    text = filled_tools(F)
    rest = "<｜User｜>Hi<｜Assistant｜><think>"
    options = dict(thinking=True, tools=[F], texts=OFFICIAL)
    assert chat.encode([HI], **options) == f"{BOS}\n\n{text}{rest}"
    system = {"role": "system", "content": "S"}
    assert chat.encode([system, HI], **options) == f"{BOS}S\n\n{text}{rest}"
    inside = [{**system, "tools": [F]}, HI]
    assert (
        chat.encode(inside, thinking=True, texts=OFFICIAL) == f"{BOS}S\n\n{text}{rest}"
    )
    with pytest.raises(ValueError, match="belong to the first message"):
        chat.encode(inside, **options)
    with pytest.raises(ValueError, match="not with a context"):
        chat.encode([HI], context=[system], **options)


@pytest.mark.parametrize("tools", [None, [F]])
@pytest.mark.parametrize("thinking", [False, True])
def test_one_more_turn_of_the_user_only_appends(thinking, tools):
    """But for the last reasoning, where no tools are declared."""
    answer = {"role": "assistant", "reasoning_content": "R", "content": "A"}
    options = dict(thinking=thinking, tools=tools, texts=OFFICIAL)
    before = chat.encode([HI, answer], **options)
    after = chat.encode([HI, answer, HI], **options)
    assert before.count(EOS) == after.count(EOS) == 1
    if thinking and tools is None:
        before = before.replace("<think>R</think>", "</think>")
    assert after.startswith(before)
    assert thinking or tools or "<think>" not in after


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD = {
    "no list": ("Hi", r"messages='Hi'\): must be a list"),
    "no mapping": (["Hi"], r"messages\[0\] is 'Hi'"),
    "role": (
        [HI, {"role": "robot", "content": ""}],
        r"messages\[1\] has the role 'rob",
    ),
    "no role": ([{"content": "Hi"}], "has the role None"),
    "key": ([HI | {"name": "Anna"}], r"has \['name'\].*remove"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "not a text; join"),
    "no content": ([{"role": "user"}], "has the content None"),
    "no reminder": ([{"role": "latest_reminder"}], "has the content None"),
    "developer": ([{"role": "developer", "content": ""}], "has no content"),
    "result": ([{"role": "tool", "content": 3}], "content 3"),
    "result's part": ([{"role": "tool", "content": [{"type": "text"}]}], "list of"),
    "result's call": ([{"role": "tool", "content": "", "tool_call_id": 3}], "_id 3"),
    "reasoning": ([{"role": "assistant", "reasoning_content": 3}], "reasoning 3"),
    "task": ([HI | {"task": "sing"}], "task 'sing'; known are .*'action'"),
    "lost task": ([HI, HI | {"task": "query"}], "would be lost"),
    "calls": ([{"role": "assistant", "tool_calls": "f"}], "tool_calls='f' must"),
    "call": ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], r"calls\[0\] is"),
    "no arguments": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
        r"tool_calls\[0\] is .*\"arguments\": JSON",
    ),
    "tools": ([{"role": "system", "tools": F}], "must be a list"),
    "no tool": ([{"role": "system", "tools": [{"name": "f"}]}], r"tools\[0\] is"),
    "another tool": (
        [{"role": "system", "tools": [F | {"type": "web_search"}]}],
        r"tools\[0\] is .*web_search.*must be {\"type\": \"function\"",
    ),
    "no name": ([{"role": "system", "tools": [{"function": {}}]}], r"tools\[0\] is"),
    "not JSON": (
        [{"role": "system", "tools": [{"function": {"name": "f", "x": {1}}}]}],
        "a function of tools is not JSON",
    ),
    "format": ([{"role": "system", "response_format": float("nan")}], "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_format_does_not_have_is_refused(case):
    messages, match = BAD[case]
    with pytest.raises(ValueError, match=match) as error:
        chat.encode(messages, thinking=True, texts=OFFICIAL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", ["[1]", "null", "3"])
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "tool_calls": [call]}
    with pytest.raises(ValueError, match=re.escape(f"'f' are {arguments!r}")):
        chat.encode([HI, message], thinking=False)


@pytest.mark.parametrize("thinking", [None, 1, "thinking"])
def test_thinking_is_true_or_false(thinking):
    with pytest.raises(ValueError, match="thinking=.* True or False"):
        chat.encode([HI], thinking=thinking)


def test_an_effort_that_the_release_does_not_have_is_refused():
    preview = texts_like({"family": "preview"})
    for thinking in (False, True):
        with pytest.raises(ValueError, match=r"effort='low'.*\['high', 'max'\]"):
            chat.encode([HI], thinking=thinking, effort="low", **preview)
        with pytest.raises(
            ValueError, match=r"effort='huge'.*\['low', 'high', 'max'\]"
        ):
            chat.encode([HI], thinking=thinking, effort="huge")


def test_without_the_long_texts_plain_conversations_are_encoded():
    assert chat.encode([HI], thinking=False, effort="max").endswith("</think>")
    with pytest.raises(ValueError, match=r"effort='max'.*encoding_dsv4.py.*read_texts"):
        chat.encode([HI], thinking=True, effort="max")
    with pytest.raises(ValueError, match=r"tools=.*encoding_dsv4.py.*read_texts"):
        chat.encode([HI], thinking=True, tools=[F])
