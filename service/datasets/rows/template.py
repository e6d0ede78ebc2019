"""The caller's template of a row, as `template=` gives it: what the user says and what the assistant replies, in Jinja."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jinja2 import Environment, TemplateSyntaxError, nodes

from service.datasets.values import parsed, quoted
from service.http.errors import Unprocessable

PARTS = ("system", "user", "assistant")
# Stands for the whole row, whose columns may have names that no variable can have.
WHOLE_ROW = "row"
MAX_LENGTH = 16_384  # of the whole: it travels in an address, of which servers and proxies take 64 KiB or less


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row, and what its template has made of it."""

    row: Mapping[str, Any]
    user: str
    assistant: str
    system: str


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """The sources of the templates. `names`: the columns that they read, beside those that they read from `row`."""

    user: str
    assistant: str
    system: str | None
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From JSON: {"user": ..., "assistant": ..., "system": ...}, the last of which may be missing.

        Raises:
            Unprocessable: it is not that, or no Jinja.
        """
        if len(text) > MAX_LENGTH:
            raise Unprocessable(f"template: it must have at most {MAX_LENGTH:,} characters", param="template")
        try:
            given = parsed(text)
        except ValueError as error:
            raise Unprocessable(f"template: it is not JSON: {error}", param="template") from None
        if not isinstance(given, dict) or not {"user", "assistant"} <= set(given) <= set(PARTS):
            raise Unprocessable(
                "template: it must be a JSON object with user, assistant and optionally system, each Jinja over the columns of a"
                f" row, not {quoted(text)}",
                param="template",
            )
        names: set[str] = set()
        for part, source in given.items():
            if not isinstance(source, str):
                raise Unprocessable(f"template: {part} must be a string", param="template")
            names |= _names(part, source)
        return cls(given["user"], given["assistant"], given.get("system"), frozenset(names))

    @property
    def takes_all(self) -> bool:
        return WHOLE_ROW in self.names


def _names(part: str, source: str) -> set[str]:
    """The names in a template, its own variables among them. It is parsed but not compiled, which would compute constants."""
    try:
        return {node.name for node in Environment().parse(source).find_all(nodes.Name)}
    except TemplateSyntaxError as error:
        raise Unprocessable(f"template: {part}, line {error.lineno}: {error.message}", param="template") from None
    except RecursionError:
        raise Unprocessable(f"template: {part} is nested too deeply", param="template") from None
