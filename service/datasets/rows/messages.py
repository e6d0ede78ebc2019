"""Conversations in the dialects that people have, and their canonical messages.

A canonical message has `role` (system, user, assistant or tool) and `content`; where they are given, `reasoning_content`,
`tool_calls`, `tool_call_id` and `name`; and "counts": false where it is a reply that is not learnt. Only replies are ever learnt.
"""

from collections.abc import Mapping
from typing import Any

from service.datasets.values import InvalidRow, is_absent, json_value, kind, parsed, quoted, shown, string

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
CALLS = "calls"  # not a role of canonical messages: the content is one call, or a list of them, in JSON
ROLE_OF = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_call": CALLS,
    "tool_call": CALLS,
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("counts", "weight", "train", "loss_weight")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_PLAIN = ("user", "assistant", "system", "tool")  # the most frequent first
_OTHER_KEYS = ("tool_calls", "function_call", "tool_call_id", "name")
_KEYS = frozenset([*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *WEIGHT_KEYS, *_OTHER_KEYS])
_MEDIA = ("image", "audio", "video")

# What may have to be said of rows, by its code; the number of them comes before it.
NOTES = {
    "after_last_reply": "messages after the last reply: they are kept, but not learnt",
    "empty_system": "a system message without content: it is left out",
    "partial_weight": "messages whose weight is neither 0 nor 1: they are learnt like the others",
    "not_a_reply": "messages to be learnt that are not replies: they are not learnt",
}


def conversation(value: object, field: str, told: set[str]) -> list[Message]:
    """The canonical messages of a list of messages, or of its JSON.

    `field` names the list in errors; `told` gets codes of `NOTES`, and the keys of messages that are left alone.

    Raises:
        InvalidRow: it is no such list, or a message of it cannot be used.
    """
    if isinstance(value, str):
        value = _from_json(value, field)
    if not isinstance(value, list) or not value:
        raise InvalidRow(f"{field} must be a list of at least one message, not {kind(value)}")
    messages = []
    for i, message in enumerate(value):
        if message.__class__ is dict and len(message) == 2:
            role, content = message.get("role"), message.get("content")
            if role in _PLAIN and content.__class__ is str and (content or role != "system"):
                if "\0" in content or not content.isascii():
                    string(content, f"{field}[{i}].content")
                messages.append(message)
                continue
        if (read := _Reader(message, f"{field}[{i}]", f"{field}[]", told).message()) is not None:
            messages.append(read)
    return messages


def unlearnt(messages: list[Message]) -> list[Message]:
    """The messages with no reply that counts."""
    return [{**message, "counts": False} if message["role"] == "assistant" else message for message in messages]


def counts(message: Mapping[str, Any]) -> bool:
    """Whether a canonical message is learnt."""
    return message["role"] == "assistant" and "counts" not in message


def system(value: object, field: str) -> list[Message]:
    """The message of a system prompt; none where it is empty."""
    content = string(value, field)
    return [{"role": "system", "content": content}] if content else []


def pairs(value: object, field: str) -> list[Message]:
    """The messages of earlier exchanges: pairs of what the user said and what was replied."""
    if isinstance(value, str):
        value = _from_json(value, field) if value.strip() else []
    if not isinstance(value, list):
        raise InvalidRow(f"{field} must be a list of pairs of strings, not {kind(value)}")
    messages = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRow(
                f"{field}[{i}] must be a pair of strings, what the user said and the reply, not {kind(pair)}"
            )
        for role, content, j in zip(("user", "assistant"), pair, (0, 1), strict=True):
            messages.append({"role": role, "content": string(content, f"{field}[{i}][{j}]")})
    return messages


def tools(value: object, field: str) -> list[dict[str, Any]]:
    """The canonical tools of a list, or of its JSON: each {"type": "function", "function": {...}} where it is a function."""
    if isinstance(value, str):
        value = _from_json(value, field) if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InvalidRow(f"{field} must be a list of the tools that the model may call, or its JSON, not {kind(value)}")
    return [_tool(tool, f"{field}[{i}]") for i, tool in enumerate(value)]


def _tool(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRow(f"{field} must be an object that describes a tool, not {kind(value)}")
    tool: dict[str, Any] = json_value(value, field)
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}


def _from_json(text: str, field: str) -> Any:
    try:
        return parsed(text)
    except ValueError as error:
        raise InvalidRow(f"{field} is a string that is not JSON ({error}); write a list, or its JSON") from None


class _Reader:
    """Reads one message. `field` names it in errors, `every` in what is told."""

    def __init__(self, value: object, field: str, every: str, told: set[str]) -> None:
        if not isinstance(value, dict):
            raise InvalidRow(f"{field} must be an object with role and content, not {kind(value)}")
        self._given = {key: item for key, item in value.items() if not is_absent(item)}
        self._field, self._every, self._told = field, every, told
        for key in self._given:
            if key not in _KEYS:
                self._leave(key)

    def message(self) -> Message | None:
        """The canonical message; None if it is a system message without content."""
        role, content_key = self._role(), self._first(CONTENT_KEYS)
        calls = self._calls(role)
        if role == CALLS:
            role, calls = "assistant", [*calls, *self._said_calls(content_key)]
            content_key = None
        reasoning = self._reasoning(role)
        if content_key is not None:
            content = self._content(content_key)
        elif role in ("system", "tool") or calls or reasoning:
            content = ""
        else:
            raise InvalidRow(f"{self._field}.content must be a string, not null")
        learnt = self._is_learnt(role)
        if role == "system" and not content:
            self._told.add("empty_system")
            return None
        message: Message = {"role": role, "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        for key in ("tool_call_id", "name"):
            if given := string(self._given.get(key, ""), f"{self._field}.{key}"):
                message[key] = given
        if not learnt:
            message["counts"] = False
        return message

    def _leave(self, key: str) -> None:
        self._told.add(f"{self._every}.{shown(key)}")

    def _first(self, keys: tuple[str, ...]) -> str | None:
        """The first of the keys that is given; the others say the same, or are left alone."""
        found = [key for key in keys if key in self._given]
        for key in found[1:]:
            if self._given[key] != self._given[found[0]]:
                self._leave(key)
        return found[0] if found else None

    def _role(self) -> str:
        key = self._first(ROLE_KEYS)
        value = None if key is None else self._given[key]
        role = ROLE_OF.get(value) if isinstance(value, str) else None
        if role is None:
            what = quoted(value) if isinstance(value, str) else kind(value)
            raise InvalidRow(f"{self._field}.{key or 'role'} must be one of {', '.join(ROLE_OF)}, not {what}")
        return role

    def _content(self, key: str) -> str:
        value, field = self._given[key], f"{self._field}.{key}"
        if not isinstance(value, list):
            return string(value, field)
        return "".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))

    def _reasoning(self, role: str) -> str:
        found = [key for key in REASONING_KEYS if self._given.get(key) not in (None, "")]
        if role != "assistant":
            for key in found:
                self._leave(key)
            return ""
        thoughts = {string(self._given[key], f"{self._field}.{key}") for key in found}
        if len(thoughts) > 1:
            raise InvalidRow(f"{self._field} has {' and '.join(found)}, which differ; keep one")
        return thoughts.pop() if thoughts else ""

    def _is_learnt(self, role: str) -> bool:
        """Whether no key says that it is not; of other messages than replies only whether one asks in vain."""
        learnt = True
        for key in WEIGHT_KEYS:
            if (weight := self._given.get(key)) is None:
                continue
            if not isinstance(weight, bool | int | float) or not weight >= 0:
                what = quoted(weight) if isinstance(weight, str) else kind(weight)
                raise InvalidRow(f"{self._field}.{key} must be 0 or 1, or false or true, not {what}")
            if role != "assistant":
                if weight and key != "weight":
                    self._told.add("not_a_reply")
            elif weight not in (0, 1):
                self._told.add("partial_weight")
            learnt = learnt and bool(weight)
        return learnt or role != "assistant"

    def _calls(self, role: str) -> list[dict[str, Any]]:
        """What `tool_calls` holds, and `function_call`, which stood for it before."""
        calls = []
        for key in ("tool_calls", "function_call"):
            value, field = self._given.get(key), f"{self._field}.{key}"
            if isinstance(value, str):
                value = _from_json(value, field) if value.strip() else None
            if not value:
                continue
            if role not in ("assistant", CALLS):
                raise InvalidRow(f"{field} belongs to a {role} message; only an assistant message calls tools")
            calls += self._call_list(value, field)
        return calls

    def _said_calls(self, key: str | None) -> list[dict[str, Any]]:
        if key is None:
            return []
        field = f"{self._field}.{key}"
        value = self._given[key]
        return self._call_list(_from_json(value, field) if isinstance(value, str) else value, field)

    def _call_list(self, value: object, field: str) -> list[dict[str, Any]]:
        if isinstance(value, dict):
            return [self._call(value, field)]
        if not isinstance(value, list):
            raise InvalidRow(f"{field} must be a call of a tool, or a list of them, not {kind(value)}")
        return [self._call(call, f"{field}[{i}]") for i, call in enumerate(value)]

    def _call(self, value: object, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InvalidRow(
                f"{field} must be an object with the name and the arguments of a function, not {kind(value)}"
            )
        given = {key: item for key, item in value.items() if not is_absent(item)}
        if given.get("type", "function") != "function":
            raise InvalidRow(f'{field}.type must be "function"; other tools cannot be rendered')
        function = given.get("function", given)
        if not isinstance(function, dict):
            raise InvalidRow(f"{field}.function must be an object with name and arguments, not {kind(function)}")
        self._leave_of_call(
            given, ("id", "type", "function") if "function" in given else ("id", "type", "name", "arguments")
        )
        if function is not given:
            self._leave_of_call(function, ("name", "arguments"))
        name = string(function.get("name"), f"{field}.name")
        arguments = _arguments(function.get("arguments"), f"{field}.arguments")
        call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if id := string(given.get("id", ""), f"{field}.id"):
            call["id"] = id
        return call

    def _leave_of_call(self, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key, item in value.items():
            if key not in known and not is_absent(item):
                self._leave(f"tool_calls[].{key}")


def _arguments(value: object, field: str) -> dict[str, Any] | str:
    if is_absent(value):
        return {}
    if isinstance(value, str):
        try:
            read = parsed(value)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            return string(value, field)
        value = read
    if not isinstance(value, dict):
        raise InvalidRow(f"{field} must be an object, or its JSON, not {kind(value)}")
    arguments: dict[str, Any] = json_value(value, field)
    return arguments


def _part(value: object, field: str) -> str:
    """The text of a part of a message's content."""
    if isinstance(value, str):
        return string(value, field)
    if not isinstance(value, dict):
        raise InvalidRow(f"{field} must be a part with type and text, not {kind(value)}")
    type = value.get("type")
    if type in _TEXT_PARTS:
        return string(value.get("text"), f"{field}.text")
    what = quoted(type) if isinstance(type, str) else kind(type)
    medium = next((medium for medium in _MEDIA if isinstance(type, str) and medium in type), None)
    if medium is None:
        raise InvalidRow(f'{field}.type must be "text", not {what}')
    raise InvalidRow(
        f"{field} is {'a' if medium == 'video' else 'an'} {medium} (type {what}), and only text is read; leave this row out, or"
        " put into words what it shows or says"
    )
