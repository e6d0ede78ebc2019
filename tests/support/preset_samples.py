"""Samples that presets are tried on, by what is special about them."""

from typing import Any

from service.datasets.storage import Sample

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {"port": {}}}}}
]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "tide", "arguments": arguments}, **more}


UNLEARNT = {"counts": False}
_MESSAGES: dict[str, list[dict[str, Any]]] = {
    "plain": [said("system", "Be brief."), said("user", "Q é?"), said("assistant", "A\n1")],
    "last": [said("user", "a"), said("assistant", "b", **UNLEARNT), said("user", "c"), said("assistant", "d")],
    "several": [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")],
    "mixed": [
        *(said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d", **UNLEARNT)),
        *(said("user", "e"), said("assistant", "f")),
    ],
    "trailing": [
        *(said("user", "a"), said("assistant", "b"), said("user", "thanks"), said("assistant", "bye", **UNLEARNT))
    ],
    "calls": [
        said("user", "When?"),
        said("assistant", "", tool_calls=[call({"port": "Brest"})]),
        said("tool", "04:12", name="tide"),
        said("assistant", "At 04:12."),
    ],
    "parallel": [
        said("user", "When?"),
        said("assistant", "I look.", tool_calls=[call({"port": "Brest"}), call("x", id="own")]),
        said("tool", "1", tool_call_id="own"),
        said("tool", "2"),
        said("assistant", "Both."),
    ],
    "reasoning": [said("user", "a"), said("assistant", "b", reasoning_content="hm")],
    "named": [said("user", "a", name="Ann"), said("assistant", "b")],
    "first": [said("assistant", "Hello")],
    "uncalled": [said("user", "a"), said("tool", "b"), said("assistant", "c")],
}
SAMPLES = {
    name: Sample(index, name, None, messages, None, TOOLS if name in ("calls", "parallel") else None)
    for index, (name, messages) in enumerate(_MESSAGES.items())
} | {"text": Sample(99, "text", "s", None, "A text")}
