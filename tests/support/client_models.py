"""The client's models of answers, from docs/openapi.json. As a program: writes winnow/answers/."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from winnow.answers.base import Answer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "winnow" / "answers"
DOCUMENT = json.loads((ROOT / "docs" / "openapi.json").read_text())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]

Json = dict[str, Any]

_RESULTS = ("results", "weights", "selected", "samples", "provenance")
_MODULES = {  # a model that two of them use is in the first
    "parameters": "The parameters of a job.",
    "jobs": "Jobs: their state, plan and events.",
    "datasets": "Datasets, their rows, uploads in parts, and ready-made targets.",
    "charts": "What pictures of a result are drawn from.",
    "rows": "Of a result: which rows took no part, and which repeat others.",
    "summary": "The summary of a result.",
    "results": "Samples of a result, and its provenance.",
    "account": "Registered models, keys, limits, webhooks and the audit log.",
}
_OF_ROWS = (
    "UnusableCounts",
    "Nonfinite",
    "Excluded",
    "Repeats",
    "RenderingNotes",
)  # parts of the summary, which is long
_SCALARS = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
_HEAD = '"""{title} Made of docs/openapi.json by `make openapi`: change that."""\n\n'


def class_name(schema: str) -> str:
    if not is_model(schema) and f"{schema}Out" in SCHEMAS:
        return f"{schema}Type"
    return schema.removesuffix("Out")


def attribute(field: str) -> str:
    """The name of a field in Python."""
    return f"{field}_" if hasattr(Answer, field) or field in ("from", "class", "import") else field


def answers() -> dict[str, list[str]]:
    """The names of the schemas that the calls of the API answer with, by module; of a list those of its entries."""
    found: dict[str, list[str]] = {module: [] for module in _MODULES}
    found |= {"parameters": ["JobParameters"], "rows": list(_OF_ROWS)}
    for path, operations in DOCUMENT["paths"].items():
        if path.startswith("/v1/"):
            for operation in operations.values():
                found[_module(path)] += dict.fromkeys(_answered(operation))
    return found


def _module(path: str) -> str:
    parts = path.removeprefix("/v1/").split("/")
    if parts[-1] == "charts":
        return "charts"
    if parts[-1] == "results":
        return "summary"
    if parts[0] == "selection-jobs":
        return "results" if len(parts) > 2 and parts[2] in _RESULTS else "jobs"
    return "datasets" if parts[0] in ("datasets", "uploads", "targets") else "account"


def _answered(operation: Json) -> Iterator[str]:
    for status, response in operation["responses"].items():
        schema = response.get("content", {}).get("application/json", {}).get("schema")
        if status.startswith("2") and schema is not None:
            name = schema["$ref"].rpartition("/")[2]
            properties = SCHEMAS[name]["properties"]
            is_list = properties.get("object", {}).get("const") == "list"
            yield properties["data"]["items"]["$ref"].rpartition("/")[2] if is_list else name


def is_model(name: str) -> bool:
    """Whether the schema has a class."""
    return "properties" in SCHEMAS[name]


def is_named(name: str) -> bool:
    """Whether the schema has a name in Python: as a class or, of an enumeration, as an alias."""
    return is_model(name) or "enum" in SCHEMAS[name]


def by_module() -> dict[str, list[str]]:
    """Every schema that has a name, by module, each after those that it uses."""
    seen: set[str] = set()
    modules: dict[str, list[str]] = {}

    def add(name: str, into: list[str]) -> None:
        if name not in seen and is_named(name):
            seen.add(name)
            for used in _refs(SCHEMAS[name]):
                add(used, into)
            into.append(name)

    for module, names in answers().items():
        modules[module] = []
        for name in names:
            add(name, modules[module])
    return modules


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rpartition("/")[2]
        for key, child in node.items():
            if key not in ("example", "examples", "default"):
                yield from _refs(child)
    elif isinstance(node, list):
        for child in node:
            yield from _refs(child)


def annotation(schema: Json) -> str:
    """The type of a field. An enumeration is open: a newer service may have more values."""
    match schema:
        case {"$ref": ref}:
            name = ref.rpartition("/")[2]
            return class_name(name) if is_named(name) else annotation(SCHEMAS[name])
        case {"anyOf": options}:
            return " | ".join(dict.fromkeys(annotation(option) for option in options))
        case {"const": str(value)}:
            return f"Literal[{json.dumps(value)}] | str"
        case {"enum": values}:
            return f"Literal[{', '.join(json.dumps(value) for value in values)}] | str"
        case {"type": "string", "format": "date-time"}:
            return "datetime"
        case {"type": "array", "prefixItems": items}:
            return f"tuple[{', '.join(annotation(item) for item in items)}]"
        case {"type": "array", "items": items}:
            return f"list[{annotation(items)}]"
        case {"type": "object"}:
            values = schema.get("additionalProperties", {})
            for pattern in schema.get("patternProperties", {}).values():
                values = pattern
            return f"dict[str, {annotation(values)}]" if isinstance(values, dict) else "dict[str, Any]"
        case {"type": kind}:
            return _SCALARS[kind]
    return "Any"


def source(name: str) -> str:
    """The class of a schema, or the alias of an enumeration."""
    schema = SCHEMAS[name]
    if not is_model(name):
        return f"{class_name(name)}: TypeAlias = {annotation(schema)}\n"
    lines = [f"class {class_name(name)}(Answer):"]
    text = schema.get("description", f"The object `{schema['title']}` of the API.")
    lines += [*_docstring(_first(text)), ""]
    for field, each in schema["properties"].items():
        given = f" = Field(alias={json.dumps(field)})" if attribute(field) != field else ""
        lines.append(f"    {attribute(field)}: {annotation(each)}{given}")
        if "description" in each:
            lines += _docstring(each["description"])
    return "\n".join(lines) + "\n"


def _first(text: str) -> str:
    """The first paragraph, without a sentence that leads to the next one."""
    first = " ".join(text.partition("\n\n")[0].split())
    return f"{first.rpartition('. ')[0]}." if first.endswith(":") and ". " in first else first


def _docstring(text: str) -> list[str]:
    text = " ".join(text.split()).replace("\\", "\\\\")
    lines = textwrap.wrap(f'"""{text}', 116, break_long_words=False, break_on_hyphens=False)
    lines[-1] += '"""'
    return [f"    {line}" for line in lines]


def modules() -> dict[str, str]:
    """The text of each module, by its name."""
    made = by_module()
    places = {name: module for module, names in made.items() for name in names}
    texts = {}
    for module, names in made.items():
        body = "\n\n".join(source(name) for name in names)
        used: dict[str, set[str]] = {}
        for name in names:
            for ref in filter(is_named, _refs(SCHEMAS[name])):
                used.setdefault(places[ref], set()).add(class_name(ref))
        imports = ["from datetime import datetime"] * ("datetime" in body)
        if typing := [name for name in ("Any", "Literal", "TypeAlias") if name in body]:
            imports.append(f"from typing import {', '.join(typing)}")
        imports += [
            "",
            *["from pydantic import Field"] * ("Field(" in body),
            "",
            "from winnow.answers.base import Answer",
        ]
        imports += [f"from winnow.answers.{m} import {', '.join(sorted(used[m]))}" for m in used if m != module]
        texts[module] = _HEAD.format(title=_MODULES[module]) + "\n".join(imports) + "\n\n\n" + body
    names = [(module, class_name(name)) for module, found in made.items() for name in found]
    listed = "".join(f"from winnow.answers.{m} import {name} as {name}\n" for m, name in names)
    texts["__init__"] = _HEAD.format(title="The answers of the service, typed.") + (
        f"from winnow.answers.base import Answer as Answer\n{listed}"
    )
    return {module: _formatted(text) for module, text in texts.items()}


def _formatted(text: str) -> str:
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    for words in (["check", "-q", "--fix", "--select", "I,F401"], ["format", "-q"]):
        done = subprocess.run(
            [*ruff, *words, "--stdin-filename", str(FOLDER / "made.py"), "-"],
            input=text, capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        text = done.stdout
    return text


if __name__ == "__main__":
    for module, text in modules().items():
        (FOLDER / f"{module}.py").write_text(text)
