"""Rows of an upload that cannot be used: either they refuse it, or a report of them is written while the others are kept."""

import gzip
import json
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from service.http.errors import Unprocessable

MAX_FAULTS = 20
REPORT = "skipped.jsonl.gz"  # in the folder that it is given
_MAX_REASON = 1_000


class OnBadRow(StrEnum):
    """What becomes of an upload with rows that cannot be used."""

    REFUSE = "refuse"
    SKIP = "skip"


class BadRows:
    """Collects them as they are found. With `skip` the report is on the disk, and memory holds the first few.

    A line of the report is {"unit": "line" or "row", "number": from 1, "reason": "..."}.
    """

    def __init__(self, folder: Path, unit: str, on_bad_row: OnBadRow) -> None:
        self.count = 0
        self.path = folder / REPORT
        self._unit, self._skips = unit, on_bad_row is OnBadRow.SKIP
        self._first: list[tuple[str, str]] = []  # place, reason
        self._open = ExitStack()

    def __enter__(self) -> Self:
        # Without the time and the name in its header: equal reports are equal files.
        file = self._open.enter_context(self.path.open("wb"))
        self._report = self._open.enter_context(gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def add(self, number: int, reason: str) -> None:
        """Takes down one row.

        Raises:
            Unprocessable: it is not to be skipped, and as many are known as an error names.
        """
        reason = reason[:_MAX_REASON]
        self.count += 1
        if len(self._first) < MAX_FAULTS:
            self._first.append((f"{self._unit} {number}", reason))
        if self._skips:
            line = json.dumps({"unit": self._unit, "number": number, "reason": reason})
            self._report.write(f"{line}\n".encode())
        elif self.count == MAX_FAULTS:
            raise self._refusal()

    def check(self, kept: int) -> None:
        """Whether the `kept` rows may be stored, now that all were looked at.

        Raises:
            Unprocessable: rows are bad and not to be skipped, or all of them are.
        """
        if self.count and not (self._skips and kept):
            raise self._refusal(kept)

    def _refusal(self, kept: int | None = None) -> Unprocessable:
        place, reason = self._first[0]
        if kept == 0:
            which, remedy = "No row can be used" if self.count > 1 else "The only row cannot be used", ""
        else:
            more = " (there may be more)" if kept is None else ""
            which = f"{self.count} {'row is' if self.count == 1 else 'rows are'} invalid{more}"
            remedy = ". Send on_bad_row=skip to keep the other rows and get a report of these"
        return Unprocessable(
            f"{which}; nothing was stored. The first: {place} {reason}{remedy}",
            param=place,
            errors=[{"param": place, "message": reason} for place, reason in self._first],
            code="invalid_rows",
        )
