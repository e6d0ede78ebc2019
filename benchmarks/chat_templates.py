"""What becomes of conversations of every kind under each chat template of a folder: the table of docs/chat-templates.md.

    python -m benchmarks.chat_templates FOLDER [--differences]

FOLDER holds templates as NAME.jinja, as trl/chat_templates of https://github.com/huggingface/trl does. Where there is a
NAME_training.jinja with {% generation %}, and renders the same text, its spans are compared with those found in NAME.jinja;
`--differences` prints those that are not the same.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.datasets.storage import Sample
from worker.errors import ModelError, UnusableRow
from worker.text.chat_templates import ChatFormat, Rendered

# What looks like a special token; the tokenizers of the models are not needed for this.
_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?s>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]|<\|\w+>|<\w+\|>|<bos>|<eos>"
)
# How the table says what was changed or left out of a row, and why one is unusable.
_NOTES = {
    "system_folded": "S",
    "user_turns_merged": "U",
    "trailing_messages": "T",
    "reasoning_not_rendered": "R",
    "content_not_rendered": "C",
    "content_rewritten": "W",
    "tools_not_rendered": "D",
}
_REASONS = {
    "template_refuses": "refused",
    "template_drops_message": "message",
    "tool_calls_not_rendered": "calls",
    "reply_not_found": "lost",
    "no_reply": "none",
}
Row = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def reply(content: str, reasoning: str = "", *cities: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    if reasoning:
        message["reasoning_content"] = reasoning
    if cities:
        functions = [{"name": "get_weather", "arguments": {"city": city, "days": 3}} for city in cities]
        message["tool_calls"] = [
            {"type": "function", "function": f, "id": f"call{i}xyz"} for i, f in enumerate(functions)
        ]
    return message


def result(content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call{number}xyz", "name": "get_weather"}


ASK, ANSWER, MORE, THEN = user("Is it raining?"), reply("It is sunny."), user("And tomorrow?"), reply("Rain, I fear.")
KINDS: dict[str, Row] = {
    "one turn": ([ASK, ANSWER], None),
    "system": ([system("Be brief."), ASK, ANSWER], None),
    "turns": ([ASK, ANSWER, MORE, THEN], None),
    "system later": ([ASK, ANSWER, system("Be blunt."), MORE, THEN], None),
    "reasoning": ([ASK, reply("It is sunny.", "I look outside.")], None),
    "reasoning, turns": (
        [ASK, reply("It is sunny.", "I look outside."), MORE, reply("Rain, I fear.", "Clouds gather.")],
        None,
    ),
    "<think>": ([ASK, reply("<think>\nI look outside.\n</think>\n\nIt is sunny.")], None),
    "call": ([ASK, reply("", "", "Oslo"), result("sun"), ANSWER], [WEATHER]),
    "reasoning, call": (
        [ASK, reply("", "I must look.", "Oslo"), result("sun"), reply("It is sunny.", "So it is.")],
        [WEATHER],
    ),
    "text, call": ([ASK, reply("Let me look.", "", "Oslo"), result("sun"), ANSWER], [WEATHER]),
    "two calls": ([ASK, reply("", "", "Oslo", "Rome"), result("sun"), result("rain", 1), ANSWER], [WEATHER]),
    "user twice": ([ASK, MORE, ANSWER], None),
    "white space": ([user("  Is it raining?\n"), reply("\n\n  It is sunny. \n")], None),
    "not counted": ([ASK, reply("It is snowing.", counts=False), MORE, THEN], None),
    "ends with user": ([ASK, ANSWER, MORE], None),
}


def stand_in(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters whose special tokens are those that the template writes."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found = sorted(set(_SPECIAL.findall(template)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", extra_special_tokens=found
    )
    tokenizer.chat_template = template
    return tokenizer


def outcome(chat: ChatFormat, row: Row) -> Rendered | str:
    """What was rendered, or the reason why the row is unusable."""
    messages, tools = row
    try:
        return chat.render(Sample(0, "row", None, messages, None, tools))
    except UnusableRow as error:
        return error.reason
    except ModelError as error:
        return f"FAILS THE JOB: {error}"


def _in_letters(rendered: Rendered) -> str:
    return " ".join(["✓", *(_NOTES[note] for note in rendered.notes)])


def compared(found: Rendered | str, twin: Rendered | str) -> str | None:
    """How much a template marks of what its twin marks in the same text, but for white space at the ends of a span.

    "same", "less", or "more" where it marks anything that the twin does not; None if the texts are not the same.
    """
    if isinstance(found, str) or isinstance(twin, str) or found.text != twin.text:
        return None
    ours, theirs = _places(found), _places(twin)
    return "same" if ours == theirs else "less" if ours < theirs else "more"


def _places(rendered: Rendered) -> set[int]:
    """The places of the characters that count."""
    places: set[int] = set()
    for start, end in _joined(rendered):
        core = rendered.text[start:end]
        places |= set(range(start + len(core) - len(core.lstrip()), end - len(core) + len(core.rstrip())))
    return places


def _joined(rendered: Rendered) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for start, end in rendered.spans:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--differences", action="store_true", help="print spans that differ from a twin's")
    arguments = parser.parse_args()
    print("| template |", " | ".join(KINDS), "| twin |")
    print("|---" * (len(KINDS) + 2) + "|")
    differences: list[str] = []
    for file in sorted(arguments.folder.glob("*.jinja")):
        if file.stem.endswith("_training"):
            continue
        source = file.read_text()
        chat = ChatFormat(stand_in(source))
        trained = file.with_name(f"{file.stem}_training.jinja")
        twin = ChatFormat(stand_in(trained.read_text())) if trained.exists() else None
        cells, verdicts = [], []
        for kind, row in KINDS.items():
            found = outcome(chat, row)
            cells.append(_REASONS.get(found, found) if isinstance(found, str) else _in_letters(found))
            other = None if twin is None else outcome(twin, row)
            verdict = None if other is None else compared(found, other)
            verdicts.append(verdict)
            if verdict in ("less", "more") and isinstance(found, Rendered) and isinstance(other, Rendered):
                ours, theirs = ([one.text[a:b] for a, b in _joined(one)] for one in (found, other))
                differences.append(f"{file.stem}, {kind}, {verdict}:\n  {ours}\n  {theirs}")
        told = ", ".join(f"{verdicts.count(name)} {name}" for name in ("same", "less", "more") if name in verdicts)
        print(f"| {file.stem} |", " | ".join(cells), f"| {told} |")
    if arguments.differences:
        print("\n".join(differences))


if __name__ == "__main__":
    main()
