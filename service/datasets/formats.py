"""What a row of an upload may look like, and how it becomes a canonical sample.

Four forms: `messages`; `prompt` and `completion`; `instruction`, `output` and perhaps `input`; `text`. The second and third
become one user and one assistant message. A field that is null counts as absent; fields that no form knows are ignored.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_LABEL = 256
NO_SOURCE = "(none)"
OTHER_SOURCES = "(other)"

_ROLES = ("system", "user", "assistant")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


class Form(StrEnum):
    AUTO = "auto"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    INSTRUCTION = "instruction"
    TEXT = "text"


_REQUIRED: dict[Form, tuple[str, ...]] = {
    Form.MESSAGES: ("messages",),
    Form.PROMPT_COMPLETION: ("prompt", "completion"),
    Form.INSTRUCTION: ("instruction", "output"),
    Form.TEXT: ("text",),
}
_OPTIONAL: dict[Form, tuple[str, ...]] = {Form.INSTRUCTION: ("input",)}


class InvalidRow(ValueError):
    """Says what is wrong with a row, and how to mend it."""


@dataclass(frozen=True, slots=True)
class CanonicalRow:
    """`sample` is the canonical JSON (sorted keys, no spaces, not escaped) of {"messages": [...]} or {"text": ...}."""

    id: str
    source: str | None
    sample: str

    def line(self) -> bytes:
        """The row as the fingerprint sees it: the JSON array [id, source or null, sample] and a newline, in UTF-8."""
        return f"[{_to_json(self.id)},{_to_json(self.source)},{self.sample}]\n".encode()


def columns(form: Form) -> tuple[str, ...]:
    """The fields that are read of a row; no other one matters."""
    forms = _REQUIRED if form is Form.AUTO else (form,)
    return ("id", "source", *(name for f in forms for name in _REQUIRED[f] + _OPTIONAL.get(f, ())))


def canonical(fields: Mapping[str, Any], number: int, form: Form) -> CanonicalRow:
    """The canonical form of a row; `number`, from 0, is its id where it has none.

    Raises:
        InvalidRow: the row is in no known form, in more than one, or a field of it cannot be used.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    content = _content(fields, _form_of(fields) if form is Form.AUTO else _named(form, fields))
    return CanonicalRow(_id(fields.get("id", number)), _source(fields.get("source")), _to_json(content))


def shown(value: str) -> str:
    """A string as a message may quote it: in ASCII, and short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _form_of(fields: Mapping[str, Any]) -> Form:
    matching = [form for form, required in _REQUIRED.items() if all(name in fields for name in required)]
    if len(matching) > 1:
        raise InvalidRow(f"fits more than one form ({', '.join(matching)}); name the one meant with ?format=")
    if not matching:
        forms = ", or ".join(" and ".join(required) for required in _REQUIRED.values())
        found = ", ".join(shown(name) for name in list(fields)[:10]) or "none"
        raise InvalidRow(f"has no known form: it needs {forms}; its fields that are not null: {found}")
    return matching[0]


def _named(form: Form, fields: Mapping[str, Any]) -> Form:
    missing = [name for name in _REQUIRED[form] if name not in fields]
    if missing:
        raise InvalidRow(f"has no {' and no '.join(missing)}, which format={form} needs")
    return form


def _content(fields: Mapping[str, Any], form: Form) -> dict[str, Any]:
    if form is Form.TEXT:
        text = _string(fields["text"], "text")
        if not text.strip():
            raise InvalidRow("text is empty")
        return {"text": text}
    if form is Form.MESSAGES:
        messages = _messages(fields["messages"])
    elif form is Form.PROMPT_COMPLETION:
        messages = _exchange(_string(fields["prompt"], "prompt"), _string(fields["completion"], "completion"))
    else:
        instruction = _string(fields["instruction"], "instruction")
        more = _string(fields.get("input", ""), "input")
        messages = _exchange(f"{instruction}\n\n{more}" if more else instruction, _string(fields["output"], "output"))
    if not any(message["content"].strip() for message in messages):
        raise InvalidRow("is empty: no message of it has any content")
    return {"messages": messages}


def _exchange(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InvalidRow(f"messages must be a list of at least one message, not {_kind(value)}")
    messages = [_message(message, i) for i, message in enumerate(value)]
    if messages[-1]["role"] != "assistant":
        raise InvalidRow("messages must end with an assistant message: it is what is learnt")
    return messages


def _message(value: object, i: int) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRow(f"messages[{i}] must be an object with role and content, not {_kind(value)}")
    role = value.get("role")
    if role not in _ROLES:
        raise InvalidRow(f"messages[{i}].role must be one of {', '.join(_ROLES)}, not {_quoted(role)}")
    if role == "system" and i > 0:
        raise InvalidRow(f"messages[{i}] is a system message; only the first message may be one")
    return {"role": role, "content": _string(value.get("content"), f"messages[{i}].content")}


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidRow(f"id must be a string or an integer, not {_kind(value)}")
    # Python refuses to print an integer of thousands of digits; one of 256 bytes is longer than any id may be.
    if isinstance(value, int) and value.bit_length() > 8 * MAX_LABEL:
        raise InvalidRow(f"id must have at most {MAX_LABEL} characters")
    label = _label(str(value), "id")
    if not label:
        raise InvalidRow("id must not be empty; leave it out to have the row numbered")
    return label


def _source(value: object) -> str | None:
    if value is None:
        return None
    if value in (NO_SOURCE, OTHER_SOURCES):
        raise InvalidRow(f"source must not be {value}, which names a group of the summary; leave it out or rename it")
    return _label(value, "source")


def _label(value: object, field: str) -> str:
    label = _string(value, field)
    if len(label) > MAX_LABEL:
        raise InvalidRow(f"{field} must have at most {MAX_LABEL} characters, not {len(label)}")
    if _CONTROL.search(label):
        raise InvalidRow(f"{field} must not hold control characters, as {shown(label)} does")
    return label


def _string(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow(f"{field} must be a string, not {_kind(value)}")
    if "\0" in value:
        raise InvalidRow(f"{field} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(
            f"{field} holds half of a surrogate pair at character {error.start + 1}; write the whole character"
        ) from None
    return value


def _quoted(value: object) -> str:
    return shown(value) if isinstance(value, str) else _kind(value)


def _kind(value: object) -> str:
    """What a value is called in JSON."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    name = names.get(type(value), f"a {type(value).__name__}")
    return f"an empty {name[2:]}" if value in ([], "") else name
