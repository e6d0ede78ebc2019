"""Rows of CSV and TSV, whose first line names the columns. A row's number is that of its first line.

Cells are strings; an empty one is absent. A quote stands where a cell begins and ends, and is doubled within: where that is
broken it cannot be told where the next row begins, so nothing after it is read.
"""

import csv
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any, cast

from service.datasets.files.batches import NumberedRow
from service.datasets.files.budget import invalid_file, too_long
from service.datasets.files.json_documents import LABELS
from service.datasets.files.lines import BYTE_ORDER_MARK
from service.datasets.files.sources import Source
from service.datasets.values import InvalidRow, quoted
from service.settings import UploadSettings

DELIMITERS = (",", "\t", ";")
_PIECE_BYTES = 2**16


def delimiter_of(header: bytes, wanted: Collection[str] | None) -> str | None:
    """The delimiter with which the header names columns that are wanted; None if it names none with any.

    Where all columns are wanted, any header of two cells names them.
    """
    try:
        line = header.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        return None

    def names(delimiter: str) -> int:
        cells = _cells(line, delimiter)
        if wanted is None:
            return len(cells) - 1
        known = [cell for cell in cells if cell in wanted]
        return 0 if LABELS.issuperset(known) else len(known)

    best = max(DELIMITERS, key=names)
    return best if names(best) else None


def delimited_rows(source: Source, delimiter: str, names: list[str], limits: UploadSettings) -> Generator[NumberedRow]:
    """The rows of the table; `names` is given those of its columns."""
    # For the whole process, so it is only ever raised; what bounds a cell here is the feed.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_row_bytes + 1))
    feed = _Feed(source, limits)
    rows = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.begin()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if feed.fault is None:
                raise invalid_file(_broken(feed.first, error)) from error
            cells = []
        if not names and (cells or feed.fault):
            names.extend(_header(cells, feed))
        elif feed.fault is not None:
            yield feed.first, feed.fault
        elif cells:
            yield feed.first, _fields(names, cells)


class _Feed:
    """Gives the csv module the lines of one row after another, and of each row no more bytes than it may have.

    Of a longer row the rest is passed over: quotes come in pairs within a row, so it ends with the line where they are even.
    """

    def __init__(self, source: Source, limits: UploadSettings) -> None:
        self._source, self._most = source, limits.max_row_bytes
        self._number = 0
        self.begin()

    def begin(self) -> None:
        """A row begins with the next line."""
        self.first, self.fault = 0, cast("InvalidRow | None", None)
        self._bytes = self._quotes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._line()
        if not line:
            raise StopIteration
        if self._bytes > self._most:
            while self._quotes % 2 and self._line():
                pass
            if self._quotes % 2 == 0:
                self.fault = too_long(self._most)
            raise csv.Error("a quote is not closed")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            place = f"in line {self._number} at byte {error.start + 1}"
            self.fault = self.fault or InvalidRow(f"is not UTF-8 {place}; save the file as UTF-8")
            return line.decode(errors="replace")

    def _line(self) -> bytes:
        """The next line with its end, or the beginning of one that is too long; the counts include all of it."""
        line = piece = self._source.readline(self._most + 1)
        if not line:
            return b""
        self._number += 1
        self._source.meter.check_rows(self._number, "line")
        self.first = self.first or self._number
        while piece:
            self._bytes += len(piece)
            self._quotes += piece.count(b'"')
            piece = b"" if piece.endswith(b"\n") else self._source.readline(_PIECE_BYTES)
        return line.removeprefix(BYTE_ORDER_MARK) if self._number == 1 else line


def _header(cells: list[str], feed: _Feed) -> list[str]:
    if feed.fault is not None:
        raise invalid_file(f"The line with the names of the columns, line {feed.first}, {feed.fault}")
    names = [cell.strip() or f"(column {i})" for i, cell in enumerate(cells, 1)]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid_file(f"Two columns of the file have the same name, {quoted(twice)}; rename one")
    return names


def _fields(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | InvalidRow:
    if len(cells) != len(names):
        return InvalidRow(
            f"has {len(cells)} cells, but the header has {len(names)}; put a cell that contains the delimiter in double quotes"
        )
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _broken(first: int, error: csv.Error) -> str:
    what = str(error).partition(" - ")[0]
    return (
        f"The file cannot be read as CSV from line {first} on: {what}. Put a cell that contains the delimiter, a quote or a line"
        " break in double quotes, and double each quote in it"
    )
