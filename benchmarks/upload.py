"""Uploads of many rows over HTTP: rows a second of one core, memory of the API and of its readers, by form and container.

    python benchmarks/upload.py --cache DIR --out benchmarks/results

A real PostgreSQL and broker; a new API process for each upload, so that a peak belongs to its line. The rows are conversations of
about 1 kB of numbered words. Beside each upload `json.loads` of such rows is timed, the least that any reader of JSONL does. With
`--before DIR` each file is uploaded to the API of another checkout first. A run that was stopped goes on from the cache.
"""

import argparse
import csv
import gzip
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.json
import pyarrow.parquet as pq
from load_world import World, make_world, serving
from measuring import commit, heading
from reporting import table, write_json
from rich.console import Console

from service.local.process_group import ProcessGroup
from winnow import UploadProgress, Winnow, uploading

console = Console(stderr=True)
ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]
WORDS = [f"word{i % 9973}" for i in range(9973 + 55)]
BASELINE_ROWS = 50_000


def texts(number: int) -> tuple[str, str]:
    asked, said = number * 7 % 9973, number * 11 % 9973
    return " ".join(WORDS[asked : asked + 40]), " ".join(WORDS[said : said + 55])


def conversations(count: int) -> Iterator[Json]:
    for number in range(count):
        question, answer = texts(number)
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"id": f"row-{number}", "source": f"source-{number % 7}", "messages": said}


def flat(count: int) -> Iterator[Json]:
    for number in range(count):
        prompt, completion = texts(number)
        yield {"id": f"row-{number}", "source": f"source-{number % 7}", "prompt": prompt, "completion": completion}


def write_jsonl(path: Path, rows: Iterator[Json]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_messages(path: Path, count: int) -> None:
    write_jsonl(path, conversations(count))


def write_prompts(path: Path, count: int) -> None:
    write_jsonl(path, flat(count))


def write_packed(path: Path, count: int) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(count))


def write_json_array(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number, row in enumerate(conversations(count)):
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")


def write_csv(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "source", "prompt", "completion"])
        writer.writeheader()
        writer.writerows(flat(count))


def write_parquet(path: Path, count: int) -> None:
    lines = path.with_suffix(".jsonl")
    write_messages(lines, count)
    options = pyarrow.json.ReadOptions(block_size=2**24)
    with (
        pyarrow.json.open_json(lines, read_options=options) as reader,
        pq.ParquetWriter(path, reader.schema, compression="zstd") as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)
    lines.unlink()


FILES: dict[str, Callable[[Path, int], None]] = {
    "messages.jsonl": write_messages,
    "prompts.jsonl": write_prompts,
    "messages.jsonl.gz": write_packed,
    "messages.json": write_json_array,
    "prompts.csv": write_csv,
    "messages.parquet": write_parquet,
}
# What the client sends in parts; the others are sent in one request.
IN_PARTS = "messages.jsonl"
NOT_BEFORE = {"messages.json", "prompts.csv"}


def json_loads_rows_per_second(count: int) -> float:
    """Of one core, in this moment: the machine may be slower in another."""
    lines = [json.dumps(row) for row in conversations(min(count, BASELINE_ROWS))]
    started = time.process_time()
    for line in lines:
        json.loads(line)
    return len(lines) / (time.process_time() - started)


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


def measure(world: World, code: Path, path: Path, rows: int, *, in_parts: bool = False) -> Json:
    baseline = json_loads_rows_per_second(rows)
    send = _by_client if in_parts else _in_one_request
    with serving(world, code, 1) as (url, api), Processes(api) as processes:
        started, own = time.monotonic(), time.process_time()
        found = send(url, world.keys[0], path)
        wall, own = time.monotonic() - started, time.process_time() - own
    assert found["row_count"] == rows, found
    rate = rows / processes.seconds
    return {
        "file": path.name + (", in parts" if in_parts else ""),
        "mib": path.stat().st_size >> 20,
        "rows": rows,
        "fingerprint": found["fingerprint"],
        "seconds": round(wall, 1),
        "rows_per_second": round(rows / wall),
        "processor_seconds": round(processes.seconds, 1),
        "rows_per_core_second": round(rate),
        "json_loads_rows_per_core_second": round(baseline),
        "times_json_loads": round(baseline / rate, 2),
        "client_processor_seconds": round(own, 1),
        "api_peak_mib": processes.api_mib,
        "reader_peak_mib": processes.readers_mib,
    }


def _in_one_request(url: str, key: str, path: Path) -> Json:
    headers = {"Authorization": f"Bearer {key}"}
    with path.open("rb") as file:
        answer = httpx.post(
            f"{url}/v1/datasets", params={"name": path.name}, content=file, headers=headers, timeout=None
        )
    return dict(answer.raise_for_status().json())


def _by_client(url: str, key: str, path: Path) -> Json:
    """With all that it does: the checksum beforehand, the parts, the looks at the rows that were read."""
    uploading.PARTS_FROM = 1
    steps: set[str] = set()

    def note(at: UploadProgress) -> None:
        steps.add(at.step)

    with Winnow(url, key) as winnow:
        dataset = winnow.upload_dataset(path, on_progress=note)
    assert {"checksum", "send"} <= steps
    return dataset


def run(options: argparse.Namespace) -> dict[str, list[Json]]:
    codes = {**({"before": options.before.resolve()} if options.before else {}), "now": ROOT}
    found: dict[str, list[Json]] = {name: [] for name in codes}
    version = commit()
    with tempfile.TemporaryDirectory(prefix="winnow-upload-") as name:
        folder = Path(name)
        with make_world(folder, jobs=100, running=10, group=ProcessGroup(folder)) as world:
            for file, write in FILES.items():
                path = folder / file

                def measured(code: str, *, in_parts: bool = False, path: Path = path, write: Any = write) -> None:
                    kept = options.cache / f"{version}-{options.rows}-{code}-{path.name}{'-parts' * in_parts}.json"
                    if not kept.exists():
                        if not path.exists():
                            write(path, options.rows)
                        write_json(kept, measure(world, codes[code], path, options.rows, in_parts=in_parts))
                        shutil.rmtree(world.folder / "store" / "datasets", ignore_errors=True)
                    found[code].append(json.loads(kept.read_text()))
                    console.print(code, found[code][-1])

                for code in codes:
                    if code == "now" or file not in NOT_BEFORE:
                        measured(code)
                if file == IN_PARTS:
                    measured("now", in_parts=True)
                path.unlink(missing_ok=True)
    return found


def report(found: list[Json]) -> str:
    columns = {
        "file": "file",
        "MiB": "mib",
        "seconds": "seconds",
        "rows a second": "rows_per_second",
        "rows a second of one core": "rows_per_core_second",
        "times json.loads": "times_json_loads",
        "API, MiB": "api_peak_mib",
        "its reader, MiB": "reader_peak_mib",
    }
    rows = [
        [f"{value:,}" if isinstance(value := line[name], int) else value for name in columns.values()] for line in found
    ]
    return table(list(columns), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--cache", type=Path, required=True, help="a line that is there, of this commit, is not measured again"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout, measured before this one with each file")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    for folder in (options.cache, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    head, found = heading(options), run(options)
    write_json(options.out / "upload.json", {**head, "rows": options.rows, **found})
    (options.out / "upload.md").write_text("\n".join(f"{name}\n\n{report(lines)}" for name, lines in found.items()))


if __name__ == "__main__":
    main()
