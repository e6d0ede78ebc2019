"""How a row of an upload becomes a canonical sample: its label, its source, and its text or its messages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from service.datasets.rows import messages as chat
from service.datasets.rows.forms import (
    CONVERSATIONS,
    FORMS,
    ID,
    IMPLIED_SOURCE,
    PREFERENCES,
    REPLIES,
    SOURCE,
    Form,
)
from service.datasets.rows.messages import ROLE_OF, Message
from service.datasets.rows.options import MAX_TOLD, Plan, RowOptions, Taken
from service.datasets.rows.template import Rendered
from service.datasets.values import (
    MAX_LABEL,
    NO_SOURCE,
    OTHER_SOURCES,
    InvalidRow,
    is_absent,
    kind,
    shown,
    string,
)
from service.names import check_name

_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
_NAMED = 10  # columns that an error names


@dataclass(frozen=True, slots=True)
class CanonicalRow:
    """`sample` is the canonical JSON (sorted keys, no spaces, not escaped) of {"messages": [...], "tools": [...]}, the tools
    only where there are any, or {"text": ...}."""

    id: str
    source: str | None
    sample: str
    taken: Taken = field(default=Taken(""), compare=False)

    def line(self) -> bytes:
        """The row as the fingerprint sees it: the JSON array [id, source or null, sample] and a newline, in UTF-8."""
        return f"[{_to_json(self.id)},{_to_json(self.source)},{self.sample}]\n".encode()


def canonical(fields: Mapping[str, Any] | Rendered, number: int, options: RowOptions) -> CanonicalRow:
    """The canonical form of a row, or of what the template of the options has made of it; `number`, from 0, is its id if it has
    none.

    Raises:
        InvalidRow: the row is in no known form, or a field of it cannot be used.
    """
    rendered = fields if isinstance(fields, Rendered) else None
    row = fields.row if isinstance(fields, Rendered) else fields
    names = tuple([name for name, value in row.items() if not (value is None or value != value)])  # as `is_absent`
    plan = options.plans[names]
    if plan is None:
        raise _formless({name: row[name] for name in names}, options)
    told: set[str] = set()
    content = _of_template(rendered) if rendered is not None else _content(row, plan, told)
    id = str(number) if plan.id is None else _id(row[plan.id], plan.id)
    taken, source = plan.taken, None
    if plan.source is not None:
        if plan.source_is_implied and not isinstance(row[plan.source], str):
            taken = _without_source(taken)
        else:
            source = _source(row[plan.source], plan.source)
    return CanonicalRow(id, source, _to_json(content), _told(taken, tuple(sorted(told)[:MAX_TOLD])) if told else taken)


@lru_cache(maxsize=1_024)
def _told(taken: Taken, told: tuple[str, ...]) -> Taken:
    """With what was seen in the messages."""
    left = tuple(key for key in told if key not in chat.NOTES)
    return replace(taken, left=(taken.left + left)[:MAX_TOLD], notes=tuple(code for code in told if code in chat.NOTES))


@lru_cache(maxsize=1_024)
def _without_source(taken: Taken) -> Taken:
    left = tuple(column for slot, column in taken.columns if slot == SOURCE)
    return replace(taken, columns=tuple(pair for pair in taken.columns if pair[0] != SOURCE), left=taken.left + left)


def _of_template(rendered: Rendered) -> dict[str, Any]:
    messages = chat.system(rendered.system, "template.system")
    user, assistant = string(rendered.user, "template.user"), string(rendered.assistant, "template.assistant")
    return {"messages": _with_content([*messages, _says("user", user), _says("assistant", assistant)])}


def _content(fields: Mapping[str, Any], plan: Plan, told: set[str]) -> dict[str, Any]:
    for name in plan.media:
        _refuse_medium(fields[name], name)
    columns = plan.columns
    if plan.form == Form.TEXT:
        text = string(fields[columns["text"]], columns["text"])
        if not text.strip():
            raise InvalidRow(f"{columns['text']} is empty")
        return {"text": text}
    if "messages" in columns:
        said = chat.conversation(fields[columns["messages"]], columns["messages"], told)
    else:
        said = _exchange(fields, columns, told)
    if "system" in columns:
        said = _led(chat.system(fields[columns["system"]], columns["system"]), said)
    _check_reply(said, fields, plan)
    if not chat.counts(said[-1]):
        told.add("after_last_reply")
    content: dict[str, Any] = {"messages": _with_content(said)}
    if "tools" in columns and (tools := chat.tools(fields[columns["tools"]], columns["tools"])):
        content["tools"] = tools
    return content


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _led(system: list[Message], messages: list[Message]) -> list[Message]:
    """The messages after the system prompt of a column, unless they begin with the same one."""
    return messages if messages[:1] == system else [*system, *messages]


def _exchange(fields: Mapping[str, Any], columns: Mapping[str, str], told: set[str]) -> list[Message]:
    """The messages of a prompt and its completion, each a string or a list of messages, with what came before them."""
    name = columns["prompt"]
    prompt, more = fields[name], string(fields[columns["context"]], columns["context"]) if "context" in columns else ""
    if isinstance(prompt, list) or name in CONVERSATIONS:
        if more:
            raise InvalidRow(
                f"{name} is a list of messages, to which {columns['context']} cannot be added; add it to the prompt"
            )
        said = chat.unlearnt(chat.conversation(prompt, name, told))
    else:
        asked = string(prompt, name)
        said = [_says("user", f"{asked}\n\n{more}" if more else asked)]
    if "history" in columns:
        said = [*chat.pairs(fields[columns["history"]], columns["history"]), *said]
    name = columns["completion"]
    completion = fields[name]
    if not isinstance(completion, list):
        return [*said, _says("assistant", string(completion, name))]
    reply = chat.conversation(completion, name, told)
    if reply and reply[0]["role"] in ("system", "user"):
        raise InvalidRow(
            f"{name} begins with a {reply[0]['role']} message, but a completion begins with the reply; if it is the whole"
            f" conversation, say ?columns=messages:{shown(name)}"
        )
    return [*said, *reply]


def _check_reply(messages: list[Message], fields: Mapping[str, Any], plan: Plan) -> None:
    """That there is something to learn.

    Raises:
        InvalidRow: there is not; the message says how there could be.
    """
    if any(chat.counts(message) for message in messages):
        return
    name = shown(plan.columns.get("messages") or plan.columns["completion"])
    if any(message["role"] == "assistant" for message in messages):
        raise InvalidRow(f"{name} has no reply to learn from: each has a weight of 0, or belongs to the prompt")
    found = _reply_columns({name: value for name, value in fields.items() if name not in plan.columns.values()})
    raise InvalidRow(f"{name} has no reply to learn from, no message of the assistant; {_how_to_name(found)}")


def _with_content(messages: list[Message]) -> list[Message]:
    for message in messages:
        if message["content"].strip() or "tool_calls" in message or "reasoning_content" in message:
            return messages
    raise InvalidRow("is empty: none of its messages has content")


def _refuse_medium(value: object, name: str) -> None:
    is_empty = all(map(is_absent, value.values())) if isinstance(value, dict) else not value
    if not is_empty:
        raise InvalidRow(
            f"has {name.rstrip('s')} content in the column {name}, and only text is read; leave this row out, or the column if"
            " the text says all of it"
        )


def _reply_columns(fields: Mapping[str, Any]) -> list[str]:
    """The columns that may hold a reply: the usual ones first."""
    names = [name for name in (*REPLIES, *fields) if name not in (ID, SOURCE, IMPLIED_SOURCE)]
    held = [name for name in dict.fromkeys(names) if isinstance(fields.get(name), str) or _is_reply(fields.get(name))]
    return held[:_NAMED]


def _is_reply(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & set(value[0]))
    )


def _how_to_name(replies: list[str]) -> str:
    if not replies:
        return "say ?columns=completion:COLUMN if another column has it"
    others = f" (or another of its columns: {', '.join(map(shown, replies[1:]))})" if len(replies) > 1 else ""
    inside = "" if replies[0] in REPLIES else "; what is inside of a column is reached with ?template="
    return f"say ?columns=completion:{shown(replies[0])} to learn that column{others}{inside}"


def _formless(fields: Mapping[str, Any], options: RowOptions) -> InvalidRow:
    """What is wrong with a row that is in no form that it may have, and what would work."""
    for slot, column in options.columns:
        if column not in fields and slot not in (ID, SOURCE):
            return InvalidRow(f"has no {shown(column)}, which columns={slot}:{shown(column)} names")
    if all(name in fields for name in PREFERENCES):
        return _preference(fields)
    if options.form is not Form.AUTO:
        slots = FORMS[options.form].required.values()
        missing = [" or ".join(names) for names in slots if not any(name in fields for name in names)]
        return InvalidRow(f"has no {' and no '.join(missing)}, which format={options.form} requires")
    found = ", ".join(map(shown, list(fields)[:_NAMED])) or "none"
    asked = [name for form in options.eligible for name in FORMS[form].required.get("prompt", ()) if name in fields]
    if asked:
        replies = _reply_columns({name: value for name, value in fields.items() if name not in asked})
        return InvalidRow(
            f"has {asked[0]}, but no reply to learn from under a known name; {_how_to_name(replies)}. Its non-null fields are:"
            f" {found}"
        )
    forms = ", or ".join(" and ".join(map("|".join, FORMS[form].required.values())) for form in options.eligible)
    return InvalidRow(
        f"matches no known form: expected {forms}; its non-null fields are: {found}. Say with ?columns=slot:column which are what"
    )


def _preference(fields: Mapping[str, Any]) -> InvalidRow:
    """Pairs of which one is preferred are not learnt as such."""
    chosen = fields["chosen"]
    is_whole = _is_reply(chosen) and ROLE_OF.get(chosen[0].get("role") or chosen[0].get("from")) in ("system", "user")
    slot = "messages" if is_whole else "completion" if "prompt" in fields else "text"
    return InvalidRow(
        f"is a preference pair (chosen and rejected), which is not learnt as such; say ?columns={slot}:chosen to learn the chosen"
        " answer alone"
    )


def _id(value: object, name: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes a column of numbers with gaps one of floats
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidRow(f"{name} must be a string or an integer, not {kind(value)}")
    # Python refuses to print an integer of thousands of digits; one of 256 bytes is longer than any id may be.
    if isinstance(value, int) and value.bit_length() > 8 * MAX_LABEL:
        raise InvalidRow(f"{name} must have at most {MAX_LABEL} characters")
    label = _label(str(value), name)
    if not label:
        raise InvalidRow(f"{name} must not be empty; omit it to number the row automatically")
    return label


def _source(value: object, name: str) -> str:
    if value in (NO_SOURCE, OTHER_SOURCES):
        raise InvalidRow(f"{name} must not be {value}, which is a reserved group name in summaries; omit or rename it")
    return _label(value, name)


def _label(value: object, name: str) -> str:
    label = string(value, name)
    if len(label) > MAX_LABEL:
        raise InvalidRow(f"{name} must have at most {MAX_LABEL} characters, not {len(label)}")
    try:
        return check_name(label)
    except ValueError as error:
        raise InvalidRow(f"{name} {error}") from None
