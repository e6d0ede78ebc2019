"""The API reference, as two pages made of docs/openapi.json: the calls by subject, and the objects that they take and return."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
METHODS = ("get", "post", "put", "patch", "delete")


def calls(document: Json) -> str:
    """Every call with its parameters, its body and its answers. Errors that nearly all calls have stand once, at the top."""
    by_subject: dict[str, list[tuple[str, str, Json]]] = defaultdict(list)
    for path, operations in document["paths"].items():
        for method in METHODS:
            if method in operations:
                by_subject[operations[method]["tags"][0]].append((method, path, operations[method]))
    count = sum(map(len, by_subject.values()))
    errors = Counter(
        (status, answer["description"])
        for operations in by_subject.values()
        for *_, operation in operations
        for status, answer in operation["responses"].items()
        if status >= "4"
    )
    common = sorted(error for error, times in errors.items() if times > 0.75 * count)
    lines = [
        "# API: calls",
        "",
        "Made of [openapi.json](../openapi.json). [Using the API](../api.md) says how the calls work together;"
        " [objects](objects.md) are what they take and return.",
        "",
        "Nearly every call may be answered with " + ", ".join(f"{status} ({text.lower()})" for status, text in common),
        "as a [Problem](objects.md#problem). Other errors stand with the call.",
    ]
    for subject, operations in by_subject.items():
        lines += ["", f"## {subject.capitalize()}"]
        for method, path, operation in operations:
            lines += ["", f"### {operation['summary']}", "", f"`{method.upper()} {path}`", ""]
            lines += [operation.get("description", ""), ""]
            lines += _parameters(operation.get("parameters", []))
            lines += _answers(operation, {status for status, _ in common})
    return "\n".join(lines)


def objects(document: Json) -> str:
    """Every object with its fields."""
    lines = ["# API: objects", "", "What the [calls](api.md) take and return. Fields in bold have to be there."]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += ["", f"## {name} {{#{name.lower()}}}", "", schema.get("description", ""), ""]
        if fields := schema.get("properties"):
            lines += ["| field | type | meaning |", "| --- | --- | --- |"]
            for field, of in fields.items():
                label = f"**`{field}`**" if field in schema.get("required", []) else f"`{field}`"
                lines.append(f"| {label} | {_type(of, '')} | {_meaning(of)} |")
        else:
            lines.append(_type(schema, ""))
    return "\n".join(lines)


def _parameters(parameters: list[Json]) -> Iterator[str]:
    if parameters:
        yield from ("| parameter | in | type | meaning |", "| --- | --- | --- | --- |")
    for each in parameters:
        label = f"**`{each['name']}`**" if each["required"] else f"`{each['name']}`"
        meaning = _meaning(each["schema"] | {"description": each.get("description", "")})
        yield f"| {label} | {each['in']} | {_type(each['schema'], 'objects.md')} | {meaning} |"
    yield ""


def _answers(operation: Json, common: set[str]) -> Iterator[str]:
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"**Body** ({kind}): {_type(content.get('schema', {}), 'objects.md')}"
        yield ""
    for status, answer in sorted(operation["responses"].items()):
        if status in common:
            continue
        contents = answer.get("content", {}).items()
        shown = " or ".join(f"{_type(of.get('schema', {}), 'objects.md')} ({kind})" for kind, of in contents)
        yield f"- **{status}** {_line(answer['description'])}{': ' + shown if contents else ''}"


def _type(schema: Json, page: str) -> str:
    """A type in words; objects are links to where they stand on the page, "" being this one."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}]({page}#{name.lower()})"
    if of := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(dict.fromkeys(_type(each, page) for each in of))
    if "enum" in schema:
        return " or ".join(f"`{_cell(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_cell(schema['const'])}`"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), page)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'], page)}"
    return f"{kind} ({schema['format']})" if "format" in schema else str(kind)


def _meaning(schema: Json) -> str:
    default = schema.get("default")
    return _line(schema.get("description", "")) + (f" Default: `{_cell(default)}`." if default is not None else "")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _cell(value: object) -> str:
    return _line(str(value))
