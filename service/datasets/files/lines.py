"""Rows of lines: JSONL, one JSON object a line, and plain text, whose documents are parted by blank lines."""

import json
from collections.abc import Generator, Iterator
from itertools import count
from typing import Any

from service.datasets.files.batches import NumberedRow
from service.datasets.files.budget import too_long
from service.datasets.files.sources import Source
from service.datasets.values import DECODER, InvalidRow
from service.settings import UploadSettings

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def numbered_lines(source: Source, limits: UploadSettings) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its end and its number, from 1; None in place of one that is longer than a row may be."""
    for number in count(1):
        line = source.readline(limits.max_row_bytes + 1)
        if not line:
            return
        # Blank lines count as well: gigabytes of newlines would keep the parser busy for an hour.
        source.meter.check_rows(number, "line")
        if len(line) > limits.max_row_bytes and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = source.readline(2**16)
            yield number, None
            continue
        yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def json_lines(source: Source, limits: UploadSettings) -> Generator[NumberedRow]:
    """The rows of JSONL; blank lines are skipped."""
    for number, line in numbered_lines(source, limits):
        if line is None:
            yield number, too_long(limits.max_row_bytes)
        elif line and not line.isspace():
            yield number, json_object(line)


def text_documents(source: Source, limits: UploadSettings) -> Generator[NumberedRow]:
    """The documents of a text file, each with the number of its first line, and with \\n at the end of each line but the last."""
    first, size = 0, 0
    lines: list[str] = []
    fault: InvalidRow | None = None
    for number, line in numbered_lines(source, limits):
        if line is not None and not line.strip():
            if first:
                yield first, fault or {"text": "\n".join(lines)}
            first, size, lines, fault = 0, 0, [], None
            continue
        first = first or number
        size += limits.max_row_bytes + 1 if line is None else len(line)
        if line is None or size > limits.max_row_bytes:
            fault = fault or too_long(limits.max_row_bytes)
        if line is None or fault is not None:
            continue
        try:
            lines.append(line.removesuffix(b"\n").removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            fault = InvalidRow(f"is not UTF-8 in line {number} at byte {error.start + 1}; save the file as UTF-8")
    if first:
        yield first, fault or {"text": "\n".join(lines)}


def json_object(line: bytes) -> dict[str, Any] | InvalidRow:
    try:
        value = DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return InvalidRow(f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return InvalidRow(f"is not JSON: {error.msg} at column {error.colno}; each line must be one JSON object")
    except RecursionError:
        return InvalidRow("is nested too deeply")
    except ValueError as error:  # NaN, or an integer of thousands of digits
        return InvalidRow(f"is not readable JSON: {error}")
    return value if isinstance(value, dict) else InvalidRow("is not a JSON object; each line must be one JSON object")
