"""Uploads of many rows over HTTP: rows a second of one core, the memory of the API and of its readers, from each container.

    python benchmarks/upload.py --out benchmarks/results

A real PostgreSQL and broker; a new API process for each upload, so that a peak belongs to its line. The rows are conversations of
about 1 kB of numbered words. With `--before DIR` each file is uploaded to the API of another checkout first.
"""

import argparse
import gzip
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from load_world import World, make_world, serving
from measuring import heading
from reporting import table, write_json
from rich.console import Console

from service.local.process_group import ProcessGroup

console = Console(stderr=True)
ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]
BATCH_ROWS = 10_000


def conversations(count: int) -> Iterator[Json]:
    for number in range(count):
        question = " ".join(f"word{(number * 7 + i) % 9973}" for i in range(40))
        answer = " ".join(f"word{(number * 11 + i) % 9973}" for i in range(55))
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"id": f"row-{number}", "source": f"source-{number % 7}", "messages": said}


def write_jsonl(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(count))


def write_packed(path: Path, count: int) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(count))


def write_json_array(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number, row in enumerate(conversations(count)):
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")


def write_parquet(path: Path, count: int) -> None:
    rows, writer = conversations(count), None
    for start in range(0, count, BATCH_ROWS):
        part = pa.Table.from_pylist([next(rows) for _ in range(min(BATCH_ROWS, count - start))])
        writer = writer or pq.ParquetWriter(path, part.schema, compression="zstd")
        writer.write_table(part)
    if writer is not None:
        writer.close()


FILES: dict[str, Callable[[Path, int], None]] = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_packed,
    "rows.json": write_json_array,
    "rows.parquet": write_parquet,
}


class Processes:
    """The processor time and the largest memory of an API and of the processes that it starts, looked at ten times a second."""

    def __init__(self, api: psutil.Process) -> None:
        self.api_mib = self.readers_mib = 0
        self._api, self._ended = api, threading.Event()
        self._seconds: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Processes":
        self._look()
        self._before = sum(self._seconds.values())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self.seconds = sum(self._seconds.values()) - self._before

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            self._look()

    def _look(self) -> None:
        self.api_mib = max(self.api_mib, self._note(self._api))
        readers = [self._note(child) for child in self._api.children(recursive=True)]
        self.readers_mib = max([self.readers_mib, *readers])

    def _note(self, process: psutil.Process) -> int:
        try:
            with process.oneshot():
                used = process.cpu_times()
                self._seconds[process.pid] = used.user + used.system
                return process.memory_info().rss >> 20
        except psutil.NoSuchProcess:
            return 0


def measure(world: World, code: Path, path: Path) -> Json:
    with serving(world, code, 1) as (url, api), path.open("rb") as file, Processes(api) as processes:
        headers = {"Authorization": f"Bearer {world.keys[0]}"}
        started = time.monotonic()
        answer = httpx.post(
            f"{url}/v1/datasets", params={"name": path.name}, content=file, headers=headers, timeout=None
        )
        wall = time.monotonic() - started
    found = answer.raise_for_status().json()
    rows = found["row_count"]
    return {
        "file": path.name,
        "mib": path.stat().st_size >> 20,
        "rows": rows,
        "fingerprint": found["fingerprint"],
        "seconds": round(wall, 1),
        "rows_per_second": round(rows / wall),
        "processor_seconds": round(processes.seconds, 1),
        "rows_per_core_second": round(rows / processes.seconds),
        "api_peak_mib": processes.api_mib,
        "reader_peak_mib": processes.readers_mib,
    }


def run(options: argparse.Namespace) -> dict[str, list[Json]]:
    codes = {**({"before": options.before.resolve()} if options.before else {}), "now": ROOT}
    found: dict[str, list[Json]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory(prefix="winnow-upload-") as name:
        folder = Path(name)
        with make_world(folder, jobs=100, running=10, group=ProcessGroup(folder)) as world:
            for file, write in FILES.items():
                path = folder / file
                write(path, options.rows)
                for code, root in codes.items():
                    if code == "before" and file == "rows.json":
                        continue  # came with this
                    found[code].append(measure(world, root, path))
                    console.print(code, found[code][-1])
                path.unlink()
    return found


def report(found: list[Json]) -> str:
    head = ["file", "MiB", "seconds", "rows a second", "rows a second of one core", "API, MiB", "its reader, MiB"]
    return table(
        head,
        [
            [
                line["file"],
                line["mib"],
                line["seconds"],
                f"{line['rows_per_second']:,}",
                f"{line['rows_per_core_second']:,}",
                line["api_peak_mib"],
                line["reader_peak_mib"] or "",
            ]
            for line in found
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout, measured before this one with each file")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    head, found = heading(options), run(options)
    write_json(options.out / "upload.json", {**head, "rows": options.rows, **found})
    (options.out / "upload.md").write_text("\n".join(f"{name}\n\n{report(lines)}" for name, lines in found.items()))


if __name__ == "__main__":
    main()
