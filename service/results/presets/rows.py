"""The rows as they are kept, with their ids and sources; uploaded again, they are the same samples."""

from typing import Any

from service.datasets.storage import Sample
from service.results.presets.conversations import without_mark


def line(sample: Sample) -> dict[str, Any]:
    found: dict[str, Any] = {"id": sample.id}
    if sample.source is not None:
        found["source"] = sample.source
    if sample.messages is None:
        return {**found, "text": sample.text}
    messages = [
        {**without_mark(message), **({"counts": False} if "counts" in message else {})} for message in sample.messages
    ]
    return {**found, "messages": messages, **({"tools": sample.tools} if sample.tools else {})}
