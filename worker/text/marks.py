"""Marks around every part of a conversation, which show in what a template renders where each part went."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from worker.text.templates import Message

_TAG = re.compile(r"(</?think>)")


class Kind(IntEnum):
    """What a mark stands at."""

    CONTENT = 0
    REASONING = 1
    CALL = 2


@dataclass(frozen=True, slots=True)
class Pen:
    """How marks are written, of all messages or of replies alone, and around the white space of which parts."""

    left: str
    right: str
    all_roles: bool = True
    outside: tuple[Kind, ...] = ()

    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self.left}(\\d)(\\d)(\\d{{6}})(\\d+?){self.right}")

    def around(self, text: str, message: int, kind: Kind, part: int) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        if kind in self.outside:
            before, core, after = "", text, ""
        start, end = (f"{self.left}{kind}{side}{part:06d}{message}{self.right}" for side in (0, 1))
        return f"{before}{start}{core}{end}{after}"


# Private-use characters, which no template looks for. A template may strip white space, look at how a user's message begins
# or ends, or escape what is not ASCII.
PENS = (
    Pen("\ue000", "\ue001", outside=(Kind.CONTENT, Kind.REASONING)),
    Pen("\ue000", "\ue001", outside=(Kind.CONTENT,)),
    Pen("\ue000", "\ue001"),
    Pen("\ue000", "\ue001", all_roles=False),
    Pen("7391826450", "0546281937"),
    Pen("7391826450", "0546281937", all_roles=False),
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark before (`side` 0) or after (1) a part of a message, and its place in the text without marks.

    `part`: the number of the part among those of its kind in the message, from 0.
    """

    message: int
    kind: Kind
    part: int
    side: int
    place: int


@dataclass(frozen=True, slots=True)
class Trace:
    text: str
    marks: list[Mark]

    @classmethod
    def read(cls, rendered: str, pen: Pen) -> Self:
        parts: list[str] = []
        marks: list[Mark] = []
        length = stop = 0
        for match in pen.pattern().finditer(rendered):
            parts.append(rendered[stop : match.start()])
            length, stop = length + match.start() - stop, match.end()
            marks.append(Mark(int(match[4]), Kind(int(match[1]) % 3), int(match[3]), int(match[2]), length))
        return cls("".join([*parts, rendered[stop:]]), marks)

    def after_last_mark(self) -> str:
        return self.text[self.marks[-1].place :] if self.marks else self.text

    def last_message(self) -> int:
        return self.marks[-1].message if self.marks else -1


def parts_of(message: Message) -> dict[tuple[Kind, int], str]:
    """What of a message must be seen in the text, by the kind and number of the part: as it is given, none blank."""
    parts: dict[tuple[Kind, int], str] = {}
    for kind, part, text in _pieces(message):
        if kind is not None and text.strip():
            parts[kind, part] = text
    if message.get("reasoning_content", "").strip():
        parts[Kind.REASONING, 0] = message["reasoning_content"]
    for part, call in enumerate(message.get("tool_calls", ())):
        parts[Kind.CALL, part] = call["function"]["name"]
    return parts


def _pieces(message: Message) -> Iterator[tuple[Kind | None, int, str]]:
    """The content in pieces: of a reply, what stands before the end of a thought is reasoning, and the tags are no part."""
    pieces = _TAG.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
    for k, piece in enumerate(pieces):
        kind = Kind.REASONING if "</think>" in pieces[k:] else Kind.CONTENT
        yield (None if k % 2 else kind), k + 1, piece


def marked(messages: Sequence[Message], pen: Pen) -> list[Message]:
    return [
        _marked(message, i, pen) if pen.all_roles or message["role"] == "assistant" else message
        for i, message in enumerate(messages)
    ]


def _marked(message: Message, i: int, pen: Pen) -> Message:
    pieces = [piece if kind is None else pen.around(piece, i, kind, part) for kind, part, piece in _pieces(message)]
    given = {**message, "content": "".join(pieces)}
    for name in ("reasoning_content", "thinking"):
        if name in message:
            given[name] = pen.around(message[name], i, Kind.REASONING, 0)
    if "tool_calls" in message:
        given["tool_calls"] = [_marked_call(call, i, part, pen) for part, call in enumerate(message["tool_calls"])]
    return given


def _marked_call(call: dict[str, Any], i: int, part: int, pen: Pen) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": pen.around(function["name"], i, Kind.CALL, part)}}


def is_rewritten(messages: Sequence[Message], trace: Trace) -> bool:
    """Whether what stands between a pair of marks is not what was put between them."""
    parts = {i: parts_of(message) for i, message in enumerate(messages)}
    for start, end in itertools.pairwise(trace.marks):
        is_pair = (start.message, start.kind, start.part, 0, 1) == (
            end.message,
            end.kind,
            end.part,
            start.side,
            end.side,
        )
        between = trace.text[start.place : end.place].strip()
        if is_pair and between != parts[start.message][start.kind, start.part].strip():
            return True
    return False
