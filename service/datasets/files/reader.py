"""Streams the rows of an upload, whatever common file it is, under budgets.

A small file can expand without end (gzip a thousandfold, Parquet's dictionaries far more), so nothing is decoded whole: lines
and the elements of JSON documents are read under a limit, and what native code decodes (Parquet, Arrow, zstd) by a separate
process (`table_reader.py`), of which batches of columns, or bytes, are taken. What a file may expand to, and the processor
time that it may take, are in proportion to its bytes.
"""

from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import IO, Literal

from service.datasets.files.batches import Batch, NumberedRow
from service.datasets.files.budget import Meter, invalid_file
from service.datasets.files.delimited import delimited_rows
from service.datasets.files.json_documents import Text, array_rows, data_rows, object_rows
from service.datasets.files.lines import json_lines, text_documents
from service.datasets.files.recognise import Container, Recognised, Shape, recognise
from service.datasets.files.sources import Compression, Damaged, Source, opened, unpacked
from service.datasets.files.table_batches import table_batches
from service.settings import UploadSettings

_TABLES = {Container.PARQUET: "Parquet", Container.ARROW: "Arrow", Container.ARROW_STREAM: "an Arrow stream"}


@dataclass(frozen=True, slots=True)
class Upload:
    """Numbered rows, or batches of columns; `unit` is what the numbers count.

    Two lists are filled while `parts` are read: `names`, of all columns that a file with a schema or a header has, read or
    not; `beside`, of the keys that a JSON document has beside the list `data` of its rows.
    """

    unit: Literal["line", "row"]
    container: Container
    compression: Compression | None
    parts: Generator[NumberedRow | Batch]
    meter: Meter
    names: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)


def open_upload(
    file: IO[bytes], name: str, wanted: Collection[str] | None, limits: UploadSettings, *, text: bool = False
) -> Upload:
    """Streams the rows of a file on disk.

    Args:
        name: of the file or of the dataset; its ending tells what the content leaves open.
        wanted: the columns that may be used, None for all. Of Parquet and Arrow no others are read, unless it has none of them.
        text: plain text is expected, if the file is nothing else.

    Raises (also while the rows are read):
        TooLarge: a budget is exceeded.
        Unprocessable: the file as a whole cannot be read.
    """
    found = recognise(file, name, wanted, limits, text=text)
    names: list[str] = []
    beside: list[str] = []
    parts: Generator[NumberedRow | Batch]
    meter = Meter(file, limits)
    if found.container in _TABLES:
        parts = _batches(file, found, wanted, names, meter, limits)
    else:
        parts = _rows(file, found, names, beside, meter, limits)
    by_line = found.container not in _TABLES and found.container is not Container.JSON
    return Upload("line" if by_line else "row", found.container, found.compression, parts, meter, names, beside)


def _batches(
    file: IO[bytes],
    found: Recognised,
    wanted: Collection[str] | None,
    names: list[str],
    meter: Meter,
    limits: UploadSettings,
) -> Generator[Batch]:
    columns = None if wanted is None else list(wanted)
    with unpacked(file, found.compression, meter, limits) as table:
        kind = _TABLES[found.container]
        yield from table_batches(table, found.container, kind, columns, names, meter, limits)


def _rows(
    file: IO[bytes], found: Recognised, names: list[str], beside: list[str], meter: Meter, limits: UploadSettings
) -> Generator[NumberedRow]:
    number = 0
    try:
        with opened(file, found.compression, meter, limits) as source:
            for number, row in _rows_of(source, found, names, beside, limits):
                yield number, row
    except Damaged as damage:
        unit = "row" if found.container is Container.JSON else "line"
        raise invalid_file(
            f"The {found.compression} stream is corrupt or truncated after {unit} {number}: {damage}"
        ) from damage


def _rows_of(
    source: Source, found: Recognised, names: list[str], beside: list[str], limits: UploadSettings
) -> Generator[NumberedRow]:
    if found.container is Container.JSONL:
        return json_lines(source, limits)
    if found.container is Container.TEXT:
        return text_documents(source, limits)
    if found.container is not Container.JSON:
        return delimited_rows(source, found.delimiter, names, limits)
    if found.shape is Shape.ARRAY:
        return array_rows(Text(source), limits)
    if found.shape is Shape.DATA:
        return data_rows(Text(source), limits, beside)
    return object_rows(Text(source), limits)
