"""The selected rows of the file that was uploaded, as they stand there: with all their columns, byte for byte, in their order."""

import gzip
import hashlib
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from winnow.answers import Dataset, Detected

_LINES = ("jsonl", "csv", "tsv")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BATCH_ROWS = 8192

Record = tuple[int, bytes]
"""The number by which the service names a row (of its first line, or of the row itself, from 1), and the row."""


def check(source: Path, path: Path, detected: "Detected | None") -> None:
    """That `source` is the file that was uploaded, and of a kind that rows can be copied from, to a file like `path`.

    Raises:
        ValueError: it is not.
    """
    if detected is None or detected.sha256 is None:
        raise ValueError(
            f"{source}: it is not known of which file the pool was made, as it was imported, or uploaded to an earlier version of"
            " the service. Upload the file, and post the job again; what was computed is reused"
        )
    if detected.container not in (*_LINES, "parquet"):
        raise ValueError(
            f"{source}: rows are copied out of JSON lines, CSV, TSV and Parquet, not {detected.container};"
            " use the preset `rows`, or convert the file and upload it"
        )
    endings = [f".{detected.container}", *([f".{detected.container}.gz"] if detected.container in _LINES else [])]
    if not path.name.endswith(tuple(endings)):
        raise ValueError(f"{path}: the rows stay what they are, {detected.container}; end it in {' or '.join(endings)}")
    if path.exists() and path.samefile(source):
        raise ValueError(f"{path}: it is the file that the rows are copied out of; name another one")
    with source.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != detected.sha256:
            raise ValueError(f"{source}: the pool was made of another file: its sha256 is {detected.sha256}")


def copy(source: Path, path: Path, pool: "Dataset", *, selected: Collection[int], skipped: Collection[int]) -> None:
    """Writes the rows of `source` with these indices in the pool to `path`; one that ends in .gz is compressed. After `check`.

    `skipped`: the numbers of rows that the pool was left without.

    Raises:
        ValueError: the file has other rows than the pool.
    """
    detected = cast("Detected", pool.detected)
    if detected.container == "parquet":
        rows = _copy_parquet(source, path, selected, skipped)
    else:
        with _opened(source, detected.compression) as lines, _created(path) as out:
            rows = _copy_lines(lines, out, detected.container, selected, skipped)
    if rows != pool.row_count:
        raise ValueError(
            f"{source}: rows could not be told apart: {rows:,} were found, and the pool has {pool.row_count:,}"
        )


def _copy_lines(
    lines: IO[bytes], out: IO[bytes], container: str, selected: Collection[int], skipped: Collection[int]
) -> int:
    """How many rows of the pool the file has."""
    index = 0
    records = _json_lines(lines) if container == "jsonl" else _table_rows(lines)
    if container != "jsonl":
        out.write(next(records)[1])  # the names of its columns
    for number, record in records:
        if number in skipped:
            continue
        if index in selected:
            out.write(record if record.endswith(b"\n") else record + b"\n")
        index += 1
    return index


def _json_lines(lines: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield number, content


def _table_rows(lines: IO[bytes]) -> Iterator[Record]:
    """Rows of CSV with the lines that they take; within a row quotes come in pairs."""
    first, row = 0, b""
    for number, line in enumerate(lines, 1):
        first, row = first or number, row + line
        if row.count(b'"') % 2 == 0:
            if row.strip():
                yield first, row
            first, row = 0, b""
    if row.strip():
        yield first, row


def _copy_parquet(source: Path, path: Path, selected: Collection[int], skipped: Collection[int]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = index = 0
    with pq.ParquetFile(source) as parquet, pq.ParquetWriter(path, parquet.schema_arrow) as out:
        for batch in parquet.iter_batches(_BATCH_ROWS):
            kept = []
            for place in range(batch.num_rows):
                number += 1
                if number in skipped:
                    continue
                if index in selected:
                    kept.append(place)
                index += 1
            if kept:
                out.write_batch(batch.take(pa.array(kept)))
    return index


def _opened(path: Path, compression: str | None) -> IO[bytes]:
    if compression is None:
        return path.open("rb")
    import pyarrow as pa

    return cast("IO[bytes]", io.BufferedReader(pa.input_stream(str(path), compression=compression)))


def _created(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "wb")) if path.suffix == ".gz" else path.open("wb")
