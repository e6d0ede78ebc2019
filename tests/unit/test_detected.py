"""What is told of an upload: counted exactly, and of limited size whatever the rows are."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

from service.datasets import detected
from service.datasets.bad_rows import OnBadRow
from service.datasets.convert import convert
from service.datasets.detected import Detection
from service.datasets.rows.options import RowOptions, Taken
from service.datasets.storage import Content
from service.settings import UploadSettings

MIB = 2**20


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "upload"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


def read(path: Path, on_bad_row: OnBadRow = OnBadRow.REFUSE) -> Content:
    with path.open("rb") as file:
        return convert(file, RowOptions(), UploadSettings(), path.parent, on_bad_row=on_bad_row)


def test_rows_are_counted_by_what_was_taken_of_them() -> None:
    detection = Detection()
    first, second = Taken("text", (("text", "text"),), ("a", "b")), Taken("text", (("text", "text"), ("id", "nr")))
    for taken, rows in ((first, 2), (second, 3), (first, 5)):
        detection.add(taken, rows)
    detection.add(Taken("messages", (("messages", "m"), ("source", "s")), ("c",), ("after_last_reply",)))
    detection.leave(["b", "d"])
    found = detection.result("jsonl", None)
    assert [(form["form"], form["rows"]) for form in found["forms"]] == [("text", 7), ("text", 3), ("messages", 1)]
    assert found["forms"][1]["columns"] == {"text": "text", "id": "nr"}
    assert (found["source_columns"], found["left_alone"]) == (["s"], ["a", "b", "c", "d"])
    (note,) = found["notes"]
    assert (note["code"], note["rows"]) == ("after_last_reply", 1)
    assert detection.columns == {"text", "nr", "m", "s"}


def test_what_is_told_is_limited_and_the_rest_is_counted() -> None:
    detection = Detection()
    for i in range(30_000):
        detection.add(Taken(f"form {i % 60}", (), (f"left {i}",)))
    found = detection.result("jsonl", "gzip")
    assert (len(found["forms"]), found["more_forms"]) == (detected.MAX_FORMS, 10)
    assert {form["rows"] for form in found["forms"]} == {500}
    assert (len(found["left_alone"]), found["more_left_alone"]) == (detected.MAX_NAMES, 9_900)
    assert len(json.dumps(found)) < 20_000


def test_names_that_cannot_be_stored_are_escaped(tmp_path: Path) -> None:
    names = ("\0", "\ud800", "\u202e", "x" * 5_000, "")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **dict.fromkeys(names, 1)}]
    told = read(write(tmp_path, {"messages": messages, **dict.fromkeys(names, 1)})).detected
    assert told is not None
    assert len(told["left_alone"]) == 2 * len(names)
    stored = json.dumps(told, ensure_ascii=False)
    assert len(stored.encode()) < 3_000  # a lone surrogate has no bytes
    assert stored.isprintable()
    assert "\\u0000" not in json.dumps(told).replace("\\\\u", "")


def test_bad_rows_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "t"}, *({"id": f"{i:0250}", "other": i} for i in range(10_000)))
    tracemalloc.start()
    content = read(path, OnBadRow.SKIP)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (content.row_count, content.skipped) == (1, 10_000)
    assert peak < MIB < path.stat().st_size / 2
