"""What a sample says, in pieces for a page: its messages, and the text that a model reads with what the loss counts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from winnow import marked_text

Kind = Literal["plain", "counted", "cut"]
Span = Sequence[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, or a text without any: `counts` says whether the loss counts it, `hidden` how many characters are not here."""

    role: str
    counts: bool
    parts: list[str]
    hidden: int


def turns(sample: Mapping[str, Any], most: int) -> list[Turn]:
    """The sample's tools, messages or text, in all at most so many characters of them; each message is there with its role.

    Args:
        sample: with `messages`, `tools` and `text`, of which some are null.
    """
    if sample["messages"] is None:
        said: list[tuple[str, bool, list[str]]] = [("text", True, [sample["text"] or ""])]
    else:
        tools = [("tools", False, [marked_text.as_json(sample["tools"])])] if sample["tools"] else []
        said = tools + [
            (message["role"], marked_text.counts(message), marked_text.parts_of(message))
            for message in sample["messages"]
        ]
    left, found = most, []
    for role, counts, parts in said:
        shown = []
        for part in parts:
            shown.append(part[:left])
            left -= len(shown[-1])
        hidden = sum(map(len, parts)) - sum(map(len, shown))
        found.append(Turn(role, counts, [part for part in shown if part], hidden))
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a text that a model reads: counted by the loss, only read, or cut off."""

    kind: Kind
    text: str


def pieces(text: str, spans: Sequence[Span], kept: Span | None, most: int) -> tuple[list[Piece], int]:
    """The first `most` characters of the text in pieces, and how many follow.

    Args:
        spans: [start, end) of what the loss counts, which do not overlap.
        kept: [start, end) of what is left after the cut to `max_length`; None: nothing takes part.
    """
    shown = text[:most]
    found = [Piece(kind, shown[start:end]) for kind, start, end in _kinds(len(text), spans, kept)]
    return [piece for piece in found if piece.text], len(text) - len(shown)


def _kinds(length: int, spans: Sequence[Span], kept: Span | None) -> Iterator[tuple[Kind, int, int]]:
    first, last = kept or (0, 0)
    yield "cut", 0, first
    at = first
    for start, end in sorted(map(tuple, spans)):
        yield "plain", at, start
        yield "counted", start, end
        at = end
    yield "plain", at, last
    yield "cut", max(last, at), length
