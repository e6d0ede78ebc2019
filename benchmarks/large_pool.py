"""A pool of the size of Tulu V2 on two workers: time, memory and stored bytes of each stage that needs no model's forward pass.

    make bench-large-pool                    (5,800,000 rows; ARGS="--rows 200000" for fewer)

The rows are generated from a seed: a user's message and a reply, cut from the text of the corpus's pool, of log-normal lengths. A
real stack with two workers takes the upload and does a job of method `random`: every row is rendered, tokenised and counted, and
the selection is drawn and published. Then the same pool and model once more, with another budget. Run again, it goes on where it
was stopped.
"""

import argparse
import gzip
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from corpus import Corpus, common_arguments, model_folder
from measuring import MemoryWatch, heading
from reporting import table, write_json
from rich.console import Console

from service.local.stack import StackProcess
from service.storage.artifacts import ArtifactStore
from winnow.client import Winnow

console = Console(stderr=True)
Json = dict[str, Any]
POOL = "large pool"
QUESTION, ANSWER, SPREAD = 300, 450, 0.8
"""Median characters of a message each, and the standard deviation of their logarithm."""
SOURCES = 7
BATCH_ROWS = 10_000


class State:
    """What is done: a JSON file that is written whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: Json = json.loads(path.read_text()) if path.exists() else {"starts": 0, "peak_memory_mib": {}}

    def note(self, **found: Any) -> None:
        self.found |= found
        write_json(self._path, self.found)


def rows(text: str, count: int, seed: int) -> Iterator[Json]:
    """Conversations of one turn; no two have the same text."""
    draw = random.Random(seed)

    def said(median: int) -> str:
        length = max(8, round(draw.lognormvariate(0, SPREAD) * median))
        start = draw.randrange(len(text))
        return (text[start : start + length] * (1 + length // len(text)))[:length]

    for number in range(count):
        messages = [
            {"role": "user", "content": f"{number}. {said(QUESTION)}"},
            {"role": "assistant", "content": said(ANSWER)},
        ]
        yield {"id": f"row-{number}", "source": f"source-{number % SOURCES}", "messages": messages}


def write_rows(path: Path, text: str, count: int, seed: int) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(text, count, seed))


def upload(client: Winnow, options: argparse.Namespace, corpus: Corpus, state: State, home: Path) -> None:
    if "target" not in state.found:  # first, since it may not be there
        lines = (json.dumps(row) + "\n" for row in corpus.target(options.targets[0], "dev"))
        state.note(target=client.upload_dataset("".join(lines).encode(), "target")["id"])
    if "pool" in state.found:
        return
    words = (message["content"] for row in corpus.pool(BATCH_ROWS, options.seed) for message in row["messages"])
    path = home / "pool.jsonl.gz"
    write_rows(path, " ".join(words), options.rows, options.seed)
    started = time.monotonic()
    pool = client.upload_dataset(path, POOL)
    seconds = time.monotonic() - started
    state.note(pool=pool["id"], row_count=pool["row_count"], byte_count=pool["byte_count"], upload=seconds)
    path.unlink()


def job(client: Winnow, options: argparse.Namespace, state: State, name: str, budget: int) -> None:
    """Posts the job, or waits for the one that was posted before."""
    if name not in state.found:
        posted = client.create_job(
            model=options.name,
            pool=state.found["pool"],
            target=state.found["target"],
            budget=budget,
            method="random",
            max_length=options.max_length,
            validate=False,
        )
        state.note(**{name: posted["id"]})
    job_id = state.found[name]
    client.wait(job_id, on_update=show, poll_seconds=2)
    units = client.provenance(job_id)["record"]["units"]
    prepare = [unit for unit in units if unit["stage"] == "prepare"]
    summary = client.results(job_id).model_dump(mode="json")
    found = {
        "stages": summary["stages"],
        "tokens": summary["pool"],
        "prepare_units": len(prepare),
        "prepare_workers": len({unit["worker"] for unit in prepare}),
        "attempts": max(unit["attempt"] for unit in units),
    }
    state.note(**{f"{name} found": found})


def show(job: Json) -> None:
    if progress := job["progress"]:
        console.print(f"{progress['phase']}: {progress['done']:,} of {progress['total']:,}", highlight=False)


def stored(home: Path) -> dict[str, int]:
    """Bytes by what they are."""
    found: dict[str, int] = {}
    for file in ArtifactStore(str(home / "artifacts")).files():
        kind = file.key.partition("/")[0]
        name = "counts of the pool's rows" if kind == "tokens" and _is_counts(home, file.key) else kind
        found[name] = found.get(name, 0) + file.size
    return {name: size for name, size in sorted(found.items()) if "/" not in name and name != ".store"}


def _is_counts(home: Path, key: str) -> bool:
    """Whether a file of tokens holds what stands for rows, and no token."""
    return key.endswith(".parquet") and "input_ids" not in pq.read_schema(home / "artifacts" / key).names


def measure(options: argparse.Namespace, home: Path) -> Json:
    state = State(home / "state.json")
    state.note(starts=state.found["starts"] + 1)
    folder = model_folder(options)
    options.name = folder.name
    if not (home / "models" / folder.name).exists():
        shutil.copytree(folder, home / "models" / folder.name)
    process = StackProcess(home, port=0, workers=options.workers)
    try:
        stack = process.wait_ready()
        memory = MemoryWatch(stack)
        with Winnow(stack.url, stack.api_key) as client:
            try:
                upload(client, options, Corpus(options.corpus), state, home)
                for name, share in (("first", 0.05), ("again", 0.04)):
                    if f"{name} found" not in state.found:
                        job(client, options, state, name, max(1, round(share * options.rows)))
            finally:
                peaks, before = memory.stop(), state.found["peak_memory_mib"]
                most = {part: max(peaks.get(part, 0), before.get(part, 0)) for part in {*peaks, *before}}
                state.note(peak_memory_mib=dict(sorted(most.items())))
        return {**state.found, "stored_bytes": stored(home)}
    finally:
        process.stop()


def report(found: Json) -> str:
    n, count = found["row_count"], found["first found"]["tokens"]
    lines = []
    for name, title in (("first", "the first job"), ("again", "the same pool and model again")):
        for stage in found[f"{name} found"]["stages"]:
            units = f"{stage['units']} ({stage['reused']} reused)"
            peak = stage["peak_memory_bytes"]
            mib = "" if peak is None else round(peak / 2**20)
            lines.append([title, stage["stage"], units, stage["wall_seconds"], stage["compute_seconds"], mib])
    head = ["job", "stage", "units", "wall seconds", "seconds of all units", "compute process, MiB"]
    prepare = next(stage for stage in found["first found"]["stages"] if stage["stage"] == "prepare")
    return "\n".join(
        [
            f"{n:,} rows, {found['byte_count'] / n:.0f} bytes and {count['tokens'] / n:.0f} tokens each;"
            f" uploaded in {found['upload']:.0f} s; {n / prepare['wall_seconds']:,.0f} rows a second in prepare,"
            f" by {found['first found']['prepare_workers']} workers; started {found['starts']} times.",
            "",
            table(head, lines),
            table(["process", "peak MiB"], list(found["peak_memory_mib"].items())),
            table(["stored", "MiB"], [[name, f"{size / 2**20:.1f}"] for name, size in found["stored_bytes"].items()]),
        ]
    )


def main() -> None:
    parser = common_arguments(__doc__, rows=5_800_000, targets=["target"])
    parser.set_defaults(max_length=2048)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    home = options.cache / "large_pool" / f"{options.rows}-{options.max_length}-{options.seed}"
    home.mkdir(parents=True, exist_ok=True)
    head, found = heading(options), measure(options, home)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        ids = ("pool", "target", "first", "again")
        kept = {name: value for name, value in found.items() if name not in ids}
        write_json(options.out / "large_pool.json", {**head, "rows": options.rows, **kept})
        (options.out / "large_pool.md").write_text(report(found))


if __name__ == "__main__":
    main()
