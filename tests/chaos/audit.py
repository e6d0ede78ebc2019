"""What must hold once the jobs of a world have ended, whatever was killed, stopped or taken away meanwhile."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet as pq
from psycopg.rows import dict_row
from safetensors.numpy import load_file
from support.processes import having

from service.ledger import store_identity
from service.ledger.state import TERMINAL
from service.storage.artifacts import DAMAGED, ArtifactStore
from service.storage.tempdirs import find_abandoned
from winnow.merkle import chunk_sha256, merkle_root

Row = dict[str, Any]

# In the environment of every process of a world; the compute child inherits PYTHON* only.
MARKER = "PYTHON_CHAOS_MARKER"
_ENDS = ("unit.succeeded", "unit.attempt_failed", "unit.released", "unit.cancelled")
_RESULTS = ("job_results", "provenance", "weight_chunks", "selected_samples", "result_charts")


def audit(database_url: str, store: Path, marker: str, *, alive: Collection[int] = ()) -> None:
    """Looks at every job, every file and every process.

    Args:
        marker: what the world's processes have in their environment; those that may live are `alive`.

    Raises:
        AssertionError: names everything that does not hold.
    """
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        jobs = connection.execute("SELECT * FROM selection_jobs ORDER BY created_at").fetchall()
        wrong = [f"{job['id']}: {what}" for job in jobs for what in _of_job(connection, store, job)]
    wrong += _of_store(store)
    wrong += [f"process {pid} has outlived its world" for pid in having(MARKER, marker) if pid not in alive]
    assert not wrong, "\n".join(wrong)


def leftovers(store: Path) -> list[Path]:
    """What writers have left in the folder that they write in before they rename."""
    return sorted((store / "tmp").glob("*"))


def _of_job(connection: psycopg.Connection[Row], store: Path, job: Row) -> Iterator[str]:
    if job["deleted_at"] is not None:
        return
    if job["status"] not in TERMINAL:
        yield f"is {job['status']}, not in a terminal state"
    events = _rows(connection, "job_events", job["id"], "id")
    units = _rows(connection, "job_units", job["id"], "stage, shard")
    yield from _of_ending(job, events)
    for unit in units:
        name = f"{unit['stage']}/{unit['shard']}"
        told = [e for e in events if _is_of(unit, e["data"])]
        yield from (f"unit {name} {what}" for what in _of_unit(unit, told, events))
        if unit["state"] == "succeeded":
            asks = any((unit["result"] or {}).get(wanted) for wanted in ("grow", "shortlist"))
            yield from (f"unit {name} {what}" for what in _of_artifact(store, unit["artifact_key"], result_alone=asks))
    if job["status"] == "succeeded":
        yield from _of_results(connection, job)
        return
    for table in _RESULTS:
        if _rows(connection, table, job["id"], "job_id"):
            yield f"is {job['status']} and has rows in {table}"


def _rows(connection: psycopg.Connection[Row], table: str, job_id: str, order: str) -> list[Row]:
    query = f"SELECT * FROM {table} WHERE job_id = %s ORDER BY {order}".encode()
    return connection.execute(query, [job_id]).fetchall()


def _is_of(unit: Row, data: Row) -> bool:
    return bool(data.get("stage") == unit["stage"] and data.get("shard") == unit["shard"])


def _of_ending(job: Row, events: list[Row]) -> Iterator[str]:
    endings = [event["type"] for event in events if event["type"].removeprefix("job.") in TERMINAL]
    if endings != [f"job.{job['status']}"]:
        yield f"is {job['status']}, and its events tell {endings or 'no end'}"
    elif events[-1]["type"] != endings[0]:
        yield f"has the event {events[-1]['type']} after {endings[0]}"


def _of_unit(unit: Row, told: list[Row], events: list[Row]) -> Iterator[str]:
    """`told` are the unit's own events, `events` all of the job."""
    if unit["state"] in ("running", "pending"):
        yield f"is {unit['state']}, and its job has ended"
    claims = [event for event in told if event["type"] == "unit.claimed"]
    failed = [event for event in told if event["type"] == "unit.attempt_failed"]
    if [claim["data"]["attempt"] for claim in claims] != list(range(1, unit["attempt"] + 1)):
        yield f"was claimed {unit['attempt']} times, and its events tell of {[c['data']['attempt'] for c in claims]}"
    if len(failed) != unit["failures"]:
        yield f"has {unit['failures']} failures, and its events tell of {len(failed)}"
    succeeded = [event for event in told if event["type"] == "unit.succeeded"]
    reopened = [event for event in told if event["type"] == "unit.reopened"]
    if len(succeeded) != len(reopened) + (unit["state"] == "succeeded"):
        yield f"is {unit['state']}, and its events tell of {len(succeeded)} successes"
    ends = [event for event in told if event["type"] in _ENDS]
    for number, claim in enumerate(claims):
        own = [event for event in ends if event["data"]["attempt"] == claim["data"]["attempt"]]
        until = claims[number + 1]["id"] if number + 1 < len(claims) else float("inf")
        if not own and not any(e["type"] == "units.cancelled" and e["id"] > claim["id"] for e in events):
            yield f"attempt {claim['data']['attempt']} has no end"
        if len(own) > 1 or any(not claim["id"] < event["id"] < until for event in own):
            yield f"attempt {claim['data']['attempt']} ended more than once, or not before the next: {own}"


def _of_artifact(store: Path, key: str, *, result_alone: bool) -> Iterator[str]:
    """A unit whose result asks for more gradients has written nothing else."""
    if not (store / f"{key}.json").exists():
        yield f"has succeeded, and {key}.json is not in the store"
    if Path(key).suffix and not result_alone and not (store / key).exists():
        yield f"has succeeded, and {key} is not in the store"


def _of_results(connection: psycopg.Connection[Row], job: Row) -> Iterator[str]:
    result, record, chunks, selected, charts = (_rows(connection, table, job["id"], "1, 2") for table in _RESULTS)
    if len(result) != 1 or len(record) != 1 or not chunks or not selected or len(charts) != 1:
        yield (
            f"has {len(result)} results, {len(record)} records, {len(chunks)} chunks, {len(selected)} selected,"
            f" {len(charts)} charts"
        )
        return
    hashes = []
    for chunk in chunks:
        influence, weight = (np.array(chunk[name], np.float32) for name in ("influence", "weight"))
        hashes.append(chunk_sha256(influence, weight, np.array(chunk["exact"], bool)))
        if hashes[-1] != chunk["sha256"]:
            yield f"chunk {chunk['chunk_no']} of its weights does not have its sha256"
    if merkle_root(hashes) != record[0]["weights_root"]:
        yield "its weights do not have the Merkle root of its provenance"
    if sum(len(chunk["weight"]) for chunk in chunks) != result[0]["sample_count"]:
        yield f"has not the weights of {result[0]['sample_count']} samples"
    if len(selected) != result[0]["summary"]["selected_count"] or len(selected) != job["budget"]:
        yield f"has {len(selected)} selected samples, not {job['budget']}"


def _of_store(store: Path) -> Iterator[str]:
    swept = set(find_abandoned(store / "tmp"))  # of a process that is gone: what starts next removes it
    for path in leftovers(store):
        if path in swept:
            continue
        yield f"the store holds the temporary file {path.name}"
    artifacts = ArtifactStore(str(store))
    for path in store.rglob("*"):
        name = path.relative_to(store).parts[0]
        if not path.is_file() or name in ("tmp", DAMAGED, store_identity.MARKER) or path.suffix == ".sum":
            continue
        if (damage := artifacts.damage(str(path.relative_to(store)))) is not None:
            yield f"{path.relative_to(store)} is damaged: {damage}"
        try:
            _read(path)
        except Exception as error:
            yield f"{path.relative_to(store)} cannot be read: {error!r}"


def _read(path: Path) -> None:
    match path.suffix:
        case ".json":
            json.loads(path.read_bytes())
        case ".safetensors":
            load_file(path)
        case ".parquet":
            pq.read_table(path)
        case ".npy":
            np.load(path)
        case other:
            raise ValueError(f"no artifact ends in {other!r}")
