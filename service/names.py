"""Names that people read: of keys, datasets, rows, sources. Characters that make one look like another, or break a line, are
refused: control characters, line and paragraph separators, and those that change the direction of writing (CVE-2021-42574)."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

_DISGUISES = r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_IN_NAME = rf"\x00-\x1f\x7f-\x9f{_DISGUISES}"
NOT_IN_NAMES = f"[{_IN_NAME}]"
_IN_TEXT = rf"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_DISGUISES}"
NOT_IN_TEXT = f"[{_IN_TEXT}]"
# Compiled here: each row of an upload asks twice.
_BAD_IN_NAME, _BAD_IN_TEXT = re.compile(NOT_IN_NAMES), re.compile(NOT_IN_TEXT)


def check_name(name: str) -> str:
    """The name.

    Raises:
        ValueError: it has a character that a name must not have; the message says which, and where.
    """
    return _check(_BAD_IN_NAME, name)


def _check_text(text: str) -> str:
    return _check(_BAD_IN_TEXT, text)


def _check(bad: re.Pattern[str], text: str) -> str:
    if (found := bad.search(text)) is not None:
        raise ValueError(
            "must not contain control characters, line separators or marks of direction; remove"
            f" U+{ord(found[0]):04X}, character {found.start() + 1}"
        )
    return text


Name = Annotated[str, AfterValidator(check_name), Field(json_schema_extra={"pattern": f"^[^{_IN_NAME}]*$"})]
# May have several lines.
Text = Annotated[str, AfterValidator(_check_text), Field(json_schema_extra={"pattern": f"^[^{_IN_TEXT}]*$"})]
