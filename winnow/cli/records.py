"""How lists are printed: in a terminal as a table, else a record a line with tabs between its values; with --json as JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from winnow.answers import Answer
from winnow.cli.console import options, out, print_json

TableColumns = Mapping[str, Callable[[Any], Any]]
"""What each column holds of a record. The first one identifies it, and is never cut."""


def print_records(records: Iterable[Answer], columns: TableColumns) -> None:
    """Prints the records; a table is as wide as the terminal at most."""
    if options.as_json:
        print_json(list(records))
        return
    if not out.is_terminal:
        for record in records:
            print("\t".join(_on_a_line(_text(value(record))) for value in columns.values()), flush=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name.upper(), no_wrap=True, overflow="fold" if number == 0 else "ellipsis")
    rows = [[_text(value(record)) for value in columns.values()] for record in records]
    table.columns[0].min_width = max((len(row[0]) for row in rows), default=None)
    for row in rows:
        table.add_row(*(Text(_on_a_line(text)) for text in row))
    out.print(table)


def print_record(record: Answer, lines: Sequence[str] = ()) -> None:
    """Prints the fields of one record, or the lines that say the same in words."""
    if options.as_json:
        print_json(record)
    elif lines:
        for line in lines:
            out.print(line, soft_wrap=True, markup=False, highlight=False)
    else:
        for name, value in record.to_dict().items():
            if not isinstance(value, dict | list):
                out.print(f"{name}: {_text(value)}", soft_wrap=True, markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return age(value) if out.is_terminal else value.isoformat()
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _on_a_line(text: str) -> str:
    return " ".join(text.split())


def age(at: datetime) -> str:
    """How long ago, in two or three characters: 45s, 3m, 2h, 9d."""
    seconds = max(0, int((datetime.now(UTC) - at).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
