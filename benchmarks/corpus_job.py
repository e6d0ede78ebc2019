"""A job over HTTP on a real pool with two workers: time of each phase, memory of each process, fidelity, sources.

    python benchmarks/corpus_job.py --corpus DIR [--kill] [--out benchmarks/results/corpus_job.json]

DIR contains pool.jsonl.gz and targets/NAME.dev.jsonl.gz. With --kill the job runs a second time in a fresh store, and one
worker is killed with SIGKILL halfway: the job must finish with the same selection.
"""

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import MemoryWatch, commit, machine
from rich.console import Console

from service.local.demo import import_model
from service.local.process_group import parts
from service.local.stack import MODEL_NAME, StackProcess
from winnow.client import Winnow
from winnow.stack import Stack

console = Console(stderr=True)


def _first_rows(file: Path, count: int, into: Path) -> Path:
    with gzip.open(file, "rt") as lines, into.open("w") as out:
        out.writelines(islice(lines, count))
    return into


def _kill_one_worker(client: Winnow, stack: Stack, job_id: str, share: float) -> dict[str, Any]:
    """Waits until `share` of the embeddings are done, then kills worker 1 with SIGKILL; its compute process dies with it."""
    while True:
        job = client.job(job_id)
        stages = {stage["stage"]: stage for stage in job["stages"]}
        embed = stages.get("embed")
        if embed is not None and embed["done"] >= share * embed["total"]:
            parts(stack.home)["worker1"].kill()
            return {"killed": "worker1", "at": {"embed_done": embed["done"], "embed_total": embed["total"]}}
        if job["status"] not in ("queued", "running"):
            raise RuntimeError(f"the job ended ({job['status']}) before a worker could be killed")
        time.sleep(0.5)


def run_job(home: Path, arguments: argparse.Namespace, *, kill: bool) -> dict[str, Any]:
    """Runs one job in a fresh stack and returns what the report contains."""
    process = StackProcess(home, port=0, workers=arguments.workers)
    try:
        import_model(process.home, console)
        stack = process.wait_ready()
        memory = MemoryWatch(stack)
        with Winnow(stack.url, stack.api_key) as client:
            pool = client.upload_dataset(
                _first_rows(arguments.corpus / "pool.jsonl.gz", arguments.rows, home / "pool.jsonl")
            )
            target = client.upload_dataset(arguments.corpus / f"targets/{arguments.target}.dev.jsonl.gz")
            started = time.monotonic()
            job = client.create_job(
                model=MODEL_NAME,
                pool=pool["id"],
                target=target["id"],
                budget=arguments.budget,
                landmarks={"count": arguments.landmarks},
                dtype=arguments.dtype,
            )
            fault = _kill_one_worker(client, stack, job["id"], 0.4) if kill else None
            client.wait(job["id"], on_update=_show, poll_seconds=2)
            seconds = time.monotonic() - started
            selected = list(client.selected(job["id"]))
            events = [e for e in client.events(job["id"]) if e["type"] == "unit.attempt_failed"]
            provenance, summary = client.provenance(job["id"]), client.results(job["id"])
        peaks = memory.stop()
        return {
            "seconds": round(seconds, 1),
            "fault": fault,
            "failed_attempts": [e["data"] for e in events],
            "peak_memory_mib": peaks,
            "selection_sha256": hashlib.sha256(json.dumps([row["id"] for row in selected]).encode()).hexdigest(),
            "weights_root": provenance["weights_root"],
            "versions": provenance["record"]["versions"],
            "results": summary.model_dump(mode="json"),
        }
    finally:
        process.stop()


def _show(job: dict[str, Any]) -> None:
    if job["progress"]:
        console.print(
            f"{job['progress']['phase']}: {job['progress']['done']}/{job['progress']['total']}", highlight=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--target", default="gsm8k")
    parser.add_argument("--landmarks", type=int, default=256)
    parser.add_argument("--budget", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kill", action="store_true", help="rerun and kill a worker halfway")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    places = {str(arguments.corpus): "DIR", str(arguments.out): "FILE"}  # a result contains no path of the machine
    command = "python benchmarks/corpus_job.py " + " ".join(places.get(a, a) for a in sys.argv[1:])
    report: dict[str, Any] = {"command": command, "commit": commit(), "machine": machine(), "runs": {}}
    for name in ["undisturbed", *(["worker killed"] if arguments.kill else [])]:
        with tempfile.TemporaryDirectory(prefix="winnow-corpus-") as folder:
            report["runs"][name] = run_job(Path(folder), arguments, kill=name == "worker killed")
    if arguments.kill:
        hashes = {run["selection_sha256"] for run in report["runs"].values()}
        report["same_selection"] = len(hashes) == 1
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    if arguments.kill and not report["same_selection"]:
        sys.exit("the selection differs after the kill")


if __name__ == "__main__":
    main()
