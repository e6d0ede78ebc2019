"""What the presets have in common: the part of a conversation that is trained on, and how a sample is refused."""

import json
from collections.abc import Collection
from typing import Any

from service.datasets.rows.messages import Message, counts
from service.datasets.storage import Sample

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Unsuitable(Exception):
    """The format cannot hold a sample: why not, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def learnt(sample: Sample) -> list[Message]:
    """The messages up to the last reply that counts: of what follows, nothing is learnt, and many tools want a reply at the end.

    Raises:
        Unsuitable: the sample is a text.
    """
    if sample.messages is None:
        raise Unsuitable("it is a text without messages", "preset=rows has it as text.")
    last = max(place for place, message in enumerate(sample.messages) if counts(message))
    return sample.messages[: last + 1]


def without_mark(message: Message) -> Message:
    """The message in the order that people write it, without `counts`."""
    more = {name: value for name, value in message.items() if name != "counts"}
    return {"role": message["role"], "content": message["content"], **more}


def check_fields(message: Message, known: Collection[str], remedy: str) -> None:
    """That the format has all that the message has.

    Raises:
        Unsuitable: it has not.
    """
    if unknown := sorted(message.keys() - {"role", "content", "counts", *known}):
        raise Unsuitable(f"a message of the role {message['role']} has {', '.join(unknown)}", remedy)


def call_values(message: Message) -> list[dict[str, Any]]:
    """Name and arguments of each call of a message."""
    functions = (call["function"] for call in message["tool_calls"])
    return [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
