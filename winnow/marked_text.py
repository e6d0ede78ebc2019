"""The text that a model is given, with the parts that the loss counts marked, for a terminal."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

# What a terminal obeys, or what reorders a line, but for line feeds and tabs.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_OPEN, _CLOSE = "\u27e6", "\u27e7"  # white square brackets

Span = Sequence[int]
"""[start, end) in characters of a text."""


def printable(text: str) -> str:
    """The text with what a terminal obeys written out."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def marked(text: str, spans: Sequence[Span], kept: Span | None = None) -> str:
    """The text with brackets around the spans, which do not overlap and lie in `kept`; in place of the rest, how long it is."""
    first, last = (0, len(text)) if kept is None else kept
    parts, at = [_cut(first)], first
    for start, end in sorted(map(tuple, spans)):
        parts += [text[at:start], _OPEN, text[start:end], _CLOSE]
        at = end
    return printable("".join([*parts, text[at:last], _cut(len(text) - last)]))


def plain(row: dict[str, Any]) -> tuple[str, list[Span]]:
    """The messages of a row, each under its role, and what of them the loss counts: no model's text, but what there is for a chat
    template to render."""
    if row["messages"] is None:
        text = row["text"] or ""
        return text, [(0, len(text))]
    text = f"tools: {as_json(row['tools'])}\n" if row["tools"] else ""
    spans: list[Span] = []
    for message in row["messages"]:
        text += f"{message['role']}: "
        start = len(text)
        text += "\n".join(parts_of(message))
        if counts(message):
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def parts_of(message: dict[str, Any]) -> list[str]:
    """The texts of a message: its reasoning, its content and its calls, of those that it has."""
    calls = (as_json(call["function"]) for call in message.get("tool_calls") or ())
    return [part for part in (message.get("reasoning_content"), message["content"], *calls) if part]


def counts(message: dict[str, Any]) -> bool:
    """Whether the loss counts the message."""
    return message["role"] == "assistant" and bool(message.get("counts", True))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def lines(row: dict[str, Any], rendered: dict[str, Any] | None) -> Iterator[str]:
    """A row of a dataset, and what a model makes of it where there is one: a heading, and the text."""
    name = f"row {row['index']} (id {printable(row['id'])})"
    if rendered is None:
        yield f"--- {name}"
        yield marked(*plain(row))
        return
    tokens, unusable, text = rendered["tokens"], rendered["unusable"], rendered["text"]
    if unusable is not None:
        yield f"--- {name} is unusable: {unusable['reason']}: {printable(unusable['detail'])}"
    else:
        cut = f", cut from {tokens['total']:,}" if rendered["truncated"] else ""
        notes = f"; {', '.join(rendered['notes'])}" if rendered["notes"] else ""
        yield f"--- {name}: {tokens['kept']:,} tokens{cut}, {tokens['counted']:,} counted{notes}"
    if text is not None:
        yield marked(text, rendered["spans"], rendered["kept"])


def _cut(characters: int) -> str:
    return f"[{characters:,} character{'' if characters == 1 else 's'} cut]" if characters else ""
