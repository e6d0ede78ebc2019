"""Rows of a JSON document, one element in memory at a time: an array of them, one object or several, or {"data": [...]}.

A document is one value, so a fault of its syntax ends it; what is wrong with one element, such as its size, is that row's alone.
"""

import codecs
import json
import re
from collections.abc import Collection, Generator, Iterator
from typing import Any

from service.datasets.files.batches import NumberedRow
from service.datasets.files.budget import invalid_file, too_long
from service.datasets.files.sources import Source
from service.datasets.values import DECODER, InvalidRow
from service.http.errors import Unprocessable
from service.settings import UploadSettings

DATA = "data"
# Columns that say what a row is called; beside `data` they say it of the file.
LABELS = frozenset({"id", "source", "dataset"})
_MORE = 2**16
_MAX_BESIDE = 100
_LONGEST_TOKEN = (
    16  # a pair of escaped surrogates has 12 characters, and one that is cut is not at the very end of the text
)
_SPACE = re.compile(r"[ \t\n\r]*")
_OUTSIDE, _INSIDE = re.compile(r'["\[\]{},]'), re.compile(r'\\.|"', re.DOTALL)


class Text:
    """The characters of a document, of which only those that are being looked at are kept: `buffer`, from `at` on."""

    def __init__(self, source: Source) -> None:
        self.buffer, self.at, self.is_over = "", 0, False
        self.meter = source.meter
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._line, self._column = 1, 1  # where the buffer begins
        self._lines, self._bytes = 1, 0  # how far the source was read

    def more(self) -> bool:
        """Forgets what lies before `at`, and reads at least as much as is left: to decode it again costs no more than to read it.

        Raises:
            Unprocessable: it is not UTF-8.
        """
        if self.is_over:
            return False
        self._line, self._column = self._place(self.at)
        self.buffer, self.at = self.buffer[self.at :], 0
        wanted = len(self.buffer) + max(len(self.buffer), _MORE)
        pieces, size = [self.buffer], len(self.buffer)
        while size < wanted and not self.is_over:
            data = self._source.read(_MORE)
            self.is_over = not data
            pieces.append(self._decoded(data))
            size += len(pieces[-1])
        self.buffer = "".join(pieces)
        return size > len(pieces[0])

    def next(self) -> str:
        """The next character that is no white space, at which `at` then is; "" at the end."""
        while True:
            space = _SPACE.match(self.buffer, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def place(self, at: int) -> str:
        line, column = self._place(at)
        return f"line {line}, column {column}"

    def _place(self, at: int) -> tuple[int, int]:
        lines = self.buffer.count("\n", 0, at)
        column = at - self.buffer.rfind("\n", 0, at) if lines else self._column + at
        return self._line + lines, column

    def _decoded(self, data: bytes) -> str:
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line, byte = (
                self._lines + error.object.count(b"\n", 0, error.start),
                self._bytes - pending + error.start + 1,
            )
            raise invalid_file(
                f"The JSON document is not UTF-8 in line {line}, at byte {byte}; save it as UTF-8"
            ) from error
        self._bytes += len(data)
        self._lines += text.count("\n")
        return text


def is_data(value: object, wanted: Collection[str] | None) -> bool:
    """Whether an object holds rows in its list `data`, and is not a row itself."""
    if not isinstance(value, dict) or not isinstance(value.get(DATA), list):
        return False
    if any(name in value for name in wanted or () if name not in LABELS and name != DATA):
        return False
    return all(isinstance(row, dict) for row in value[DATA][:1])


def first_value(text: Text, limits: UploadSettings) -> Any:
    """The first value of the document, or an `InvalidRow` that says why it cannot be taken."""
    return _value(text, 1, limits.max_row_bytes)


def holds_data(text: Text) -> bool:
    """Whether the object that begins the document, however large it is, has a list `data`."""
    try:
        for key in _keys(text):
            if key == DATA and text.next() == "[":
                return True
            _skip(text, 0)
    except Unprocessable:  # whoever reads it as rows says what is wrong with it
        pass
    return False


def array_rows(text: Text, limits: UploadSettings) -> Generator[NumberedRow]:
    """The rows of an array that is the whole document."""
    number = 0
    for number, row in _elements(text, limits):
        yield number, row
    if text.next():
        raise _malformed(text, number, text.at, "something follows the array")


def object_rows(text: Text, limits: UploadSettings) -> Generator[NumberedRow]:
    """Objects that follow one another, each over several lines; mostly there is one."""
    number = 0
    while text.next():
        number += 1
        text.meter.check_rows(number, "row")
        yield number, _row(text, number, limits)


def data_rows(text: Text, limits: UploadSettings, beside: list[str]) -> Generator[NumberedRow]:
    """The rows of the list `data` of an object; `beside` is given its other keys, up to a hundred of them."""
    number, found = 0, False
    for key in _keys(text):
        if key == DATA and text.next() == "[":
            if found:
                raise _malformed(text, number, text.at, f"a second list called {DATA}")
            found = True
            for number, row in _elements(text, limits):
                yield number, row
        else:
            if len(beside) < _MAX_BESIDE:
                beside.append(key)
            _skip(text, number)
    if text.next():
        raise _malformed(text, number, text.at, "something follows the object; in JSONL each line is one row")


def _elements(text: Text, limits: UploadSettings) -> Iterator[NumberedRow]:
    """The elements of the array at whose bracket the text is; then it is behind its end."""
    text.next()
    text.at += 1
    number = 0
    if text.next() == "]":
        text.at += 1
        return
    while True:
        number += 1
        text.meter.check_rows(number, "row")
        yield number, _row(text, number, limits)
        mark = text.next()
        if mark not in ("]", ","):
            raise _malformed(text, number, text.at, "a comma or a closing bracket must follow the row")
        text.at += 1
        if mark == "]":
            return


def _row(text: Text, number: int, limits: UploadSettings) -> dict[str, Any] | InvalidRow:
    value = _value(text, number, limits.max_row_bytes)
    if isinstance(value, InvalidRow):
        _skip(text, number)
        return value
    return value if isinstance(value, dict) else InvalidRow("is not a JSON object; each row must be one")


def _value(text: Text, number: int, max_bytes: int) -> Any:
    """The next value, or an `InvalidRow` that says why it cannot be taken; the text is then still at its beginning."""
    text.next()
    while True:
        try:
            value, end = DECODER.raw_decode(text.buffer, text.at)
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated") or error.pos > len(text.buffer) - _LONGEST_TOKEN
            if is_cut and len(text.buffer) - text.at > max_bytes:
                return too_long(max_bytes)
            if is_cut and text.more():
                continue
            raise _malformed(text, number, error.pos, error.msg) from error
        except RecursionError:
            return InvalidRow("is nested too deeply")
        except ValueError as error:  # NaN, or an integer of thousands of digits
            return InvalidRow(f"is not readable JSON: {error}")
        if end == len(text.buffer) and text.more():  # a number may go on
            continue
        if end - text.at > max_bytes // 4 and len(text.buffer[text.at : end].encode()) > max_bytes:
            return too_long(max_bytes)
        text.at = end
        return value


def _keys(text: Text) -> Iterator[str]:
    """The keys of the object at whose brace the text is. At each the text is at its value, which the caller must pass."""
    text.next()
    text.at += 1
    mark = "{"
    while True:
        if text.next() == "}" and mark == "{":
            text.at += 1
            return
        key = _value(text, 0, _MORE) if text.next() == '"' else None
        if not isinstance(key, str) or text.next() != ":":
            raise _malformed(text, 0, text.at, "a key in double quotes and a colon must stand here")
        text.at += 1
        yield key
        mark = text.next()
        if mark not in ("}", ","):
            raise _malformed(text, 0, text.at, "a comma or a closing brace must stand here")
        text.at += 1
        if mark == "}":
            return


def _skip(text: Text, number: int) -> None:
    """Passes over the next value, of whatever size and depth."""
    text.next()
    depth, is_inside = 0, False
    while True:
        token = (_INSIDE if is_inside else _OUTSIDE).search(text.buffer, text.at)
        if token is None:
            # A backslash at the very end belongs to the character that is still to come.
            is_cut = is_inside and text.buffer.endswith("\\", text.at)
            text.at = len(text.buffer) - is_cut
            if not text.more():
                raise _malformed(text, number, text.at, "the file ends within a value: it is truncated")
            continue
        mark = token.group()
        if depth == 0 and not is_inside and mark in "]},":
            text.at = token.start()
            return
        text.at = token.end()
        if mark == '"':
            is_inside = not is_inside
        elif mark in ("[", "{"):
            depth += 1
        elif mark in ("]", "}"):
            depth -= 1
        if depth == 0 and not is_inside and mark in ('"', "]", "}"):
            return


def _malformed(text: Text, number: int, at: int, message: str) -> Unprocessable:
    place = f"row {number}, {text.place(at)}" if number else text.place(at)
    ending = "; the file ends there, so it may be truncated" if text.is_over and at >= len(text.buffer) else ""
    return invalid_file(f"The JSON document is malformed in {place}: {message}{ending}")
