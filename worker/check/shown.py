"""The text of a sample with the parts that the loss counts, where no model renders it."""

from service.datasets.storage import Sample
from worker.check.lengths import as_json, counts, parts_of

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
