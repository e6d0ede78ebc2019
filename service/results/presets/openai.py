"""OpenAI's chat format for fine-tuning: `messages`, `tools`, and a weight of 0 on replies that do not count."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from service.datasets.rows.messages import Message
from service.datasets.storage import Sample
from service.results.presets.conversations import Unsuitable, check_fields, learnt, to_json

_FIELDS = {
    "system": ("name",),
    "user": ("name",),
    "assistant": ("name", "tool_calls"),
    # Whose answer it is, the format says by the id of the call alone.
    "tool": ("name", "tool_call_id"),
}


def line(sample: Sample) -> dict[str, Any]:
    messages = list(_messages(learnt(sample)))
    return {"messages": messages, "tools": sample.tools} if sample.tools else {"messages": messages}


def _messages(messages: list[Message]) -> Iterator[dict[str, Any]]:
    """Each call has an id, and each answer that of its call, as the format demands. Calls that were uploaded without one are
    numbered, and answered in their order."""
    open_calls: deque[str] = deque()
    numbered = 0
    for message in messages:
        role = message["role"]
        check_fields(message, _FIELDS[role], "preset=trl has what a chat template reads.")
        found = {"role": role, "content": message["content"]}
        if role == "tool":
            if "tool_call_id" not in message and not open_calls:
                raise Unsuitable("a tool answers that was not called", "Leave the sample out of the pool.")
            found["tool_call_id"] = id = message.get("tool_call_id") or open_calls[0]
            if id in open_calls:
                open_calls.remove(id)
        elif "name" in message:
            found["name"] = message["name"]
        if "tool_calls" in message:
            found["tool_calls"] = calls = []
            for call in message["tool_calls"]:
                id = call.get("id") or f"call_{numbered}"
                numbered += 1
                open_calls.append(id)
                calls.append({"id": id, "type": "function", "function": _function(call["function"])})
        if "counts" in message:
            found["weight"] = 0
        yield found


def _function(function: dict[str, Any]) -> dict[str, str]:
    arguments = function["arguments"]
    return {"name": function["name"], "arguments": arguments if isinstance(arguments, str) else to_json(arguments)}
