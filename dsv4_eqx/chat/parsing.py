"""What the model answered, as a message: reasoning, content and tool calls."""

import json
import re
from typing import Any, Final

from dsv4_eqx.chat.special import (
    BEGIN_CALLS,
    BOS,
    CALLS,
    DSML,
    END_THINK,
    EOS,
    THINK,
)

_SPECIAL: Final = (BOS, EOS, THINK, END_THINK, DSML)
_END_CALLS: Final = f"</{DSML}{CALLS}>"
_END_PARAMETER: Final = f"/{DSML}parameter"
_INVOKE: Final = re.compile(f'<{DSML}invoke name="(.*?)">\n', re.DOTALL)
_END_INVOKE: Final = f"</{DSML}invoke>\n"
_PARAMETER: Final = re.compile(
    f'<{DSML}parameter name="(.*?)" string="(true|false)">(.*?)</{DSML}parameter>\n',
    re.DOTALL,
)


def parse(text: str, *, thinking: bool, partial: bool = False) -> dict[str, Any]:
    """The message that the model wrote after a prompt of `encode`.

    **Arguments:**

    - `text`: all that it wrote, the token that ends it included.
    - `thinking`: whether the prompt asked it to think.
    - `partial`: also takes a text that was cut off. Thinking that has no end is all
        reasoning; tool calls that are not whole stay in the content.

    **Returns:** `role`, `content`, `reasoning_content` and `tool_calls`, in OpenAI's
    schema; the calls have no ids, and their arguments are JSON texts.

    **Raises:** ValueError if the text is not as the format has it: thinking or a text
    without its end, a special token inside of it, arguments that are no JSON.
    """
    if not isinstance(text, str):
        raise ValueError(f"parse(text={text!r:.200}): must be a text.")
    reasoning, rest = _reasoning(text, thinking, partial)
    content, calls = rest, []
    end, begin = rest.find(EOS), rest.find(BEGIN_CALLS)
    if begin >= 0 and (end < 0 or begin < end):
        try:
            calls, content = _calls(rest[begin + len(BEGIN_CALLS) :]), rest[:begin]
        except ValueError:
            if not partial or end >= 0:
                raise
            return _message(reasoning, rest, [])
    elif end >= 0:
        content = rest[:end]
        if rest[end:] != EOS:
            raise ValueError(f"parse: text after {EOS}: {rest[end:]!r:.200}.")
    elif not partial:
        raise ValueError(f"parse: the text has no {EOS}: it was cut off.")
    for part in (reasoning, content):
        for token in _SPECIAL:
            if token in part:
                raise ValueError(f"parse: {token} inside of the text {part!r:.200}.")
    return _message(reasoning, content, calls)


def _message(reasoning: str, content: str, calls: list[Any]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }


def _reasoning(text: str, thinking: bool, partial: bool) -> tuple[str, str]:
    """What was thought, and the rest."""
    if not thinking:
        return "", text
    reasoning, found, rest = text.partition(END_THINK)
    if BEGIN_CALLS in reasoning:
        raise ValueError(f"parse: tool calls before {END_THINK}.")
    if not found and (EOS in text or not partial):
        raise ValueError(f"parse: the thinking has no end, which is {END_THINK}.")
    return reasoning, rest


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls of a block, from behind its name on to the end of the text."""
    if not text.startswith(">\n"):
        raise ValueError(f"parse: {text[:20]!r} after {BEGIN_CALLS!r}, not '>\\n'.")
    calls, place = [], 2
    while not text.startswith(_END_CALLS, place):
        invoke = _INVOKE.match(text, place)
        if invoke is None or DSML in invoke[1]:
            found = text[place : place + 40]
            raise ValueError(f"parse: {found!r} where a tool call should begin or end.")
        arguments, place = _arguments(invoke[1], text, invoke.end())
        function = {"name": invoke[1], "arguments": arguments}
        calls.append({"type": "function", "function": function})
    rest = text[place + len(_END_CALLS) :]
    if rest not in ("", EOS):
        raise ValueError(f"parse: {rest!r:.200} after the tool calls.")
    return calls


def _arguments(name: str, text: str, place: int) -> tuple[str, int]:
    """The arguments of a call as a JSON text, and the place behind the call."""
    found: dict[str, str] = {}
    # Without arguments there is an empty line.
    if text.startswith(f"\n{_END_INVOKE}", place):
        return "{}", place + 1 + len(_END_INVOKE)
    while not text.startswith(_END_INVOKE, place):
        parameter = _PARAMETER.match(text, place)
        # None that goes on over the end of another.
        if parameter is None or any(_END_PARAMETER in p for p in parameter.groups()):
            shown = text[place : place + 40]
            raise ValueError(f"parse: {shown!r} where an argument of {name!r} belongs.")
        key, is_text, value = parameter.groups()
        if key in found:
            raise ValueError(f"parse: the argument {key!r} of {name!r} comes twice.")
        found[key] = json.dumps(value, ensure_ascii=False)
        if is_text == "false":
            found[key] = _json(f"the argument {key!r} of {name!r}", value)
        place = parameter.end()
    pairs = (f"{json.dumps(k, ensure_ascii=False)}: {v}" for k, v in found.items())
    return "{" + ", ".join(pairs) + "}", place + len(_END_INVOKE)


def _json(what: str, value: str) -> str:
    """`value` as it is; ValueError if it is no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is none")

    try:
        json.loads(value, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"parse: {what} is not JSON: {error}") from error
    return value
