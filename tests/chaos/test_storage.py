"""The artifact store: no room is left, a writer or a reader dies in the midst, or what was written is damaged meanwhile."""

import json
import signal
from collections.abc import Iterator

import httpx
import pytest
from scenario import COMPUTED, Told, errors, struck, survived
from small_disk import fill, free, small_disk
from support.damage import flip_second_half
from support.tiny import pool_rows, target_rows
from support.world import DATASETS, JOBS
from undisturbed import Undisturbed
from world import POOL, TARGET, World

from service.ledger import store_identity

_ROOM = "16m"


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        pytest.param("gradients", ".safetensors", id="an artifact"),
        pytest.param("gradients", ".json", id="a result", marks=pytest.mark.slow),
        pytest.param("datasets", "/rows.parquet", id="a dataset", marks=pytest.mark.slow),
    ],
)
def test_half_a_file_is_made_whole(
    pair: World, undisturbed: Undisturbed, record_property: Told, kind: str, suffix: str
) -> None:
    pair.faults.tear(kind, suffix)
    job_id = pair.submit()
    struck(pair)
    record_property("fault", f"{kind}*{suffix} half written")
    survived(pair, undisturbed, job_id)


def test_what_is_damaged_in_the_midst_of_a_job_is_made_again(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    """All gradients, once the units that made them are done, and before another reads them."""
    pair.faults.arm("compute: before rename to embeddings/*.safetensors.json", action="hold")
    job_id = pair.submit()
    struck(pair)
    made = {"landmark_gradients", "target_gradients"}
    pair.until("all gradients are made", lambda: made <= {e["stage"] for e in pair.events(job_id, "unit.succeeded")})
    damaged = list(pair.store.glob("gradients/*/*.safetensors"))
    for path in damaged:
        flip_second_half(path)
    record_property("fault", f"{len(damaged)} artifacts flipped")
    survived(pair, undisturbed, job_id)
    assert {event["stage"] for event in pair.events(job_id, "unit.reopened")} == made
    found = [event["artifact"] for event in pair.events(job_id, "artifact.damaged")]
    assert sorted(found) == sorted(str(path.relative_to(pair.store)) for path in damaged)
    assert errors(pair, job_id) == []


@pytest.mark.slow
def test_an_upload_that_the_api_does_not_survive_leaves_nothing(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in pool_rows(POOL))

    def halves() -> Iterator[bytes]:
        yield rows[: len(rows) // 2]
        pair.api.signal(signal.SIGKILL)
        yield rows[len(rows) // 2 :]

    with pytest.raises(httpx.TransportError):
        pair.client.post(DATASETS, params={"name": "rows"}, content=halves())
    record_property("fault", "the API killed during an upload")
    assert pair.call("GET", DATASETS).json()["data"] == []
    job_id = pair.submit()
    survived(pair, undisturbed, job_id)


@pytest.mark.slow
def test_an_export_that_the_api_does_not_survive_is_no_shorter_file(pair: World, record_property: Told) -> None:
    """The client is told that something is missing; the next export is whole."""
    long = [{"prompt": f"{index}?", "completion": f"{index}." + " x" * 40_000} for index in range(POOL)]
    pool, target = pair.upload(long), pair.upload(target_rows(TARGET, "python_function"))
    job_id = pair.post_usual(pool, target)
    pair.succeeded(job_id)
    path, params = f"{JOBS}/{job_id}/export", {"format": "jsonl", "include": "messages"}
    parts: list[bytes] = []

    def receive() -> None:
        with pair.client.stream("GET", path, params=params) as answer:
            for part in answer.iter_bytes():
                if not parts:
                    pair.api.signal(signal.SIGKILL)
                parts.append(part)

    with pytest.raises(httpx.TransportError):
        receive()
    received = b"".join(parts)
    record_property("fault", "the API killed during an export")
    whole = pair.call("GET", path, params=params).content
    assert len([json.loads(line) for line in whole.splitlines()]) == POOL
    assert len(received) < len(whole)
    assert whole.startswith(received)
    pair.audit()


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        pytest.param("compute: before rename to gradients/*.safetensors", id="a result"),
        pytest.param(COMPUTED, id="an artifact"),
    ],
)
def test_a_full_disk_ends_an_attempt_and_no_job(
    pair: World, undisturbed: Undisturbed, record_property: Told, before: str
) -> None:
    """`before` is what a child passes right before it writes."""
    record_property("fault", "disk full")
    with small_disk(pair.store, _ROOM):
        pair.faults.arm(before, action="hold")
        job_id = pair.submit()
        struck(pair)
        fill(pair.store)
        pair.faults.arm("worker: before commit of …fail_unit…", action="hold")
        pair.faults.release(but_latest=True)
        struck(pair)
        free(pair.store)
        survived(pair, undisturbed, job_id)
        told = [data["error"] for data in pair.events(job_id, "unit.attempt_failed")]
        assert {error["code"] for error in told} == {"storage_full"}
        assert all(
            "No space left on device" in error["detail"] and "Free or add space" in error["detail"] for error in told
        )


@pytest.mark.slow
def test_an_upload_to_a_full_disk_is_refused_and_leaves_nothing(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    with small_disk(pair.store, _ROOM):
        fill(pair.store)
        record_property("fault", "disk full at an upload")
        answer = pair.client.post("/v1/datasets", params={"name": "rows"}, json=pool_rows(1)[0])
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_full")
        assert int(answer.headers["Retry-After"]) > 0
        assert pair.call("GET", "/v1/datasets").json()["data"] == []
        left = {path.name for path in pair.store.rglob("*") if path.is_file()}
        assert left == {"ballast", store_identity.MARKER}
        free(pair.store)
        job_id = pair.submit()
        survived(pair, undisturbed, job_id)
        assert errors(pair, job_id) == []
