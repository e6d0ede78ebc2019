"""The text of a sample with the parts that the loss counts, for eyes."""

import re

from service.datasets.storage import Sample
from service.names import NOT_IN_TEXT
from worker.check.lengths import as_json, counts, parts_of

_OBEYED = re.compile(rf"{NOT_IN_TEXT}|\r")
_OPEN, _CLOSE = "\u27e6", "\u27e7"  # white square brackets

Span = tuple[int, int]
"""[start, end) in characters of a text."""


def plain(sample: Sample) -> tuple[str, list[Span]]:
    """The messages, each under its role: no model's text, but what there is for a chat template to render."""
    if sample.messages is None:
        text = sample.text or ""
        return text, [(0, len(text))]
    text = f"tools: {as_json(sample.tools)}\n" if sample.tools else ""
    spans = []
    for message in sample.messages:
        text += f"{message['role']}: "
        start = len(text)
        text += "\n".join(parts_of(message))
        if counts(message):
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def marked(text: str, spans: list[Span]) -> str:
    """The text with brackets around the spans, which do not overlap, as `printable` has it."""
    parts, at = [], 0
    for start, end in sorted(spans):
        parts += [text[at:start], _OPEN, text[start:end], _CLOSE]
        at = end
    return printable("".join([*parts, text[at:]]))


def printable(text: str) -> str:
    """The text with what a terminal obeys, but line feeds and tabs, written out."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
