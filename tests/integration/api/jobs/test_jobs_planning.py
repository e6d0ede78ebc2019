"""The plan of a job: what it will cost, and what earlier jobs have left of it."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from support.job_requests import ROWS, URL, finish, no_job_was_made, plan, posted, prepared, stage, upload
from support.world import World

from service.ids import new_id
from service.jobs import repository
from service.jobs.schemas import Parameters
from service.ledger.workers import record_worker


@pytest.mark.usefixtures("no_workers")
def test_a_dry_run_answers_with_the_plan_and_creates_nothing(api: World, body: dict[str, Any]) -> None:
    with api.engine.connect() as connection:
        before = connection.execute(text("SELECT count(*) FROM job_events")).scalar()
    found = plan(api.client, body, model="whole", budget=0.5, landmarks={"count": 8})
    expected = {
        **body,
        "object": "selection_plan",
        "budget": ROWS // 2,
        "model": {"kind": "registered", "name": "whole"},
    }
    assert {name: found[name] for name in expected} == expected
    assert found["parameters"] == Parameters(landmarks={"count": 8}).model_dump(mode="json")
    assert [entry["stage"] for entry in found["stages"]][:3] == ["prepare", "landmark_gradients", "target_gradients"]
    assert (found["estimated"], found["totals"]["seconds"], found["device"]) == (True, None, None)
    assert found["totals"]["operations"] > 0
    assert found["costs"]["exact_influence"]["operations"] > 0
    assert no_job_was_made(api)
    with api.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM job_events")).scalar() == before


@pytest.mark.usefixtures("no_workers")
def test_a_job_begins_with_its_plan(api: World, body: dict[str, Any]) -> None:
    expected = plan(api.client, body, model="whole")
    job_id = posted(api.client, body, model="whole", dry_run=False)["id"]
    event = api.client.get(f"{URL}/{job_id}/events").json()["data"][1]
    assert event["type"] == "job.planned"
    assert event["data"] == {name: expected[name] for name in event["data"]}
    assert {"stages", "totals", "costs", "note", "warnings", "estimated"} <= event["data"].keys()


@pytest.mark.usefixtures("no_workers")
def test_a_model_whose_shape_is_not_known_is_planned_without_figures(api: World, body: dict[str, Any]) -> None:
    found = plan(api.client, body)
    assert any("config.json has no hidden_size" in warning for warning in found["warnings"])
    assert found["totals"]["operations"] is None


@pytest.mark.usefixtures("no_workers")
def test_seconds_come_from_the_worker_that_was_seen_last(api: World, body: dict[str, Any]) -> None:
    for rate in (1e9, 4e9):
        with api.sessions.begin() as session:
            record_worker(session, "w", "v", device="a cpu", memory_bytes=2**34, matmul_rates={"float32": rate})
    sent = {**body, "model": "whole", "method": "exact_influence", "dtype": "float32", "seed": 77}
    with api.engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM workers")).scalar() == 1
    found = plan(api.client, sent)
    gradients = stage(found, "validate")
    assert gradients["seconds"] == pytest.approx(gradients["operations"] / (0.4 * 4e9), abs=1e-3)
    assert found["device"] == "a cpu"


def test_what_an_earlier_job_of_the_tenant_left_is_there_already(api: World, body: dict[str, Any]) -> None:
    sent = {**body, "model": "whole", "embedding": {"kind": "jvp"}, "landmarks": {"count": 8}}
    job_id = posted(api.client, sent)["id"]
    names = [new_id("key") for _ in range(6)]
    units = [("prepare", "", prepared(pool_tokens=names[4], target_tokens=names[5]))]
    units += [("embed", name, {}) for name in names[:2]] + [("landmark_gradients", name, {}) for name in names[2:4]]
    finish(api, job_id, units)
    for name in (names[0], names[2], names[3]):
        api.store.write_json(f"{name}.json", {})
    api.store.write_json(names[4], {})

    def shares(client: TestClient, sent: dict[str, Any], **changes: Any) -> list[float]:
        found = plan(client, sent, **changes)
        return [stage(found, name)["already_there"] for name in ("prepare", "embed", "landmark_gradients", "select")]

    assert shares(api.client, sent) == [round(ROWS / (ROWS + 4), 4), 0.5, 1.0, 0.0]
    other_target = upload(api.client, 4)
    assert shares(api.client, sent, target=other_target)[1:] == [0.5, 1.0, 0.0], "the pool's part does not depend on it"
    assert shares(api.client, sent, seed=1)[1:] == [0.0, 0.0, 0.0]
    assert shares(api.client, sent, max_length=64) == [0.0] * 4
    assert shares(api.client, sent, pool=upload(api.client)) == [0.0] * 4
    counted = plan(api.client, sent)
    assert (counted["estimated"], counted["tokens"]) == (False, {"pool": 1234, "target": 99})
    partly = plan(api.client, sent, target=other_target)
    assert (partly["estimated"], partly["tokens"]["pool"]) == (True, 1234)


def test_what_another_tenant_left_is_not_revealed(api: World) -> None:
    data = b'{"prompt": "p", "completion": "c"}\n' * 3
    plans = []
    for client in (api.client, api.other):
        dataset = client.post("/v1/datasets", params={"name": "same"}, content=data).json()["id"]
        sent = {"model": "whole", "pool": dataset, "target": dataset, "budget": 1, "method": "exact_influence"}
        if client is api.client:
            key = new_id("key")
            job_id = posted(client, sent)["id"]
            first = ("prepare", "", prepared(pool_tokens=key, target_tokens=key))
            finish(api, job_id, [first, ("target_gradients", key, {})])
            api.store.write_json(f"{key}.json", {})
        plans.append(stage(plan(client, sent), "target_gradients")["already_there"])
    assert plans == [1.0, 0.0]


def test_rates_are_of_the_newest_units_that_were_really_computed(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    counted = [{"operations": 4e12, "seconds": 3.0}, {"operations": 2e12, "seconds": 1.0}]
    results = [*counted, {"seconds": 9.0}, {"operations": 0.0, "seconds": 5.0}]
    reused = {"operations": 9e15, "seconds": 1.0, "reused": True}
    finish(api, job_id, [("curvature", new_id("key"), result) for result in (*results, reused)])
    with api.sessions() as session:
        rates = {row.stage: row for row in repository.stage_rates(session)}
    assert rates["curvature"].operations == pytest.approx(6e12 / 4)
    assert rates["curvature"].samples == pytest.approx(20 / 10), "of those without products, such as embeddings of text"
    with api.engine.begin() as connection:
        connection.execute(text("DELETE FROM selection_jobs WHERE id = :id"), {"id": job_id})
