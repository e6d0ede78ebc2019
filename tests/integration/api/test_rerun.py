"""Jobs posted again: a failed one as a new one, a succeeded one from its provenance."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.jobs import HandmadeJobs, move
from support.world import DATASETS, JOBS, make_settings, register_model

from service.auth.principal import Scope
from service.ledger.state import JobStatus
from service.ledger.tables import SelectionJob
from worker.units import job_inputs

SAME = ("model", "pool", "target", "budget", "name", "labels", "metadata", "parameters")


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandmadeJobs]:
    settings = make_settings(
        postgres_url, tmp_path_factory.mktemp("again"), webhooks={"allowed_networks": ["127.0.0.0/8"]}
    )
    register_model(settings)
    with HandmadeJobs.made(settings, scopes=Scope) as made:
        yield made


def again(world: HandmadeJobs, job: Any, what: str, **headers: str) -> Any:
    return world.client.post(f"{JOBS}/{job['id']}/{what}", headers=headers)


def refused(answer: Any, status: int, code: str, param: str | None = None) -> str:
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("param")) == (status, code, param), problem
    return str(problem["detail"])


def row(world: HandmadeJobs, job_id: str) -> SelectionJob:
    with world.app.state.sessions() as session:
        return session.get_one(SelectionJob, job_id)


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_job_that_did_not_succeed_is_posted_again_as_it_was(world: HandmadeJobs, status: JobStatus) -> None:
    request = {
        "name": "Größe",
        "labels": {"a": "b"},
        "metadata": {"run": "7"},
        "landmarks": {"count": 4},
        "budget": 0.25,
    }
    first = world.failed(**request) if status is JobStatus.FAILED else world.queued(**request)
    if status is JobStatus.CANCELLED:
        assert again(world, first, "cancel").json()["status"] == "cancelled"
    answer = again(world, first, "retry", **{"Idempotency-Key": first["id"]})
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"{JOBS}/{job['id']}")
    assert {name: job[name] for name in SAME} == {name: first[name] for name in SAME}
    assert (job["status"], job["retry_of"], job["reproduces"]) == ("queued", first["id"], None)
    assert row(world, job["id"]).request == row(world, first["id"]).request
    assert again(world, first, "retry", **{"Idempotency-Key": first["id"]}).json()["id"] == job["id"]
    with world.app.state.sessions() as session:
        inputs = [job_inputs(session, session.get_one(SelectionJob, each["id"])) for each in (first, job)]
    assert inputs[0] == inputs[1], "what it had computed is found: its artifacts have the names that they had"


def test_a_job_that_may_yet_succeed_or_did_is_not_posted_again(world: HandmadeJobs) -> None:
    assert "queued" in refused(again(world, world.queued(), "retry"), 409, "job_not_failed")
    assert "succeeded" in refused(again(world, world.succeeded_with_results(), "retry"), 409, "job_not_failed")


@pytest.mark.parametrize("name", ["pool", "target"])
def test_a_retry_names_the_dataset_that_is_gone(world: HandmadeJobs, name: str) -> None:
    first = world.failed()
    assert world.client.delete(f"{DATASETS}/{first[name]}").status_code == 204
    refused(again(world, first, "retry"), 422, "dataset_not_found", name)


def test_a_model_that_is_no_longer_registered_is_named(world: HandmadeJobs) -> None:
    jobs = [(world.failed(), "retry"), (world.succeeded_with_results(), "reproduce")]
    folder = world.app.state.settings.models.folder / "small"
    folder.rename(folder.with_name("away"))
    try:
        for job, what in jobs:
            assert "small" in refused(again(world, job, what), 422, "invalid_request", "model")
    finally:
        folder.with_name("away").rename(folder)


def test_a_job_is_reproduced_from_its_record_and_finds_nothing_of_it(world: HandmadeJobs) -> None:
    first = world.succeeded_with_results(name="first", labels={"a": "b"}, metadata={"run": "7"})
    answer = again(world, first, "reproduce")
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"{JOBS}/{job['id']}")
    assert (job["status"], job["retry_of"], job["reproduces"]) == ("queued", None, first["id"])
    first["parameters"]["dtype"] = "bfloat16"  # what `auto` was
    assert {name: job[name] for name in SAME} == {name: first[name] for name in SAME}
    with world.app.state.sessions() as session:
        salts = [job_inputs(session, session.get_one(SelectionJob, each["id"])).salt for each in (first, job)]
    assert salts == [None, job["id"]]
    planned = world.client.get(f"{JOBS}/{job['id']}/events").json()["data"][1]
    assert planned["type"] == "job.planned"
    assert {stage["already_there"] for stage in planned["data"]["stages"]} == {0.0}


def test_what_succeeded_without_a_bound_of_unusable_samples_is_reproduced_without_one(world: HandmadeJobs) -> None:
    for first, bound in (
        (world.succeeded_with_results(unknown="max_unusable"), 1.0),
        (world.succeeded_with_results(max_unusable=0.3), 0.3),
    ):
        assert again(world, first, "reproduce").json()["parameters"]["max_unusable"] == bound


def test_of_a_deleted_job_and_dataset_the_record_and_the_same_content_are_enough(world: HandmadeJobs) -> None:
    first = world.succeeded_with_results(pool=world.dataset("gone")["id"])
    assert world.client.delete(f"{JOBS}/{first['id']}").status_code == 204
    assert world.client.delete(f"{DATASETS}/{first['pool']}").status_code == 204
    detail = refused(again(world, first, "reproduce"), 422, "dataset_not_found", "pool")
    assert first["pool"] in detail
    same = world.dataset("gone")
    job = again(world, first, "reproduce").json()
    assert (job["pool"], job["target"]) == (same["id"], first["target"])


def test_another_tenants_content_does_not_stand_in(world: HandmadeJobs) -> None:
    first = world.succeeded_with_results(pool=world.dataset("mine alone")["id"])
    world.client.delete(f"{DATASETS}/{first['pool']}")
    content = "".join(f'{{"prompt": "mine alone {i}", "completion": "b"}}\n' for i in range(8))
    theirs = world.other.post(DATASETS, params={"name": "x"}, content=content).json()
    assert (
        theirs["fingerprint"]
        == world.client.get(f"{JOBS}/{first['id']}/provenance").json()["record"]["pool"]["fingerprint"]
    )
    refused(again(world, first, "reproduce"), 422, "dataset_not_found", "pool")


def test_only_a_job_that_has_succeeded_is_reproduced(world: HandmadeJobs) -> None:
    assert "queued" in refused(again(world, world.queued(), "reproduce"), 409, "job_not_succeeded")
    refused(again(world, world.failed(), "reproduce"), 409, "job_not_succeeded")


def test_a_failed_reproduction_posted_again_is_a_reproduction(world: HandmadeJobs) -> None:
    first = world.succeeded_with_results()
    job = again(world, first, "reproduce").json()
    for status in (JobStatus.RUNNING, JobStatus.FAILED):
        move(world.app.state.sessions, job["id"], status)
    retried = again(world, job, "retry").json()
    assert (retried["retry_of"], retried["reproduces"]) == (job["id"], first["id"])


def test_quotas_hold_for_them(world: HandmadeJobs) -> None:
    failed, succeeded = world.failed(), world.succeeded_with_results()
    state = world.app.state
    limits, state.settings = (
        state.settings,
        state.settings.model_copy(update={"limits": state.settings.limits.model_copy(update={"concurrent_jobs": 1})}),
    )
    try:
        world.client.post(
            JOBS, json={"model": "small", "pool": failed["pool"], "target": failed["target"], "budget": 1}
        )
        for job, what in ((failed, "retry"), (succeeded, "reproduce")):
            refused(again(world, job, what), 429, "quota_exceeded", "concurrent_jobs")
    finally:
        state.settings = limits
