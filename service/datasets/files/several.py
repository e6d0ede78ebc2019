"""Several files read as one upload, such as those of a split on the hub: one after the other, under one budget for all."""

from collections.abc import Collection, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import IO

from service.datasets.files.batches import Batch, NumberedRow
from service.datasets.files.budget import invalid_file
from service.datasets.files.reader import Upload, open_upload
from service.http.errors import TooLarge
from service.settings import UploadSettings


def open_several(
    files: Iterator[tuple[IO[bytes], str]],
    wanted: Collection[str] | None,
    limits: UploadSettings,
    *,
    text: bool = False,
    most: int | None = None,
) -> Upload:
    """Streams the rows of all files, whose numbers go on from file to file.

    Args:
        files: each with its name; the next one is taken when the one before has been read.
        most: rows; what follows them is not read, nor are further files taken.

    Raises (also while the rows are read): as `open_upload`.
    """
    first = next(files, None)
    if first is None:
        raise invalid_file("There is no file with rows.")
    upload = open_upload(*first, wanted, limits, text=text)

    def parts() -> Generator[NumberedRow | Batch]:
        current, rows, spent = upload, 0, 0
        before = 0
        while True:
            last = 0
            with closing(current.parts):
                for part in current.parts:
                    part, last, count = _moved(part, before, None if most is None else most - rows)
                    _check(before + last, spent + current.meter.bytes, limits)
                    yield part
                    rows += count
                    if rows == most:
                        return
            before, spent = before + last, spent + current.meter.bytes
            following = next(files, None)
            if following is None:
                return
            current = open_upload(*following, wanted, limits, text=text)
            for known, found in ((upload.names, current.names), (upload.beside, current.beside)):
                known.extend(name for name in found if name not in known)

    return replace(upload, unit="row", parts=parts())


def _moved(part: NumberedRow | Batch, before: int, left: int | None) -> tuple[NumberedRow | Batch, int, int]:
    """The part numbered in all files, with no more than the rows that are left; its last number in its own file; its rows."""
    if not isinstance(part, Batch):
        number, row = part
        return (before + number, row), number, 1
    columns = part.columns if left is None else part.columns.slice(0, left)
    faults = {index: fault for index, fault in part.faults.items() if index < columns.num_rows}
    return Batch(before + part.first, columns, faults), part.first + columns.num_rows - 1, columns.num_rows


def _check(rows: int, size: int, limits: UploadSettings) -> None:
    if rows > limits.max_rows or size > limits.max_bytes:
        raise TooLarge(
            f"The files together have more than {limits.max_rows:,} rows or {limits.max_bytes:,} bytes; take fewer of them with"
            " `limit`, or a smaller split.",
            code="upload_too_large",
        )
