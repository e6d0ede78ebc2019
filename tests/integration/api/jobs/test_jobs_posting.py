"""Posting selection jobs: what is kept, and what is refused and by which name."""

import json
from typing import Any

import pytest
from sqlalchemy import text
from support.job_requests import ROWS, URL, no_job_was_made, post, posted, problem, upload
from support.world import World

from service.ids import new_id
from service.jobs.schemas import Parameters
from service.ledger.tables import SelectionJob


def test_a_post_answers_202_with_location_and_retry_after(api: World, body: dict[str, Any]) -> None:
    response = post(api.client, body)
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"{URL}/{job['id']}"
    assert int(response.headers["retry-after"]) > 0
    found = api.client.get(response.headers["location"])
    assert found.json() == job
    assert int(found.headers["retry-after"]) > 0


def test_a_new_job_is_queued_with_its_first_unit_and_event(api: World, body: dict[str, Any]) -> None:
    job = posted(api.client, body, metadata={"run": "7"})
    assert (job["object"], job["status"]) == ("selection_job", "queued")
    assert job["phase"] is job["progress"] is job["error"] is None
    assert {name: job[name] for name in ("pool", "target", "budget")} == {
        name: body[name] for name in ("pool", "target", "budget")
    }
    assert job["metadata"] == {"run": "7"}
    assert job["model"] == {"kind": "registered", "name": "small"}
    assert [(stage["stage"], stage["units"], stage["total"]) for stage in job["stages"]] == [("prepare", 1, ROWS + 4)]
    events = api.client.get(f"{URL}/{job['id']}/events").json()
    assert [event["type"] for event in events["data"]] == ["job.queued", "job.planned"]


def test_every_default_is_written_out(api: World, body: dict[str, Any]) -> None:
    job = posted(api.client, body)
    assert job["parameters"] == Parameters().model_dump(mode="json")
    changed = posted(api.client, body, landmarks={"count": 16}, seed=3, kernel={"bandwidth": 0.5})
    expected = Parameters(landmarks={"count": 16}, seed=3, kernel={"bandwidth": 0.5}).model_dump(mode="json")
    assert changed["parameters"] == expected
    assert changed["parameters"] != job["parameters"]


def test_what_was_sent_is_kept_as_it_was_sent(api: World, body: dict[str, Any]) -> None:
    sent = {**body, "embedding": {"kind": "hidden", "blocks": 6}}
    job_id = posted(api.client, sent)["id"]
    with api.sessions() as session:
        assert session.get_one(SelectionJob, job_id).request == sent


@pytest.mark.parametrize(
    ("budget", "count"), [(1, 1), (ROWS, ROWS), (0.25, 10), (0.999, ROWS), (0.0001, 1), (1e-300, 1), (0.5, 20)]
)
def test_a_budget_is_a_number_or_a_fraction_of_the_pool(
    api: World, body: dict[str, Any], budget: float, count: int
) -> None:
    assert posted(api.client, body, budget=budget)["budget"] == count


@pytest.mark.parametrize(
    "budget",
    [0, -1, ROWS + 1, 10**30, 1.0, 1.5, 0.0, -0.5, "x", "0.5", "5", True, None, [], float("nan"), float("inf")],
)
def test_a_budget_that_cannot_be_is_refused(api: World, body: dict[str, Any], budget: object) -> None:
    found = problem(post(api.client, body, budget=budget), 422, "invalid_request")
    assert found["param"] == "budget"
    assert {error["param"] for error in found.get("errors", [])} <= {"budget"}
    assert no_job_was_made(api)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"color": 1}, "color"),
        ({"embedding": {"color": 1}}, "embedding.color"),
        ({"landmarks": {"count": 8, "color": 1}}, "landmarks.color"),
        ({"model": {"id": "a/b", "color": 1}}, "model.color"),
        ({"model": {"revision": "main"}}, "model.id"),
        ({"model": {"id": "a/b/c"}}, "model.id"),
        ({"model": {"id": "a/b", "revision": ""}}, "model.revision"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"pool": 5}, "pool"),
        ({"landmarks": {"count": 1}}, "landmarks.count"),
        ({"landmarks": {"count": 65_537}}, "landmarks.count"),
        ({"landmarks": None}, "landmarks"),
        ({"embedding": {"kind": "x"}}, "embedding.kind"),
        ({"embedding": {"blocks": 0}}, "embedding.blocks"),
        ({"embedding": {"tangents": 17}}, "embedding.tangents"),
        ({"gradient": {"projection_dim": 63}}, "gradient.projection_dim"),
        ({"kernel": {"ridge": 0}}, "kernel.ridge"),
        ({"kernel": {"ridge": float("nan")}}, "kernel.ridge"),
        ({"kernel": {"bandwidth": float("inf")}}, "kernel.bandwidth"),
        ({"kernel": {"bandwidth": -1}}, "kernel.bandwidth"),
        ({"method": "best"}, "method"),
        ({"dry_run": "maybe"}, "dry_run"),
        ({"method": "random", "refine": 0.5}, "refine"),
        ({"optimizer": {"type": "adam", "betas": [0.9, 1]}}, "optimizer.betas.1"),
        ({"optimizer": {"type": "lion"}}, "optimizer.type"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate"),
        ({"warmup": {"epochs": 0}}, "warmup.epochs"),
        ({"warmup": {"lora": {"rank": 0}}}, "warmup.lora.rank"),
        ({"gradient": {"modules": "a b"}}, "gradient.modules"),
        ({"min_fidelity": 1}, "min_fidelity"),
        ({"refine": 1.5}, "refine"),
        ({"validate": None}, "validate"),
        ({"validate_selection": True}, "validate_selection"),
        ({"selection": "best"}, "selection"),
        ({"dtype": "float16"}, "dtype"),
        ({"max_length": 15}, "max_length"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    api: World, body: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    found = problem(post(api.client, body, **change), 422, "invalid_request")
    assert found["param"] == param
    assert [error["param"] for error in found["errors"]] == [param]
    assert found["detail"] == f"{param}: {found['errors'][0]['message']}"
    assert post(api.client, body, **{"dry_run": True, **change}).json()["param"] == param
    assert no_job_was_made(api)


@pytest.mark.parametrize("missing", ["model", "pool", "target", "budget"])
def test_a_field_that_is_missing_is_named(api: World, body: dict[str, Any], missing: str) -> None:
    del body[missing]
    assert problem(post(api.client, body), 422, "invalid_request")["param"] == missing


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "none"}, "model"),
        ({"model": ""}, "model"),
        ({"model": "small\0"}, "model"),
        ({"model": "../small"}, "model"),
        ({"model": "a/b"}, "model"),  # the hub is switched off here
        ({"model": {"id": "a/b"}}, "model"),
        ({"model": "bert"}, "model"),
        ({"embedding": {"kind": "hidden", "blocks": 7}}, "embedding.blocks"),
        ({"optimizer": {"type": "adamw"}}, "optimizer.type"),  # its state is not registered with the model
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    api: World, body: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    assert problem(post(api.client, body, **change), 422, "invalid_request")["param"] == param
    assert problem(post(api.client, body, **change, dry_run=True), 422, "invalid_request")["param"] == param
    assert no_job_was_made(api)


@pytest.mark.parametrize("param", ["pool", "target"])
def test_a_dataset_that_is_not_the_callers_is_refused(api: World, body: dict[str, Any], param: str) -> None:
    foreign, deleted = upload(api.other), upload(api.client)
    assert api.client.delete(f"/v1/datasets/{deleted}").is_success
    answers = []
    for dataset_id in (new_id("ds"), foreign, deleted, "", "ds_", "\0", "x" * 10_000):
        found = problem(post(api.client, body, **{param: dataset_id}), 422, "dataset_not_found")
        assert found["param"] == param
        answers.append(found["detail"])
    assert len(set(answers)) == 1, "the answer tells a foreign dataset from one that is not there"
    assert no_job_was_made(api)


@pytest.mark.parametrize(
    "metadata",
    [
        {str(i): "x" for i in range(17)},
        {"": "x"},
        {"k" * 65: "x"},
        {"key": "x" * 513},
        {"key": 1},
        {"key": None},
        {"key": {"deep": "x"}},
        {"key": "nul\0"},
        {"nul\0": "x"},
        [],
        "x",
    ],
)
def test_metadata_beyond_its_limits_is_refused(api: World, body: dict[str, Any], metadata: object) -> None:
    found = problem(post(api.client, body, metadata=metadata), 422, "invalid_request")
    assert found["param"].split(".")[0] == "metadata"


def test_metadata_at_its_limits_comes_back(api: World, body: dict[str, Any]) -> None:
    metadata = {f"{i:02}{'k' * 62}": "é" * 512 for i in range(16)}
    assert posted(api.client, body, metadata=metadata)["metadata"] == metadata


def test_the_pool_may_be_the_target(api: World, body: dict[str, Any]) -> None:
    assert posted(api.client, body, target=body["pool"])["target"] == body["pool"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"'])
def test_a_post_that_is_no_json_is_a_problem(api: World, content: bytes) -> None:
    answer = api.client.post(URL, content=content, headers={"content-type": "application/json"})
    problem(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    "change",
    [
        {"method": "random"},
        {"method": "rds_plus", "selection": "top_k", "validate": False},
        {"method": "exact_influence", "gradient": {"projection_dim": None}},
        {"selection": "weighted", "optimizer": {"type": "adamw"}, "curvature": {"type": "ggn"}, "warmup": {"lora": {}}},
    ],
)
def test_what_a_job_echoes_can_be_posted(api: World, body: dict[str, Any], change: dict[str, Any]) -> None:
    echo = posted(api.client, body, **change)["parameters"]
    assert {**echo, **change} | {k: echo[k] for k in change if isinstance(change[k], dict)} == echo
    assert posted(api.client, {**body, **echo})["parameters"] == echo


def test_a_job_of_an_older_version_stays_readable(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    old = {  # fewer fields than today's, and combinations that are refused by now
        "landmarks": {"count": 64},
        "embedding": {"kind": "hidden", "pooling": "response", "blocks": 4, "tangents": 5},
        "kernel": {"kind": "linear", "ridge": 0.01, "bandwidth": 3.0},
    }
    with api.engine.begin() as connection:
        update = text("UPDATE selection_jobs SET parameters = CAST(:old AS jsonb) WHERE id = :id")
        connection.execute(update, {"old": json.dumps(old), "id": job_id})
    found = api.client.get(f"{URL}/{job_id}").json()["parameters"]
    assert (found["embedding"], found["kernel"]) == (old["embedding"], old["kernel"])
