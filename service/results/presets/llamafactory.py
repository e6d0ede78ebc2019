"""LLaMA-Factory: its dialects of ShareGPT and Alpaca, and the messages of its version 1, which give each a weight in the loss.

All lines of a file have the same fields, which its dataset_info.json names. In the first two all replies are learnt, and it skips
a conversation whose speakers do not take turns, so that none is written.
"""

from typing import Any

from service.datasets.rows.messages import Message, counts
from service.datasets.storage import Sample
from service.results.presets.conversations import Unsuitable, call_values, check_fields, learnt, to_json

_TO_V1 = "Use preset=llamafactory-v1."
_SPEAKERS = {"user": "human", "tool": "observation", "assistant": "gpt"}


def sharegpt(sample: Sample) -> dict[str, Any]:
    system, turns = _turns(sample)
    conversations = []
    for turn in turns:
        known = {"tool": ("name", "tool_call_id"), "assistant": ("tool_calls",)}.get(turn["role"], ())
        check_fields(turn, known, _TO_V1)
        if "tool_calls" not in turn:
            conversations.append({"from": _SPEAKERS[turn["role"]], "value": turn["content"]})
        elif turn["content"].strip():
            raise Unsuitable("a reply has both content and calls of tools", _TO_V1)
        else:
            conversations.append({"from": "function_call", "value": to_json(call_values(turn))})
    return {"conversations": conversations, "system": system, "tools": _tools(sample)}


def alpaca(sample: Sample) -> dict[str, Any]:
    system, turns = _turns(sample)
    for turn in turns:
        if turn["role"] == "tool":
            raise Unsuitable("a tool answers in it", "Use preset=llamafactory.")
        check_fields(turn, (), "Use preset=llamafactory, or preset=llamafactory-v1 for reasoning.")
    *history, prompt, reply = (turn["content"] for turn in turns)
    pairs = [history[i : i + 2] for i in range(0, len(history), 2)]
    return {
        "instruction": prompt,
        "input": "",
        "output": reply,
        "system": system,
        "history": pairs,
        "tools": _tools(sample),
    }


def v1(sample: Sample) -> dict[str, Any]:
    messages = []
    for message in learnt(sample):
        known = {"tool": ("name", "tool_call_id"), "assistant": ("reasoning_content", "tool_calls")}
        check_fields(message, known.get(message["role"], ()), "preset=trl has what a chat template reads.")
        messages.append(
            {
                "role": message["role"],
                "content": _parts(message),
                "loss_weight": 1.0 if counts(message) else 0.0,
            }
        )
    return {"messages": messages, "tools": _tools(sample)}


def _parts(message: Message) -> list[dict[str, str]]:
    parts = []
    if "reasoning_content" in message:
        parts.append({"type": "reasoning", "value": message["reasoning_content"]})
    if message["content"]:
        parts.append({"type": "text", "value": message["content"]})
    if "tool_calls" in message:
        parts += [{"type": "tool_call", "value": to_json(call)} for call in call_values(message)]
    return parts or [{"type": "text", "value": ""}]


def _turns(sample: Sample) -> tuple[str, list[Message]]:
    """The system prompt, and the rest, in which user or tool and assistant take turns."""
    messages = learnt(sample)
    if any("counts" in message for message in messages):
        raise Unsuitable("a reply before its last one does not count", _TO_V1)
    has_system = messages[0]["role"] == "system"
    if has_system:
        check_fields(messages[0], (), _TO_V1)
    turns = messages[1:] if has_system else messages
    for place, turn in enumerate(turns):
        if turn["role"] not in (("user", "tool"), ("assistant",))[place % 2]:
            raise Unsuitable(
                f"its speakers do not take turns: message {place + has_system} is of {turn['role']}", _TO_V1
            )
    return messages[0]["content"] if has_system else "", turns


def _tools(sample: Sample) -> str:
    return to_json(sample.tools) if sample.tools else ""
