"""The plan of a posted job comes after the answer: soon, once, before its first unit is claimed, and in spite of crashes."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from support.job_requests import posted, upload
from support.servers import new_database
from support.waiting import at_once, until
from support.world import JOBS, World, make_settings, register_model

from service import ledger
from service.app import create_app
from service.jobs import first_plans, planning
from service.jobs.first_plans import FirstPlans


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Nothing runs beside this API, so nobody plans but the test."""
    folder = tmp_path_factory.mktemp("unplanned")
    with new_database(postgres_url) as url:
        world = World.of(create_app(make_settings(url, folder, pool_size=4)))
        register_model(world.settings)
        yield world
        world.engine.dispose()
        world.app.state.metrics.close()


@pytest.fixture(autouse=True)
def _no_other_jobs(world: World) -> Iterator[None]:
    yield
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM selection_jobs WHERE status = 'queued'"))


@pytest.fixture(scope="module")
def body(world: World) -> dict[str, Any]:
    return {"model": "small", "pool": upload(world.client), "target": upload(world.client, 4), "budget": 3}


def kinds(world: World, job_id: str) -> list[str]:
    return [event["type"] for event in world.get(f"{job_id}/events")["data"]]


def plan(world: World) -> int:
    return FirstPlans(world.sessions, world.store, world.settings).write()


def claimed(world: World) -> str | None:
    with world.sessions() as session:  # rolled back
        count = ledger.claimable_count(session)
        claim = ledger.claim_unit(session, worker_id="w", lease_seconds=60)
        assert (count == 0) == (claim is None)
        return None if claim is None else claim.job_id


def test_a_job_is_planned_after_it_was_answered_and_before_its_unit_is_claimed(
    world: World, body: dict[str, Any]
) -> None:
    job = posted(world.client, body)
    assert (kinds(world, job["id"]), claimed(world)) == (["job.queued"], None)
    assert plan(world) == 1
    assert (kinds(world, job["id"]), claimed(world)) == (["job.queued", "job.planned"], job["id"])
    assert plan(world) == 0
    assert world.get(job["id"]) == job, "the answer does not depend on the plan"


def test_whoever_plans_at_once_writes_one_plan_for_each(world: World, body: dict[str, Any]) -> None:
    jobs = [posted(world.client, body, budget=number)["id"] for number in (1, 1, 2)]
    at_once([lambda: plan(world)] * 3)
    assert plan(world) == 0
    assert [kinds(world, job_id) for job_id in jobs] == [["job.queued", "job.planned"]] * 3


def test_what_is_the_same_is_planned_once(world: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    planned, its = [], planning.plan
    monkeypatch.setattr(planning, "plan", lambda *a: planned.append(a[3].id) or its(*a))
    jobs = [posted(world.client, body, budget=number)["id"] for number in (1, 1, 2)]
    assert plan(world) == 3
    assert planned == [jobs[0], jobs[2]]


def test_a_crash_between_the_job_and_its_plan_loses_nothing(
    world: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = posted(world.client, body)["id"]
    with monkeypatch.context() as dying:
        dying.setattr(first_plans.ledger, "write_plans", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            plan(world)
    assert (kinds(world, job_id), plan(world)) == (["job.queued"], 1)
    assert kinds(world, job_id) == ["job.queued", "job.planned"]


def test_what_cannot_be_planned_holds_up_no_other_and_itself_not_for_long(
    world: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (posted(world.client, body, budget=number)["id"] for number in (1, 2))
    its = planning.plan

    def failing(*args: Any) -> Any:
        if args[3].id == bad:
            raise OSError("the store is away")
        return its(*args)

    monkeypatch.setattr(planning, "plan", failing)
    assert (plan(world), kinds(world, good)[-1], claimed(world)) == (1, "job.planned", good)
    with world.engine.begin() as connection:
        earlier = text("UPDATE selection_jobs SET created_at = created_at - interval '10 seconds' WHERE id = :id")
        connection.execute(earlier, {"id": bad})
    assert claimed(world) == bad
    monkeypatch.undo()
    assert (plan(world), kinds(world, bad)) == (1, ["job.queued", "job.planned"])


def test_a_job_that_ended_before_needs_no_plan(world: World, body: dict[str, Any]) -> None:
    job_id = posted(world.client, body)["id"]
    world.cancel(job_id)
    assert plan(world) == 0
    assert "job.planned" not in kinds(world, job_id)


def test_a_job_whose_row_is_held_does_not_hold_up_the_others(world: World, body: dict[str, Any]) -> None:
    held, free = (posted(world.client, body)["id"] for _ in range(2))
    with world.engine.begin() as connection:
        connection.execute(text("SELECT FROM selection_jobs WHERE id = :id FOR UPDATE"), {"id": held})
        assert plan(world) == 1
    assert (kinds(world, free)[-1], plan(world)) == ("job.planned", 1)


def test_the_process_that_leads_plans_at_once(world: World, body: dict[str, Any]) -> None:
    with world.client:
        job_id = posted(world.client, body)["id"]
        until("it is planned", lambda: "job.planned" in kinds(world, job_id), 30)
    answer = world.client.get(f"{JOBS}/{job_id}")
    assert answer.json()["status"] == "queued"
