"""A conversation as the prompt that DeepSeek-V4 was trained on, exactly.

The format is that of the releases' own `encoding_dsv4.py`. A prompt is made of pieces,
special tokens and text, so that a special token's name in someone's text stays text.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dsv4_eqx.chat.messages import (
    CALL,
    Turn,
    as_json,
    functions_of,
    in_order_of_calls,
    turns_of,
)
from dsv4_eqx.chat.special import (
    ASSISTANT,
    BLANK,
    BOS,
    CALLS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
    Piece,
    TextTokenizer,
)
from dsv4_eqx.chat.texts import ChatTexts

_FORMAT: Final = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to "
    "reply:\n"
)
_TURNS_OF_USERS: Final = ("user", "developer")
_ALWAYS_KEPT: Final = ("user", "system", "latest_reminder")


class _Conversation(NamedTuple):
    turns: list[Turn]
    thinking: bool
    keeps_reasoning: bool
    last_user: int  # -1 where there is none
    texts: ChatTexts


def encode(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    texts: ChatTexts | None = None,
    context: Sequence[Mapping[str, Any]] = (),
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> str:
    """A conversation as the model's prompt.

    The text holds its special tokens, the one at the beginning included. Do not make
    token ids of it where someone else wrote a message: `encode_ids` does that safely.

    **Arguments:**

    - `messages`: mappings with a `role` ("system", "developer", "user", "tool",
        "assistant" or "latest_reminder") and its `content`; an assistant's may have
        `reasoning_content` and `tool_calls`, a tool's has the `tool_call_id`.
    - `thinking`: whether the model is to think before it answers.
    - `effort`: how much it is to think, as far as the release knows it.
    - `tools`: functions that it may call, in OpenAI's schema. They are written in the
        first message if that is a system's or developer's, else before it.
    - `texts`: from `read_texts`; effort and tools need them.
    - `context`: messages before, which have been encoded already.
    - `drop_thinking`: leaves out what was thought before the last user's turn. With
        tools, all of it stays, as in the official encoding.
    - `add_bos`: begins with the token that begins a text, if there is no context.

    **Raises:** ValueError naming the message that is none of the format, an effort that
    the release does not have, a tool of an unknown schema, or the text that is missing.
    """
    options = effort, tools, texts, context, drop_thinking, add_bos
    return "".join(piece.text for piece in _pieces(messages, thinking, *options))


def encode_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    *,
    thinking: bool,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    texts: ChatTexts | None = None,
    context: Sequence[Mapping[str, Any]] = (),
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> list[int]:
    """A conversation as token ids, in which only the format writes special tokens.

    A special token's name in a message becomes the ids of its letters.

    **Arguments, raises:** as for `encode`, and

    - `tokenizer`: from `load_tokenizer`, a `ByteTokenizer`, or a `ChatTokenizer` around
        one of the package `tokenizers`. ValueError if it lacks a special token.
    """
    options = effort, tools, texts, context, drop_thinking, add_bos
    ids: list[int] = []
    text = ""
    for piece in (*_pieces(messages, thinking, *options), Piece("", is_special=True)):
        if not piece.is_special:
            text += piece.text
            continue
        # Text between two special tokens is tokenized as one.
        ids += map(int, tokenizer.encode_text(text)) if text else ()
        ids += map(int, tokenizer.encode_special(piece.text)) if piece.text else ()
        text = ""
    return ids


def _pieces(
    messages: Any,
    thinking: bool,
    effort: str | None,
    tools: Any,
    texts: ChatTexts | None,
    context: Any,
    drop_thinking: bool,
    add_bos: bool,
) -> list[Piece]:
    if not isinstance(thinking, bool):
        raise ValueError(f"{CALL}(thinking={thinking!r}): must be True or False.")
    texts = ChatTexts() if texts is None else texts
    prefix = texts.effort(effort, thinking)
    before, turns = turns_of(context, "context"), turns_of(messages)
    if tools:
        turns = _with_tools(turns, functions_of(CALL, tools), bool(before))
    turns = in_order_of_calls(before + turns)
    keeps = not drop_thinking or any(turn.tools for turn in turns)
    shown = [(turn, i >= len(before)) for i, turn in enumerate(turns)]
    if thinking and not keeps:
        shown = list(_without_old_reasoning(shown))
    turns = [turn for turn, _ in shown]
    every = _Conversation(turns, thinking, keeps, _last_user(turns), texts)
    pieces = [Piece(BOS, is_special=True)] if add_bos and not before else []
    for i, (_, is_new) in enumerate(shown):
        if is_new:
            pieces += [Piece(prefix)] if i == 0 else []
            pieces += [*_turn(every, i), *_transition(every, i)]
    return pieces


def _with_tools(
    turns: list[Turn], functions: tuple[Mapping[str, Any], ...], has_context: bool
) -> list[Turn]:
    """The turns with tools in the first one, or in one before it."""
    if has_context or any(turn.tools for turn in turns):
        raise ValueError(
            f"{CALL}(tools=...): the tools belong to the first message of the whole "
            "conversation; give them here or in a message, and not with a context."
        )
    if turns and turns[0].role in ("system", "developer"):
        return [dataclasses.replace(turns[0], tools=functions), *turns[1:]]
    return [Turn("system", tools=functions), *turns]


def _last_user(turns: list[Turn]) -> int:
    places = (i for i, turn in enumerate(turns) if turn.role in _TURNS_OF_USERS)
    return max(places, default=-1)


def _without_old_reasoning(
    shown: list[tuple[Turn, bool]],
) -> Iterator[tuple[Turn, bool]]:
    """Before the last user's turn, neither reasoning nor what developers wrote."""
    last = _last_user([turn for turn, _ in shown])
    for i, (turn, is_new) in enumerate(shown):
        if i >= last or turn.role in _ALWAYS_KEPT:
            yield turn, is_new
        elif turn.role == "assistant":
            yield dataclasses.replace(turn, reasoning=""), is_new


def _turn(every: _Conversation, i: int) -> Iterator[Piece]:
    """What a turn says."""
    turn = every.turns[i]
    if turn.role == "assistant":
        yield from _assistant(every, i)
        return
    if turn.role in _TURNS_OF_USERS:
        yield Piece(USER, is_special=True)
    elif turn.role == "latest_reminder":
        yield Piece(REMINDER, is_special=True)
    if turn.role == "user":
        yield Piece(BLANK.join(_block(*block[:2]) for block in turn.blocks))
        return
    yield Piece(turn.content)
    if turn.role != "latest_reminder" and turn.tools:
        where = f"{CALL}: a function of tools"
        schemas = "\n".join(as_json(where, function) for function in turn.tools)
        yield Piece(BLANK)
        yield from every.texts.introduction(schemas)
    if turn.role != "latest_reminder" and turn.response_format:
        schema = as_json(f"{CALL}: response_format", turn.response_format)
        yield Piece(BLANK + _FORMAT + schema)


def _block(text: str, is_result: bool) -> str:
    return f"<tool_result>{text}</tool_result>" if is_result else text


def _assistant(every: _Conversation, i: int) -> Iterator[Piece]:
    turn = every.turns[i]
    is_answer_to_task = i > 0 and every.turns[i - 1].task is not None
    is_shown = every.keeps_reasoning or i > every.last_user
    if every.thinking and is_shown and not is_answer_to_task:
        yield Piece(turn.reasoning)
        yield Piece(END_THINK, is_special=True)
    yield Piece(turn.content)
    if turn.tool_calls:
        yield Piece(BLANK)
        yield from _tag(f"{CALLS}>\n")
        for call in turn.tool_calls:
            yield from _call(call["function"])
        yield from _tag(f"{CALLS}>", end=True)
    if turn.ends:
        yield Piece(EOS, is_special=True)


def _tag(text: str, *, end: bool = False) -> Iterator[Piece]:
    yield Piece("</" if end else "<")
    yield Piece(DSML, is_special=True)
    yield Piece(text)


def _call(function: Mapping[str, Any]) -> Iterator[Piece]:
    yield from _tag(f'invoke name="{function["name"]}">\n')
    arguments = _arguments(function)
    for name, value in arguments.items():
        is_text = isinstance(value, str)
        yield from _tag(f'parameter name="{name}" string="{str(is_text).lower()}">')
        where = f"{CALL}: the argument {name!r} of {function['name']!r}"
        yield Piece(value if is_text else as_json(where, value))
        yield from _tag("parameter>\n", end=True)
    if not arguments:
        yield Piece("\n")
    yield from _tag("invoke>\n", end=True)


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments by name; what is no JSON text is one argument of that name."""
    given = function["arguments"]
    try:
        found = json.loads(given)
    except (TypeError, ValueError, RecursionError):
        return {"arguments": given}
    if not isinstance(found, dict):
        raise ValueError(
            f"{CALL}: the arguments of {function['name']!r} are {given!r:.200}; they "
            "must be the text of a JSON object."
        )
    return found


def _transition(every: _Conversation, i: int) -> Iterator[Piece]:
    """What follows a turn where the model, or a reminder, comes next."""
    turn = every.turns[i]
    if i + 1 < len(every.turns):
        if every.turns[i + 1].role not in ("assistant", "latest_reminder"):
            return
    thinks = every.thinking
    if turn.task is None:
        if turn.role not in _TURNS_OF_USERS:
            return
        thinks = thinks and (every.keeps_reasoning or i >= every.last_user)
    if turn.task in (None, "action"):
        yield Piece(ASSISTANT, is_special=True)
        yield Piece(THINK if thinks else END_THINK, is_special=True)
    if turn.task is not None:
        yield Piece(TASKS[turn.task], is_special=True)
