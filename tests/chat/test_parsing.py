"""Answers as messages, whole and cut off, and that encoding brings them back."""

import ast
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_eqx import chat
from dsv4_eqx.chat.special import BOS, DSML, END_THINK, EOS, THINK

HI = {"role": "user", "content": "Hi"}
BLOCK = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="s" string="true">a"b</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="l" string="false">[1, "é"]</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)
CALLS = [("f", '{"s": "a\\"b", "n": 3, "l": [1, "é"]}'), ("now", "{}")]


def message(content, reasoning="", calls=()):
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }


GOOD = {
    "P1": (True, f"r</think>c{EOS}", message("c", "r")),
    "P2": (False, f"Hello{EOS}", message("Hello")),
    "P3": (
        True,
        f"R</think>Let me look.{BLOCK}{EOS}",
        message("Let me look.", "R", CALLS),
    ),
    "P4": (True, f"R</think>Let me look.{BLOCK}", message("Let me look.", "R", CALLS)),
    "P10": (True, f"R</think>\n\nhi{EOS}", message("\n\nhi", "R")),
    "empty": (False, EOS, message("")),
    "no calls": (
        False,
        f"c\n\n<{DSML}tool_calls>\n</{DSML}tool_calls>",
        message("c"),
    ),
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("partial", [False, True])
def test_what_is_well_formed_is_read(case, partial):
    thinking, text, expected = GOOD[case]
    assert chat.parse(text, thinking=thinking, partial=partial) == expected


def test_text_of_an_argument_comes_back_unchanged():
    value = 'a\n<b>"quoted" \\ {"x": 1}</b>\n\n'
    text = BLOCK.replace('a"b', value)
    (call, _) = chat.parse(text, thinking=False)["tool_calls"]
    assert json.loads(call["function"]["arguments"])["s"] == value


BAD = {
    "P5": (True, "R</think>x", "cut off"),
    "P6": (True, f"R{EOS}", "thinking has no end"),
    "P6, block": (True, f"R{BLOCK}</think>{EOS}", "before </think>"),
    "P7": (False, f"x</think>y{EOS}", "</think> inside of the text"),
    "P8": (False, BLOCK.replace(">3<", ">3x<"), "argument 'n' of 'f' is not JSON"),
    "no number": (False, BLOCK.replace(">3<", ">NaN<"), "NaN is none"),
    "P9": (False, f"a{EOS}b", "text after <"),
    "P9, block": (False, f"{BLOCK}z{EOS}", "'z<.* after the tool calls"),
    "twice": (False, BLOCK.replace('"n"', '"s"'), "'s' of 'f' comes twice"),
    "no end": (False, BLOCK[:-5] + EOS, "where a tool call should begin or end"),
    "no argument": (False, BLOCK.replace('string="true"', ""), "argument of 'f' bel"),
    "no bracket": (False, BLOCK.replace("calls>\n", "calls\n", 1), "not '>"),
    "special": (False, f"{BOS}a{EOS}", "inside of the text"),
    "two thoughts": (True, f"a{THINK}b</think>{EOS}", "inside of the text"),
    "open block": (False, f"{BLOCK[:-18]}{EOS}", "where a tool call"),
    "end within": (
        False,
        BLOCK.replace(
            'a"b</｜DSML｜parameter>', "a</｜DSML｜parameter>b</｜DSML｜parameter>"
        ),
        "argument of 'f' belongs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_of_the_format_is_one_error(case):
    thinking, text, match = BAD[case]
    with pytest.raises(ValueError, match=match) as error:
        chat.parse(text, thinking=thinking)
    assert str(error.value).startswith("parse: ") and "\n" not in str(error.value)


def test_what_was_cut_off_is_read_as_far_as_it_goes():
    def parts(text, thinking=True):
        found = chat.parse(text, thinking=thinking, partial=True)
        return found["reasoning_content"], found["content"], len(found["tool_calls"])

    assert parts("I thi") == ("I thi", "", 0)
    assert parts("R</think>It is") == ("R", "It is", 0)
    for end in (2, 40, len(BLOCK) - 1):
        cut = BLOCK[:end]
        assert parts(f"R</think>c{cut}") == ("R", f"c{cut}", 0)
    assert parts("It is", thinking=False) == ("", "It is", 0)
    with pytest.raises(ValueError, match="thinking has no end"):
        parts(f"I thi{EOS}")


@pytest.mark.usefixtures("without_shape_checks")
def test_only_texts_are_parsed():
    with pytest.raises(ValueError, match="parse.text=3"):
        chat.parse(3, thinking=False)


# Text without surrogates and without the format's own marks.
LETTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(LETTERS, max_size=12).filter(
    lambda text: not any(token in text for token in (BOS, EOS, THINK, END_THINK, DSML))
)
SPICED = st.lists(
    st.one_of(TEXTS, st.sampled_from(["\n\n", '"', "\\", "<", "</", ">\n", "｜", "é"])),
    max_size=6,
).map("".join)
NAMES = st.text("abc_é-", min_size=1, max_size=5)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), SPICED
    ).filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    st.booleans(),
    SPICED,
    SPICED,
    st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3),
)
def test_what_is_encoded_is_parsed_back(thinking, content, reasoning, calls):
    """Also with arguments of JSON in each other, in any letters."""
    calls = [(name, json.dumps(a, ensure_ascii=False)) for name, a in calls]
    written = message(content, reasoning if thinking else "", calls)
    prompt = chat.encode([HI], thinking=thinking)
    whole = chat.encode([HI, written], thinking=thinking)
    assert whole.startswith(prompt)
    reply = whole[len(prompt) :]
    assert chat.parse(reply, thinking=thinking) == written
    # In pieces of any size, nothing is lost and nothing is in another part.
    for size in (1, 3, len(reply)):
        parts, shown = chat.ReplyParts(thinking=thinking), {}
        for i in range(0, len(reply), size):
            for name, text in parts.feed(reply[i : i + size]):
                shown[name] = shown.get(name, "") + text
        assert list(parts.close()) == []
        assert shown.get("reasoning", "") == written["reasoning_content"]
        assert shown.get("content", "") == content
        assert bool(calls) == ("tool_calls" in shown)
        block = shown.get("tool_calls", "")
        assert len(chat.parse(block + EOS, thinking=False)["tool_calls"]) == len(calls)


def test_what_may_become_an_end_is_held_back_until_it_is_none():
    parts = chat.ReplyParts(thinking=True)
    assert list(parts.feed("I </thin")) == [("reasoning", "I ")]
    assert list(parts.feed("g</think>Yes\n\n<")) == [
        ("reasoning", "</thing"),
        ("content", "Yes"),
    ]
    assert list(parts.feed("b>\n")) == [("content", "\n\n<b>")]
    assert list(parts.close()) == [("content", "\n")]
    assert list(parts.feed(f"!{EOS}x")) == [("content", "!")]
    assert list(parts.feed("y")) == list(parts.close()) == []


def test_the_package_needs_nothing_but_python():
    allowed = set(
        "ast collections dataclasses hashlib json os pathlib re secrets typing".split()
    )
    for path in pathlib.Path(chat.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            others = [n for n in names if not n.startswith("dsv4_eqx.chat")]
            assert {name.split(".")[0] for name in others} <= allowed
