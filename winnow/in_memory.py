"""Datasets that are in memory, or come row by row: they are written to a file, which is then uploaded like any other.

Of pandas, Polars, PyArrow and the like, whatever gives its rows as an Arrow stream is read batch by batch; nothing of these
libraries is imported.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 8192
_UNNAMED_INDEX = re.compile(r"__index_level_\d+__")
"""What PyArrow calls the index of a pandas DataFrame that has no name."""

Rows = Iterable[Mapping[str, Any]]


@contextmanager
def as_file(source: Any) -> Iterator[Path]:
    """A file with the rows, as Parquet or JSONL, until the context ends.

    Args:
        source: a DataFrame of pandas or Polars, a `datasets.Dataset`, a table of PyArrow, or an iterable of dicts.

    Raises:
        TypeError: it is none of these, or a row holds what JSON has no form for.
        ValueError: a row holds NaN or an infinity.
    """
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        path = Path(folder) / "rows"
        if _is_of("polars", source):
            if getattr(source, "height", None) == 0:
                raise _no_rows()
            # A LazyFrame is computed piece by piece.
            source.sink_parquet(path) if hasattr(source, "sink_parquet") else source.write_parquet(path)
        elif (batches := _batches(source)) is not None:
            _write_parquet(path, batches)
        elif isinstance(source, Iterable) and not isinstance(source, Mapping | str | bytes):
            _write_lines(path, source)
        else:
            known = "a path, bytes, a DataFrame, a datasets.Dataset, or dicts"
            raise TypeError(f"source: {type(source).__name__} is no dataset; expected {known}")
        yield path


def _is_of(library: str, source: Any) -> bool:
    return type(source).__module__.partition(".")[0] == library


def _batches(source: Any) -> "Iterator[pa.RecordBatch] | None":
    """The rows as Arrow, some thousands at a time; None where they are no columns."""
    if _is_of("datasets", source) and getattr(source, "features", None) is not None:
        # Its own iteration knows of selections and shuffles of its rows, and reads its files piece by piece.
        tables = source.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        return (batch for table in tables for batch in table.to_batches())
    if not hasattr(source, "__arrow_c_stream__"):
        return None
    import pyarrow as pa

    reader: Iterator[pa.RecordBatch] = iter(pa.RecordBatchReader.from_stream(source))
    return reader


def _write_parquet(path: Path, batches: "Iterator[pa.RecordBatch]") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(batches, None)
    if first is None:
        raise _no_rows()
    names = [name for name in first.schema.names if not _UNNAMED_INDEX.fullmatch(name)]
    schema = pa.schema([first.schema.field(name) for name in names])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in chain([first], batches):
            writer.write_table(pa.Table.from_batches([batch]).select(names).cast(schema), row_group_size=_BATCH_ROWS)


def _write_lines(path: Path, rows: Rows) -> None:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise TypeError(f"row {count}: expected a dict, not a {type(row).__name__}")
            try:
                file.write(json.dumps(dict(row), allow_nan=False, ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:
                raise type(error)(f"row {count}: {error}") from error
    if count == 0:
        raise _no_rows()


def _no_rows() -> ValueError:
    return ValueError("source: it has no rows")
