"""A form of a JSON schema: its fields with their descriptions and defaults, and the values that a filled form has.

What is left empty is left out, and gets the default. What is no value of its field goes to the model as it was written, which
says what is wrong with it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """`path`: its name in the form, with dots. `fields`: those of an object; one that `may_be_none` is there if it is chosen."""

    path: str
    description: str
    default: str = ""
    choices: Sequence[str] = ()
    is_text: bool = False
    is_number: bool = False
    fields: Sequence["Field"] = ()
    may_be_none: bool = False

    @property
    def label(self) -> str:
        return self.path.rpartition(".")[2].replace("_", " ").capitalize()

    def leaves(self) -> Iterator["Field"]:
        if not self.fields:
            yield self
        for field in self.fields:
            yield from field.leaves()

    def groups(self) -> Iterator["Field"]:
        """The objects at and below it that may be left out."""
        if self.may_be_none:
            yield self
        for field in self.fields:
            yield from field.groups()


def fields(schema: Schema, left_out: Sequence[str] = ()) -> list[Field]:
    """Of an object's properties, in their order, but those that are left out."""
    return [
        _field(name, prop, schema.get("$defs", {}))
        for name, prop in schema["properties"].items()
        if name not in left_out
    ]


def _field(path: str, schema: Schema, defs: Mapping[str, Schema]) -> Field:
    options = [_resolved(option, defs) for option in schema.get("anyOf", [schema])]
    some = [option for option in options if option.get("type") != "null"]
    described = schema.get("description") or (some[0].get("description", "") if len(some) == 1 else "")
    default = schema.get("default")
    if len(some) == 1 and "properties" in some[0]:
        own = {name: _with_default(prop, default, name) for name, prop in some[0]["properties"].items()}
        below = [_field(f"{path}.{name}", prop, defs) for name, prop in own.items()]
        return Field(path=path, description=described, fields=below, may_be_none=len(options) > len(some))
    kinds = {option.get("type") for option in some}
    choices: Sequence[str] = some[0].get("enum", ()) if len(some) == 1 else ()
    if kinds == {"boolean"}:
        choices = ("true", "false")
    return Field(
        path=path,
        description=described,
        default=default if isinstance(default, str) else "" if default is None else json.dumps(default),
        choices=choices,
        is_text=kinds == {"string"},
        is_number=kinds <= {"integer", "number"} and len(some) == len(options),  # otherwise also "null"
    )


def _resolved(schema: Schema, defs: Mapping[str, Schema]) -> Schema:
    return defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _with_default(schema: Schema, defaults: Any, name: str) -> Schema:
    """An object that has a default may set another for one of its properties."""
    return {**schema, "default": defaults[name]} if isinstance(defaults, dict) and name in defaults else schema


def values(form: Mapping[str, Any], of: Sequence[Field]) -> dict[str, Any]:
    """The object that the filled form stands for."""
    found: dict[str, Any] = {}
    for group in (group for field in of for group in field.groups()):
        if _is_chosen(form, group.path, of):
            _put(found, group.path, {})
    for leaf in (leaf for field in of for leaf in field.leaves()):
        written = str(form.get(leaf.path, "")).strip()
        if written and _is_chosen(form, leaf.path, of):
            _put(found, leaf.path, written if leaf.is_text else _read(written))
    return found


def _is_chosen(form: Mapping[str, Any], path: str, of: Sequence[Field]) -> bool:
    """Whether it, and each object around it, is there, if it may be left out."""
    optional = (group.path for field in of for group in field.groups())
    return all(form.get(group) for group in optional if f"{path}.".startswith(f"{group}."))


def _read(written: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(written, parse_constant=refuse)
    except (ValueError, RecursionError):
        return written


def _put(into: dict[str, Any], path: str, value: Any) -> None:
    *around, name = path.split(".")
    for part in around:
        into = into.setdefault(part, {})
    into[name] = into.get(name, {}) if value == {} else value


def error_path(param: str, of: Sequence[Field], more: Sequence[str]) -> str:
    """The field that an error is shown at: itself, or what it is a part of; "": none of them."""
    known = {*more, *(leaf.path for field in of for leaf in field.leaves())}
    parts = param.split(".")
    paths = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((path for path in paths if path in known), "")
