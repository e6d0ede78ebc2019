"""What was taken of an upload, and what was left alone: counted while its rows are read, in bounded memory."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from service.datasets.rows.messages import NOTES
from service.datasets.rows.options import Taken
from service.datasets.values import shown

MAX_FORMS = 50
MAX_NAMES = 100
_MAX_COUNTED = 10_000
_MAX_PENDING = 1_000


class Detection:
    """Adds up what was taken of the rows."""

    def __init__(self) -> None:
        self._last: Taken | None = None
        self._run = 0
        self._pending: Counter[Taken] = Counter()
        self._pending_names = 0
        self._forms: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self._left: dict[str, None] = {}  # in the order in which they were met
        self._notes: Counter[str] = Counter()

    def add(self, taken: Taken, rows: int = 1) -> None:
        """Counts so many rows of which the same was taken."""
        if taken is not self._last:  # mostly it is: a hash for each row would cost more than to look
            self._end_run()
            self._last = taken
        self._run += rows

    def leave(self, names: Iterable[str]) -> None:
        """Adds columns of the file that were left alone, where no row has said so."""
        self._settle()
        self._leave(map(shown, names))

    @property
    def columns(self) -> set[str]:
        """All columns that something was taken from."""
        self._settle()
        return {column for _, columns in self._forms for _, column in columns}

    def result(self, container: str, compression: str | None) -> dict[str, Any]:
        """As it is stored and told (`schemas.Detected`), of limited size."""
        self._settle()
        forms = self._forms.most_common(MAX_FORMS)
        sources = {column: None for (_, columns), _ in forms for slot, column in columns if slot == "source"}
        return {
            "container": container,
            "compression": compression,
            "forms": [{"form": form, "columns": dict(columns), "rows": rows} for (form, columns), rows in forms],
            "more_forms": len(self._forms) - len(forms),
            "source_columns": list(sources),
            "left_alone": list(self._left)[:MAX_NAMES],
            "more_left_alone": max(len(self._left) - MAX_NAMES, 0),
            "notes": [
                {"code": code, "rows": rows, "message": f"{rows:,} {'row' if rows == 1 else 'rows'} with {NOTES[code]}"}
                for code, rows in sorted(self._notes.items())
            ],
        }

    def _end_run(self) -> None:
        if self._last is None:
            return
        if self._last not in self._pending:  # rows may differ without end in what they have beside their content
            self._pending_names += 1 + len(self._last.left)
        self._pending[self._last] += self._run
        self._last, self._run = None, 0
        if self._pending_names >= _MAX_PENDING:
            self._add_up()

    def _settle(self) -> None:
        self._end_run()
        self._add_up()

    def _add_up(self) -> None:
        for taken, rows in self._pending.items():
            form = taken.form, taken.columns
            if form in self._forms or len(self._forms) < _MAX_COUNTED:
                self._forms[form] += rows
            self._leave(taken.left)
            for code in taken.notes:
                self._notes[code] += rows
        self._pending.clear()
        self._pending_names = 0

    def _leave(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self._left) >= _MAX_COUNTED:
                return
            self._left[name] = None
