"""Tells what an upload is: by its content, and where that leaves it open, by the ending of its name."""

import io
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import IO

from service.datasets.files.budget import Meter, invalid_file
from service.datasets.files.delimited import delimiter_of
from service.datasets.files.json_documents import Text, first_value, holds_data, is_data
from service.datasets.files.lines import BYTE_ORDER_MARK, numbered_lines
from service.datasets.files.sources import Compression, Damaged, Source, compression_of, head_of, opened
from service.datasets.values import DECODER, InvalidRow, quoted
from service.http.errors import Unprocessable
from service.settings import UploadSettings


class Container(StrEnum):
    """What holds the rows of a file."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    TSV = "tsv"
    TEXT = "text"
    PARQUET = "parquet"
    ARROW = "arrow"
    ARROW_STREAM = "arrow_stream"


class Shape(StrEnum):
    """Where the rows of a JSON document are."""

    ARRAY = "array"
    OBJECTS = "objects"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a file is; `shape` is of JSON, `delimiter` of CSV and TSV."""

    container: Container
    compression: Compression | None = None
    shape: Shape = Shape.ARRAY
    delimiter: str = ","


_TABLES = {
    b"PAR1": Container.PARQUET,
    b"ARROW1": Container.ARROW,
    b"\xff\xff\xff\xff": Container.ARROW_STREAM,
}
_UNZIP = "unzip it and upload the file in it; of an Excel workbook (.xlsx) save the sheet as CSV"
_REPACK = "unpack it and upload the file as it is, or packed with gzip or zstd"
_UTF8 = "save it as UTF-8"
# Where the first bytes stand, what they are, what the file then is, and what its owner can do.
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive", _UNZIP),
    (0, b"PK\x05\x06", "an empty zip archive", _UNZIP),
    (256, b"\0ustar", "a tar archive", "unpack it and upload the file in it"),
    (4, b"1AY&SY", "packed with bzip2", _REPACK),
    (0, b"\xfd7zXZ\x00", "packed with xz", _REPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _REPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _REPACK),
    (0, b"\x04\x22\x4d\x18", "packed with lz4", _REPACK),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook (.xls)", "save the sheet as CSV"),
    (0, b"%PDF-", "a PDF document", "extract its text and upload that with format=text"),
    (0, b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (0, b"FEA1", "a Feather file of version 1", "write it as Arrow (Feather version 2) or Parquet"),
    (0, b"\xff\xfe", "in UTF-16 or UTF-32", _UTF8),
    (0, b"\xfe\xff", "in UTF-16", _UTF8),
    (0, b"\x00\x00\xfe\xff", "in UTF-32", _UTF8),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file", "fetch it with `git lfs pull`"),
)
_HEAD_BYTES = 2**16
_PACKED_NAME = re.compile(r"\.(gz|gzip|zst|zstd)$")
_TEXT_NAMES, _TABLE_NAMES, _JSON_NAMES = (".txt", ".text", ".md"), (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
_JSON_START, _JSON_LINE = re.compile(rb'\[\s*[{\]]|\{\s*["}]'), re.compile(rb'^\s*\{\s*"', re.MULTILINE)
_WEB_PAGE = re.compile(rb"<(!doctype html|html)", re.IGNORECASE)


def recognise(
    file: IO[bytes], name: str, wanted: Collection[str] | None, limits: UploadSettings, *, text: bool
) -> Recognised:
    """What the file is; `wanted` are the columns that a header may name (None: any), `text` whether plain text is expected.

    Raises:
        TooLarge: a budget is exceeded before that can be told.
        Unprocessable: it is none that is taken; the message says what would be.
    """
    return _Look(file, name, wanted, limits, text).found()


class _Look:
    """A look at the beginning of a file, and where that does not tell it, at more of it; each look is within the budgets."""

    def __init__(
        self, file: IO[bytes], name: str, wanted: Collection[str] | None, limits: UploadSettings, text: bool
    ) -> None:
        self._file, self._wanted, self._limits = file, wanted, limits
        self._name = _PACKED_NAME.sub("", name.strip().lower())
        self._is_text = text
        self._packed: Compression | None = None
        self._whole: bytes | None = None

    @contextmanager
    def _opened(self) -> Iterator[Source]:
        if self._whole is not None:
            yield Source(io.BytesIO(self._whole), Meter(self._file, self._limits))
            return
        try:
            with opened(self._file, self._packed, Meter(self._file, self._limits), self._limits) as source:
                yield source
        except Damaged as damage:
            raise invalid_file(
                f"The {self._packed} stream is corrupt or truncated at its beginning: {damage}"
            ) from damage

    def found(self) -> Recognised:
        head = head_of(self._file, _HEAD_BYTES)
        self._packed = compression_of(head)
        if self._packed is not None:
            with self._opened() as source:
                head = source.read(_HEAD_BYTES)
            if compression_of(head) is not None:
                raise invalid_file(
                    f"The file is packed twice, with {self._packed} around {compression_of(head)}; unpack it once"
                )
        if len(head) < _HEAD_BYTES:
            self._whole = head
        for magic, container in _TABLES.items():
            if head.startswith(magic):
                return Recognised(container, self._packed)
        _refuse_foreign(head)
        return self._of_text(head.removeprefix(BYTE_ORDER_MARK).lstrip())

    def _of_text(self, start: bytes) -> Recognised:
        if not start:  # blank, at least where it begins
            return Recognised(Container.JSONL, self._packed)
        expects_text = self._is_text or self._name.endswith(_TEXT_NAMES)
        if start[:1] in (b"[", b"{") and (not expects_text or _JSON_START.match(start)):
            return self._of_json(start[:1])
        if b"\0" not in start.partition(b"\n")[0] and (found := self._of_words(start, expects_text)) is not None:
            return found
        if _WEB_PAGE.match(start):
            raise invalid_file("The file is a web page; download the file itself, not the page that shows it")
        raise _unknown(start)

    def _of_words(self, start: bytes, expects_text: bool) -> Recognised | None:
        """Of a file that is no JSON, unless its first lines are broken."""
        if self._name.endswith(_TEXT_NAMES):
            return Recognised(Container.TEXT, self._packed)
        header, is_table = start.partition(b"\n")[0], self._name.endswith(_TABLE_NAMES)
        delimiter = None if self._wanted is None and expects_text else delimiter_of(header, self._wanted)
        if delimiter is None and is_table:  # its columns have names of their own
            delimiter = "\t" if self._name.endswith(".tsv") else delimiter_of(header, None) or ","
        if delimiter is not None:
            return Recognised(Container.TSV if delimiter == "\t" else Container.CSV, self._packed, delimiter=delimiter)
        if expects_text:
            return Recognised(Container.TEXT, self._packed)
        if self._name.endswith(_JSON_NAMES) or _JSON_LINE.search(start):
            return Recognised(Container.JSONL, self._packed)
        return None

    def _of_json(self, mark: bytes) -> Recognised:
        shape = Shape.ARRAY if mark == b"[" else self._shape_of_objects()
        if shape is None:
            return Recognised(Container.JSONL, self._packed)
        return Recognised(Container.JSON, self._packed, shape)

    def _shape_of_objects(self) -> Shape | None:
        """None: each line is an object of its own, or should be one."""
        with self._opened() as source:
            lines = (line for _, line in numbered_lines(source, self._limits) if line is None or line.strip())
            first = next(lines)
            if first is None:
                return self._shape_if_large(None)
            try:
                line = first.strip().decode()
                value = DECODER.decode(line)
            except UnicodeDecodeError:
                return None
            except ValueError as error:
                at = getattr(error, "pos", None)
                if at is None:  # an element that cannot be taken, in a document or in a line
                    return self._shape_if_large(None) if next(lines, b"") == b"" else None
                return self._shape_of_document() if at >= len(line) else None
            except RecursionError:
                return self._shape_if_large(None) if next(lines, b"") == b"" else None
            return Shape.DATA if is_data(value, self._wanted) and next(lines, b"") == b"" else None

    def _shape_of_document(self) -> Shape:
        with self._opened() as source:
            text = Text(source)
            try:
                value = first_value(text, self._limits)
                if is_data(value, self._wanted) and not text.next():
                    return Shape.DATA
            except Unprocessable:  # its reader says what is wrong with it
                return Shape.OBJECTS
        if isinstance(value, InvalidRow):
            return self._shape_if_large(Shape.OBJECTS) or Shape.OBJECTS
        return Shape.OBJECTS

    def _shape_if_large(self, otherwise: Shape | None) -> Shape | None:
        with self._opened() as source:
            return Shape.DATA if holds_data(Text(source)) else otherwise


def _refuse_foreign(head: bytes) -> None:
    for at, magic, kind, remedy in _FOREIGN:
        if head.startswith(magic, at):
            raise invalid_file(f"The file is {kind}; {remedy}")
    if b"\0" in head[:2]:
        raise invalid_file("The file is in UTF-16, or is no text at all; save it as UTF-8")


def _unknown(start: bytes) -> Unprocessable:
    beginning = quoted(start[:40].decode(errors="replace"))
    return invalid_file(
        f"It cannot be told what the file is: it begins with {beginning}. Send JSONL (one JSON object a line), JSON (an array of"
        " objects), Parquet, Arrow, or CSV or TSV with a first line that names the columns, each as it is or packed with gzip or"
        " zstd. Where the columns have other names than those that are known, end the dataset's name in .csv or .tsv and name the"
        " columns with columns=; send plain text with format=text"
    )
