"""Values of an uploaded row: what strings and JSON values may hold, and how a message calls them."""

import json
import math
from collections import Counter
from typing import Any, Never

MAX_LABEL = 256
NO_SOURCE = "(none)"
OTHER_SOURCES = "(other)"

_MAX_DEPTH = 64
_SHOWN = 80


class InvalidRow(ValueError):
    """The message says what is wrong with a row and how to correct it."""


def is_absent(value: object) -> bool:
    """Null, or the NaN that pandas and Parquet have in its place."""
    return value is None or (value.__class__ is float and value != value)


def string(value: object, field: str) -> str:
    """The value, if it is a string that may be kept.

    Raises:
        InvalidRow: it is none, or has a NUL character or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise InvalidRow(f"{field} must be a string, not {kind(value)}")
    if "\0" in value:
        raise InvalidRow(f"{field} contains a NUL character; remove it")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        at = error.start + 1
        raise InvalidRow(f"{field} contains a lone surrogate at character {at}; write the complete character") from None
    return value


def json_value(value: object, field: str, depth: int = 0) -> Any:
    """The value as JSON has it, without what is absent in its objects: Parquet gives each object the fields of all others, as
    nulls, so that an explicit null cannot be told from none. Nulls in lists stay.

    Raises:
        InvalidRow: it is nested more than 64 deep, or holds what `string` refuses, an infinite number, or no value of JSON.
    """
    if depth > _MAX_DEPTH:
        raise InvalidRow(f"{field} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        return string(value, field)
    if is_absent(value):
        return None
    if isinstance(value, dict):
        return {
            string(key, field): json_value(item, field, depth + 1) for key, item in value.items() if not is_absent(item)
        }
    if isinstance(value, list):
        return [json_value(item, field, depth + 1) for item in value]
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InvalidRow(f"{field} contains {kind(value)}; write it as a string")


def parsed(text: str) -> Any:
    """What the JSON says.

    Raises:
        ValueError: it is none, or a number or its depth is beyond what is read.
    """
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON value; write null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands twice, a JSON decoder keeps the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {quoted(twice)} stands twice in an object; keep one")
    return found


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def kind(value: object) -> str:
    """What a value is called in JSON."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "an infinite number"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    name = names.get(type(value), f"a {type(value).__name__}")
    return f"an empty {name[2:]}" if value in ([], "") else name


def quoted(value: str) -> str:
    """A string for a message: in ASCII, and shortened."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def shown(name: str) -> str:
    """A name that may hold anything, such as that of a column: as it is, if it can be shown so, else `quoted`."""
    return name if name.isascii() and name.isprintable() and 0 < len(name) <= _SHOWN else quoted(name)
