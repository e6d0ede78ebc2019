"""What a template is given: the messages of a sample, and the changes of them that some templates need."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from worker.text.templates import Message

SYSTEM_FOLDED = "system_folded"
USER_TURNS_MERGED = "user_turns_merged"
TRAILING_MESSAGES = "trailing_messages"

# A thought in the content, with or without the tag that opens it: some templates write that one themselves.
_THOUGHT = re.compile(r"(?:\A(?:(?!<think>).)*?|<think>(?:(?!<think>).)*?)</think>\s*", re.DOTALL)
_BETWEEN = "\n\n"


def prepared(messages: Sequence[Message], *, strip: bool) -> tuple[list[Message], tuple[bool, ...], list[str]]:
    """The messages up to the last reply, which of them are learnt, and notes. `strip`: without reasoning."""
    stop = next((i + 1 for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), 0)
    notes = [TRAILING_MESSAGES] if stop < len(messages) else []
    kept = messages[:stop]
    counted = tuple([m["role"] == "assistant" and m.get("counts", True) is not False for m in kept])
    if not strip and is_plain(kept):
        return list(kept), counted, notes
    return [_given(message, strip) for message in kept], counted, notes


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether a role and a content are all that each message has, and no message is a tool's."""
    return not [1 for message in messages if len(message) != 2 or message["role"] == "tool"]


def _given(message: Message, strip: bool) -> Message:
    given = {name: value for name, value in message.items() if name != "counts"}
    if message["role"] != "assistant":
        return given
    if strip:
        given.pop("reasoning_content", None)
        given["content"] = _THOUGHT.sub("", given["content"])
    elif "reasoning_content" in given:
        given["thinking"] = given["reasoning_content"]
    return given


Variant = tuple[list[Message], tuple[bool, ...], list[str]]


def variants(messages: list[Message], counted: tuple[bool, ...]) -> Iterator[Variant]:
    """The messages as they are, then as a template may want them: messages, which are learnt, notes."""
    for fold in (False, True):
        folded, counts, notes = messages, counted, []
        if fold:
            found = _folded(messages, counted)
            if found is None:
                return
            (folded, counts), notes = found, [SYSTEM_FOLDED]
        yield folded, counts, notes
        merged = _merged(folded, counts)
        if merged is not None:
            yield *merged, [*notes, USER_TURNS_MERGED]


def with_text_arguments(messages: list[Message]) -> list[Message] | None:
    """Arguments of tool calls as JSON text, for templates that put them after other text; None if there are none to change."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if not any(isinstance(call["function"]["arguments"], dict) for call in calls):
        return None
    return [
        {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def has_python_arguments(messages: list[Message], text: str) -> bool:
    """Whether a template wrote the arguments of a tool call as Python does, and not as JSON: it expects text."""
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    return any(isinstance(arguments, dict) and arguments and str(arguments) in text for arguments in calls)


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _folded(messages: list[Message], counted: tuple[bool, ...]) -> tuple[list[Message], tuple[bool, ...]] | None:
    """Each system message at the beginning of the user's turn that follows; None if there is none, or none follows."""
    kept: list[Message] = []
    counts: list[bool] = []
    waiting: list[str] = []
    for message, counts_here in zip(messages, counted, strict=True):
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": _BETWEEN.join([*waiting, message["content"]])}
            waiting = []
        kept.append(message)
        counts.append(counts_here)
    return None if waiting or len(kept) == len(messages) else (kept, tuple(counts))


def _merged(messages: list[Message], counted: tuple[bool, ...]) -> tuple[list[Message], tuple[bool, ...]] | None:
    """Turns of the user that follow one another as one; None if there are none."""
    kept: list[Message] = []
    counts: list[bool] = []
    for message, counts_here in zip(messages, counted, strict=True):
        if kept and message["role"] == kept[-1]["role"] == "user":
            kept[-1] = {**kept[-1], "content": kept[-1]["content"] + _BETWEEN + message["content"]}
            continue
        kept.append(message)
        counts.append(counts_here)
    return None if len(kept) == len(messages) else (kept, tuple(counts))
