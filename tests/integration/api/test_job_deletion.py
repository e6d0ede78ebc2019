"""A job that has ended is deleted: what goes, what stays, and to whom it is refused."""

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn
from sqlalchemy import text
from support.jobs import add_job, move, publish_small, write_pool
from support.world import World
from typer.testing import CliRunner

from service import ledger
from service.ids import new_id
from service.ledger.state import JobStatus
from service.ledger.tables import JobUnit
from winnow.cli.main import app as winnow
from winnow.client import Winnow, WinnowError

JOBS = "/v1/selection-jobs"
# What a deleted job has nothing left in; `provenance` and its own row stay.
EMPTIED = ("job_units", "job_events", "job_results", "result_charts", "selected_samples", "weight_chunks")


def key_of(api: World) -> str:
    return api.client.headers["authorization"].removeprefix("Bearer ")


@pytest.fixture
def content(api: World, tmp_path: Path) -> Any:
    return write_pool(api.store, tmp_path / "pool", [(f"{i}", None, {"text": new_id("t")}) for i in range(5)])


def ended_job(api: World, content: Any, status: JobStatus = JobStatus.SUCCEEDED) -> str:
    """With a unit, an event, and results where it has succeeded."""
    job_id = add_job(api.sessions, key_of(api), content, status)
    with api.sessions.begin() as session:
        session.add(
            JobUnit(job_id=job_id, stage="embed", shard=0, artifact_key="k", spec={}, state="pending", progress_total=1)
        )
        ledger.add_event(session, job_id, "job.queued")
        if status is JobStatus.SUCCEEDED:
            publish_small(session, job_id, content.row_count)
    if status is JobStatus.SUCCEEDED:
        move(api.sessions, job_id, status)
    return job_id


def left(api: World, job_id: str) -> dict[str, int]:
    with api.sessions() as session:
        counts = {t: text(f"SELECT count(*) FROM {t} WHERE job_id = :j") for t in (*EMPTIED, "provenance")}
        return {table: session.execute(count, {"j": job_id}).scalar_one() for table, count in counts.items()}


def test_a_deleted_job_is_gone_but_for_its_provenance(api: World, content: Any) -> None:
    job_id, other = ended_job(api, content), ended_job(api, content)
    provenance = api.client.get(f"{JOBS}/{job_id}/provenance").json()
    of_other = left(api, other)
    for _ in range(2):
        response = api.client.delete(f"{JOBS}/{job_id}")
        assert (response.status_code, response.content) == (204, b"")
        assert left(api, job_id) == {**dict.fromkeys(EMPTIED, 0), "provenance": 1}
        for path in ("", "/results", "/weights", "/selected", "/events"):
            assert api.client.get(f"{JOBS}/{job_id}{path}").status_code == 404, path
        assert api.client.post(f"{JOBS}/{job_id}/cancel").status_code == 404
        assert [job["id"] for job in api.client.get(JOBS).json()["data"]] == [other]
        assert api.client.get(JOBS, params={"status": "succeeded"}).json()["data"][0]["id"] == other
        assert api.client.get(f"{JOBS}/{job_id}/provenance").json() == provenance
    assert left(api, other) == of_other
    assert all(of_other.values())
    assert api.client.get(f"{JOBS}/{other}/weights").status_code == 200


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_job_that_ended_without_results_is_deleted_too(api: World, content: Any, status: JobStatus) -> None:
    job_id = ended_job(api, content, status)
    assert api.client.delete(f"{JOBS}/{job_id}").status_code == 204
    assert api.client.get(f"{JOBS}/{job_id}").status_code == 404


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.CANCELLING])
def test_before_its_end_a_job_is_not_deleted(api: World, content: Any, status: JobStatus) -> None:
    job_id = add_job(api.sessions, key_of(api), content, status)
    response = api.client.delete(f"{JOBS}/{job_id}")
    assert response.status_code == 409, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-should-retry"] == "false"
    problem = response.json()
    assert problem["code"] == "job_not_finished"
    assert status in problem["detail"]
    assert api.client.get(f"{JOBS}/{job_id}").json()["status"] == status


def test_who_does_not_own_the_job_is_told_that_there_is_none(api: World, content: Any) -> None:
    job_id = ended_job(api, content)
    for client, id in ((api.other, job_id), (api.client, new_id("job")), (api.client, "job_none")):
        response = client.delete(f"{JOBS}/{id}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
        assert "job_not_finished" not in response.text
    assert api.client.delete(f"{JOBS}/{job_id}").status_code == 204
    assert api.other.delete(f"{JOBS}/{job_id}").status_code == 404, "that it was there once is told to another tenant"
    assert api.other.get(f"{JOBS}/{job_id}/provenance").status_code == 404


@pytest.fixture
def url(api: World) -> Iterator[str]:
    """The application behind a real server, on a free port."""
    server = uvicorn.Server(uvicorn.Config(api.client.app, port=0, lifespan="off", log_level="error"))
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_the_client_deletes_a_job(api: World, content: Any, url: str) -> None:
    job_id, running = ended_job(api, content), add_job(api.sessions, key_of(api), content, JobStatus.RUNNING)
    with Winnow(url, key_of(api)) as client:
        client.delete_job(job_id)
        client.delete_job(job_id)
        with pytest.raises(WinnowError, match="cancel it first") as caught:
            client.delete_job(running)
        assert (caught.value.status, caught.value.code) == (409, "job_not_finished")
    assert [job["id"] for job in api.client.get(JOBS).json()["data"]] == [running]


def test_the_command_deletes_a_job(api: World, content: Any, url: str) -> None:
    job_id, running = ended_job(api, content), add_job(api.sessions, key_of(api), content, JobStatus.RUNNING)
    options = ["--url", url, "--api-key", key_of(api)]
    done = CliRunner().invoke(winnow, ["delete", job_id, *options])
    assert (done.exit_code, done.stdout) == (0, f"{job_id}: deleted\n")
    assert api.client.get(f"{JOBS}/{job_id}").status_code == 404
    refused = CliRunner().invoke(winnow, ["delete", running, *options])
    assert refused.exit_code == 1
    assert "cancel it first" in " ".join(refused.stderr.split())
