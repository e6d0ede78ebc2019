"""Several files as one upload: numbers that go on, a limit that stops in the midst, budgets of all together."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.datasets.files.batches import Batch
from service.datasets.files.several import open_several
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

LIMITS = UploadSettings()


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(start, stop)]


def written(folder: Path, *parts: tuple[str, list[dict[str, Any]]]) -> Iterator[tuple[IO[bytes], str]]:
    """The files; a JSON line is followed by a blank one, which has a number of its own."""
    for i, (kind, content) in enumerate(parts):
        path = folder / f"{i}.{kind}"
        if kind == "parquet":
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(content), buffer, row_group_size=3)
            path.write_bytes(buffer.getvalue())
        else:
            path.write_text("".join(json.dumps(row) + "\n\n" for row in content))
        with path.open("rb") as file:
            yield file, path.name


def read(files: Iterator[tuple[IO[bytes], str]], limits: UploadSettings = LIMITS, **more: Any) -> list[tuple[int, str]]:
    found = []
    for part in open_several(files, None, limits, **more).parts:
        for number, row in part.rows(2**20) if isinstance(part, Batch) else [part]:
            assert isinstance(row, dict)
            found.append((number, row["prompt"]))
    return found


def test_numbers_go_on_from_file_to_file(tmp_path: Path) -> None:
    files = written(tmp_path, ("parquet", rows(0, 7)), ("jsonl", rows(7, 10)), ("parquet", rows(10, 12)))
    found = read(files)
    assert [prompt for _, prompt in found] == [f"p{i}" for i in range(12)]
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14]


@pytest.mark.parametrize("kinds", [("parquet", "parquet"), ("jsonl", "jsonl"), ("parquet", "jsonl")])
@pytest.mark.parametrize("most", [1, 4, 6, 7, 8, 13, 14, 99])
def test_a_limit_stops_where_it_says_and_takes_no_further_file(
    tmp_path: Path, kinds: tuple[str, str], most: int
) -> None:
    taken = []

    def files() -> Iterator[tuple[IO[bytes], str]]:
        for file in written(tmp_path, (kinds[0], rows(0, 7)), (kinds[1], rows(7, 14))):
            taken.append(file[1])
            yield file

    assert [prompt for _, prompt in read(files(), most=most)] == [f"p{i}" for i in range(min(most, 14))]
    assert len(taken) == (1 if most <= 7 else 2)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_and_bytes_are_budgeted_together(tmp_path: Path, kind: str) -> None:
    def files() -> Iterator[tuple[IO[bytes], str]]:
        return written(tmp_path, (kind, rows(0, 40)), (kind, rows(40, 80)))

    first = open_several(written(tmp_path, (kind, rows(0, 40))), None, LIMITS)
    assert sum(1 for _ in first.parts) > 0
    size = first.meter.bytes
    assert len(read(files())) == 80
    for limits in ({"max_rows": 70 if kind == "parquet" else 140}, {"max_bytes": int(1.6 * size)}):
        with pytest.raises(TooLarge):
            read(files(), LIMITS.model_copy(update=limits))


def test_no_file_is_no_upload() -> None:
    with pytest.raises(Unprocessable):
        open_several(iter(()), None, LIMITS)
