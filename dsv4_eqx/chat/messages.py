"""The messages of a conversation, validated and joined into turns.

The format has no turn for the result of a tool: results become blocks of a user's turn,
in the order of their calls.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dsv4_eqx.chat.special import BLANK, TASKS

CALL: Final = "encode"
_ROLES: Final = (
    "system",
    "developer",
    "user",
    "tool",
    "assistant",
    "latest_reminder",
)
_KEYS: Final = frozenset(
    "role content tools tool_calls tool_call_id reasoning_content response_format task "
    "wo_eos mask".split()
)


class Block(NamedTuple):
    """A part of a user's turn: what the user wrote, or what a tool returned."""

    text: str
    is_result: bool
    call_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message, or several that the format writes as one."""

    role: str
    content: str = ""
    blocks: tuple[Block, ...] = ()  # of a user, instead of the content
    tools: tuple[Mapping[str, Any], ...] = ()  # their functions
    response_format: Any = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str = ""
    task: str | None = None
    ends: bool = True  # whether the end of an assistant's message is written


def turns_of(messages: Any, name: str = "messages") -> list[Turn]:
    """The turns of a conversation; ValueError naming the message that is none."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"{CALL}({name}={messages!r:.200}): must be a list.")
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        where = f"{CALL}: {name}[{i}]"
        turn = _turn(where, message)
        if turn.role != "user":
            turns.append(turn)
            continue
        is_result = turn.blocks[0].is_result
        before = turns[-1] if turns and turns[-1].role == "user" else None
        if before is None or (before.task is not None and not is_result):
            turns.append(turn)
            continue
        if turn.task is not None:
            raise ValueError(
                f"{where}: task={turn.task!r} on a message that continues the user's "
                "turn before it would be lost; give it to the first one, or join them."
            )
        turns[-1] = dataclasses.replace(before, blocks=before.blocks + turn.blocks)
    return turns


def in_order_of_calls(turns: Iterable[Turn]) -> list[Turn]:
    """The turns, the results in each of them in the order of the calls before."""
    order, found = {}, []
    for turn in turns:
        if turn.tool_calls:
            calls = enumerate(turn.tool_calls)
            ids = (
                (call.get("id") or call["function"].get("id"), i) for i, call in calls
            )
            order = {call_id: i for call_id, i in ids if call_id}
        results = [block for block in turn.blocks if block.is_result]
        if len(results) > 1 and order:
            # One whose call is not known goes with the first.
            results.sort(key=lambda block: order.get(block.call_id, 0))
            rest = iter(results)
            blocks = (next(rest) if b.is_result else b for b in turn.blocks)
            turn = dataclasses.replace(turn, blocks=tuple(blocks))
        found.append(turn)
    return found


def as_json(where: str, value: Any) -> str:
    """JSON as the format has it; ValueError if it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def functions_of(where: str, tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions of tools in the schema that OpenAI's interface has."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise ValueError(f"{where}: tools={tools!r:.200} must be a list.")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if not named or tool.get("type", "function") != "function":
            raise ValueError(
                f"{where}: tools[{i}] is {tool!r:.200}; it must be "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}.'
            )
    return tuple(tool["function"] for tool in tools)


def _turn(where: str, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {message!r:.200}; it must be a mapping.")
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(
            f"{where} has the role {role!r}; it must be one of {', '.join(_ROLES)}."
        )
    unknown = [k for k, v in message.items() if k not in _KEYS and v is not None]
    if unknown:
        raise ValueError(
            f"{where} has {unknown}, which the format does not have: remove them "
            f"(known: {', '.join(sorted(_KEYS))})."
        )
    task = message.get("task")
    if task is not None and task not in TASKS:
        raise ValueError(f"{where} has the task {task!r}; known are {list(TASKS)}.")
    if role == "tool":
        text, call_id = (
            _result(where, message.get("content")),
            message.get("tool_call_id"),
        )
        if not isinstance(call_id, str | None):
            raise ValueError(f"{where} has the tool_call_id {call_id!r:.200}, no text.")
        return Turn("user", blocks=(Block(text, True, call_id),))
    content = _content(where, role, message.get("content"))
    if role == "user":  # its tools say nothing, as in the official encoding
        return Turn("user", blocks=(Block(content, False),), task=task)
    reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str | None):
        raise ValueError(f"{where} has the reasoning {reasoning!r:.200}, not a text.")
    return Turn(
        role,
        content,
        tools=functions_of(where, message.get("tools")),
        response_format=message.get("response_format"),
        tool_calls=_calls(where, message.get("tool_calls")),
        reasoning=reasoning or "",
        task=task,
        ends=not message.get("wo_eos"),
    )


def _content(where: str, role: str, content: Any) -> str:
    if content is None and role in ("system", "assistant"):
        return ""
    if not isinstance(content, str):
        hint = "; join its parts" if isinstance(content, list) else ""
        raise ValueError(f"{where} has the content {content!r:.200}, not a text{hint}.")
    if role == "developer" and not content:
        raise ValueError(f"{where} has no content, which a developer's must have.")
    return content


def _result(where: str, content: Any) -> str:
    """What a tool returned: a text, or parts of which only texts can be written."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(
        isinstance(part, Mapping)
        and (part.get("type") != "text" or isinstance(part.get("text"), str))
        for part in content
    ):
        raise ValueError(
            f"{where} has the content {content!r:.200}; it must be a text, or a list "
            'of {"type": "text", "text": ...} and other parts.'
        )
    return BLANK.join(
        part["text"]
        if part.get("type") == "text"
        else f"[Unsupported {part.get('type')}]"
        for part in content
    )


def _calls(where: str, calls: Any) -> tuple[Mapping[str, Any], ...]:
    if calls is None:
        return ()
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise ValueError(f"{where}: tool_calls={calls!r:.200} must be a list.")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if not named or (function or {}).get("arguments") is None:
            raise ValueError(
                f"{where}: tool_calls[{i}] is {call!r:.200}; it must be "
                '{"type": "function", "function": {"name": ..., "arguments": JSON}}.'
            )
    return tuple(calls)
