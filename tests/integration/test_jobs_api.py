"""Selection jobs over HTTP on a real PostgreSQL: posting, what is refused and by which name, pages, cancels, tenants."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import SECRET, Api
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, text

from service.app import create_app
from service.ids import new_id
from service.jobs import ledger, repository
from service.jobs.ledger import claims
from service.jobs.schemas import JobRequest, Parameters
from service.jobs.state import TERMINAL, JobStatus
from service.jobs.tables import JobUnit, SelectionJob
from service.settings import ApiSettings, ArtifactSettings, BrokerSettings, DatabaseSettings, ModelSettings
from service.tenants.service import create_key
from service.tenants.tables import ApiKey

ROWS = 40
WHOLE = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
URL = "/v1/selection-jobs"


@pytest.fixture(scope="module")
def app(postgres_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("jobs")
    for name, config in {
        "small": {"model_type": "llama", "num_hidden_layers": 6},
        "bert": {"model_type": "bert", "num_hidden_layers": 12},
        "whole": WHOLE,
    }.items():
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text(json.dumps(config))
    app = create_app(
        ApiSettings(
            database=DatabaseSettings(url=postgres_url, pool_size=2),
            broker=BrokerSettings(url=broker_url),
            artifacts=ArtifactSettings(url=str(folder / "store")),
            models=ModelSettings(folder=folder / "models"),
            secret_key=SecretStr(SECRET),
        )
    )
    yield app
    app.state.engine.dispose()


@pytest.fixture
def api(app: FastAPI) -> Api:
    """Two new tenants of one application. Not entered as a context, which would start the dispatcher."""
    with app.state.sessions.begin() as session:
        keys = [create_key(session, tenant_name=new_id("tenant"), key_name="test", secret_key=SECRET) for _ in range(2)]
    client, other = (TestClient(app, headers={"Authorization": f"Bearer {key}"}) for key in keys)
    return Api(client, other, app.state.engine, app.state.sessions, app.state.store)


def upload(client: TestClient, rows: int = ROWS) -> str:
    data = "".join(json.dumps({"prompt": f"p{i}", "completion": new_id("c")}) + "\n" for i in range(rows))
    response = client.post("/v1/datasets", params={"name": "pool"}, content=data.encode())
    assert response.status_code == 201, response.text
    return response.json()["id"]


@pytest.fixture
def body(api: Api) -> dict[str, Any]:
    """A request that is accepted."""
    return {"model": "small", "pool": upload(api.client), "target": upload(api.client, 4), "budget": 5}


def post(client: TestClient, body: dict[str, Any], **changes: Any) -> Any:
    """Posts the body with the changes; written by json.dumps because some of them are no JSON (NaN)."""
    content = json.dumps({**body, **changes})
    return client.post(URL, content=content, headers={"content-type": "application/json"})


def posted(client: TestClient, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    response = post(client, body, **changes)
    assert response.status_code == 202, response.text
    return response.json()


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = response.json()
    assert (found["status"], found["code"]) == (status, code)
    assert found["request_id"] == response.headers["x-request-id"]
    return found


def no_job_was_made(api: Api) -> bool:
    return api.client.get(URL).json()["data"] == []


# Posting


def test_a_post_answers_202_with_where_and_when_to_look(api: Api, body: dict[str, Any]) -> None:
    response = post(api.client, body)
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"{URL}/{job['id']}"
    assert int(response.headers["retry-after"]) > 0
    found = api.client.get(response.headers["location"])
    assert found.json() == job
    assert int(found.headers["retry-after"]) > 0


def test_a_new_job_is_queued_with_its_first_unit_and_event(api: Api, body: dict[str, Any]) -> None:
    job = posted(api.client, body, metadata={"run": "7"})
    assert (job["object"], job["status"], job["phase"], job["progress"], job["error"]) == (
        "selection_job",
        "queued",
        None,
        None,
        None,
    )
    assert (job["pool"], job["target"], job["budget"], job["metadata"]) == (
        body["pool"],
        body["target"],
        5,
        {"run": "7"},
    )
    assert job["model"] == {"kind": "registered", "name": "small"}
    assert [(stage["stage"], stage["units"], stage["total"]) for stage in job["stages"]] == [("prepare", 1, ROWS + 4)]
    events = api.client.get(f"{URL}/{job['id']}/events").json()
    assert [event["type"] for event in events["data"]] == ["job.queued", "job.planned"]


def test_every_default_is_written_out(api: Api, body: dict[str, Any]) -> None:
    job = posted(api.client, body)
    assert job["parameters"] == Parameters().model_dump(mode="json")
    changed = posted(api.client, body, landmarks={"count": 16}, seed=3, kernel={"bandwidth": 0.5})
    expected = Parameters(landmarks={"count": 16}, seed=3, kernel={"bandwidth": 0.5}).model_dump(mode="json")
    assert changed["parameters"] == expected
    assert changed["parameters"] != job["parameters"]


def test_what_was_sent_is_kept_as_it_was_sent(api: Api, body: dict[str, Any]) -> None:
    sent = {**body, "embedding": {"blocks": 6}}
    job_id = posted(api.client, sent)["id"]
    with api.sessions() as session:
        assert session.get_one(SelectionJob, job_id).request == sent


@pytest.mark.parametrize(
    ("budget", "count"), [(1, 1), (ROWS, ROWS), (0.25, 10), (0.999, ROWS), (0.0001, 1), (1e-300, 1), (0.5, 20)]
)
def test_a_budget_is_a_number_or_a_fraction_of_the_pool(
    api: Api, body: dict[str, Any], budget: float, count: int
) -> None:
    assert posted(api.client, body, budget=budget)["budget"] == count


@pytest.mark.parametrize(
    "budget",
    [0, -1, ROWS + 1, 10**30, 1.0, 1.5, 0.0, -0.5, "x", "0.5", "5", True, None, [], float("nan"), float("inf")],
)
def test_a_budget_that_cannot_be_is_refused(api: Api, body: dict[str, Any], budget: object) -> None:
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
        ({"method": "exact_influence", "landmarks": {"count": 8}}, "landmarks"),
        ({"method": "rds_plus", "optimizer": {"type": "sgd"}}, "optimizer"),
        ({"curvature": {"type": "fisher"}, "optimizer": {"type": "sgd"}}, "curvature.type"),
        ({"selection": "weighted", "curvature": {"rank": 8}}, "curvature.rank"),
        ({"optimizer": {"type": "sgd", "betas": [0.5, 0.6]}}, "optimizer.betas"),
        ({"optimizer": {"type": "adam", "betas": [0.9, 1]}}, "optimizer.betas.1"),
        ({"optimizer": {"type": "lion"}}, "optimizer.type"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate"),
        ({"warmup": {"epochs": 0}}, "warmup.epochs"),
        ({"warmup": {"lora": {"rank": 0}}}, "warmup.lora.rank"),
        ({"warmup": {}, "quantization": "nf4"}, "warmup.lora"),
        ({"embedding": {"kind": "hidden", "tangents": 3}}, "embedding.tangents"),
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
    api: Api, body: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    found = problem(post(api.client, body, **change), 422, "invalid_request")
    assert found["param"] == param
    assert [error["param"] for error in found["errors"]] == [param]
    assert found["detail"] == f"{param}: {found['errors'][0]['message']}"
    assert post(api.client, body, **{"dry_run": True, **change}).json()["param"] == param
    assert no_job_was_made(api)


@pytest.mark.parametrize("missing", ["model", "pool", "target", "budget"])
def test_a_field_that_is_missing_is_named(api: Api, body: dict[str, Any], missing: str) -> None:
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
        ({"embedding": {"blocks": 7}}, "embedding.blocks"),
        ({"optimizer": {"type": "adamw"}}, "optimizer.type"),  # its state is not registered with the model
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    api: Api, body: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    assert problem(post(api.client, body, **change), 422, "invalid_request")["param"] == param
    assert problem(post(api.client, body, **change, dry_run=True), 422, "invalid_request")["param"] == param
    assert no_job_was_made(api)


@pytest.mark.parametrize("param", ["pool", "target"])
def test_a_dataset_that_is_not_the_callers_is_refused(api: Api, body: dict[str, Any], param: str) -> None:
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
def test_metadata_beyond_its_limits_is_refused(api: Api, body: dict[str, Any], metadata: object) -> None:
    found = problem(post(api.client, body, metadata=metadata), 422, "invalid_request")
    assert found["param"].split(".")[0] == "metadata"


def test_metadata_at_its_limits_comes_back(api: Api, body: dict[str, Any]) -> None:
    metadata = {f"{i:02}{'k' * 62}": "é" * 512 for i in range(16)}
    assert posted(api.client, body, metadata=metadata)["metadata"] == metadata


def test_the_pool_may_be_the_target(api: Api, body: dict[str, Any]) -> None:
    assert posted(api.client, body, target=body["pool"])["target"] == body["pool"]


def test_a_post_that_is_no_json_is_a_problem(api: Api) -> None:
    for content in (b"", b"{", b"[]", b'"x"'):
        problem(
            api.client.post(URL, content=content, headers={"content-type": "application/json"}), 422, "invalid_request"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"method": "random"},
        {"method": "rds_plus", "selection": "top_k", "validate": False},
        {"method": "exact_influence", "gradient": {"projection_dim": None}},
        {"selection": "weighted", "optimizer": {"type": "adamw"}, "curvature": {"type": "ggn"}, "warmup": {"lora": {}}},
    ],
)
def test_what_a_job_echoes_can_be_posted_again(api: Api, body: dict[str, Any], change: dict[str, Any]) -> None:
    echo = posted(api.client, body, **change)["parameters"]
    assert {**echo, **change} | {k: echo[k] for k in change if isinstance(change[k], dict)} == echo
    assert posted(api.client, {**body, **echo})["parameters"] == echo


def test_a_job_of_an_older_version_can_still_be_looked_at(api: Api, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    old = {
        "method": "influence_distillation",
        "landmarks": {"count": 64},
        "selection": "top_k",
        "seed": 0,
        "embedding": {"kind": "hidden", "pooling": "response", "blocks": 4, "tangents": 5},
        "gradient": {"projection_dim": 16384, "normalize": True},
        "dtype": "auto",
        "max_length": 2048,
        "kernel": {"kind": "linear", "ridge": 0.01, "bandwidth": 3.0},
    }
    with api.engine.begin() as connection:
        connection.execute(
            text("UPDATE selection_jobs SET parameters = CAST(:old AS jsonb) WHERE id = :id"),
            {"old": json.dumps(old), "id": job_id},
        )
    found = api.client.get(f"{URL}/{job_id}").json()["parameters"]
    assert (found["embedding"], found["kernel"]) == (old["embedding"], old["kernel"])


# Planning


@pytest.fixture
def no_workers(api: Api) -> Iterator[None]:
    """The table of workers is one for all tenants."""
    with api.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))
    yield
    with api.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))


def plan(client: TestClient, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    response = post(client, body, dry_run=True, **changes)
    assert response.status_code == 200, response.text
    return response.json()


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in found["stages"] if entry["stage"] == name)


@pytest.mark.usefixtures("no_workers")
def test_a_dry_run_answers_with_the_plan_and_creates_nothing(api: Api, body: dict[str, Any]) -> None:
    with api.engine.connect() as connection:
        before = connection.execute(text("SELECT count(*) FROM job_events")).scalar()
    found = plan(api.client, body, model="whole", budget=0.5, landmarks={"count": 8})
    assert (found["object"], found["budget"], found["pool"], found["target"]) == (
        "selection_plan",
        ROWS // 2,
        body["pool"],
        body["target"],
    )
    assert found["parameters"] == Parameters(landmarks={"count": 8}).model_dump(mode="json")
    assert found["model"] == {"kind": "registered", "name": "whole"}
    assert [entry["stage"] for entry in found["stages"]][:3] == ["prepare", "landmark_gradients", "target_gradients"]
    assert (found["estimated"], found["totals"]["seconds"], found["device"]) == (True, None, None)
    assert found["totals"]["operations"] > 0
    assert found["exact_operations"] > 0
    assert no_job_was_made(api)
    with api.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM job_events")).scalar() == before


@pytest.mark.usefixtures("no_workers")
def test_a_job_begins_with_its_plan(api: Api, body: dict[str, Any]) -> None:
    expected = plan(api.client, body, model="whole")
    job_id = posted(api.client, body, model="whole", dry_run=False)["id"]
    event = api.client.get(f"{URL}/{job_id}/events").json()["data"][1]
    assert event["type"] == "job.planned"
    assert event["data"] == {name: expected[name] for name in event["data"]}
    assert {"stages", "totals", "exact_operations", "note", "warnings", "estimated"} <= event["data"].keys()


@pytest.mark.usefixtures("no_workers")
def test_a_model_whose_shape_is_not_known_is_planned_without_figures(api: Api, body: dict[str, Any]) -> None:
    found = plan(api.client, body)
    assert any("config.json has no hidden_size" in warning for warning in found["warnings"])
    assert found["totals"]["operations"] is None


@pytest.mark.usefixtures("no_workers")
def test_seconds_come_from_the_worker_that_was_seen_last(api: Api, body: dict[str, Any]) -> None:
    for rate in (1e9, 4e9):
        with api.sessions.begin() as session:
            repository.record_worker(
                session, worker_id="w", device="a cpu", memory_bytes=2**34, matmul_rates={"float32": rate}
            )
    sent = {**body, "model": "whole", "method": "exact_influence", "dtype": "float32", "seed": 77}
    with api.engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM workers")).scalar() == 1
    found = plan(api.client, sent)
    gradients = stage(found, "validate")
    assert gradients["seconds"] == pytest.approx(gradients["operations"] / (0.4 * 4e9), abs=1e-3)
    assert found["device"] == "a cpu"


def finish(api: Api, job_id: str, units: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Makes the job one that has succeeded, with finished units (stage, artifact, result) beside its first."""
    set_status(api, job_id, "running", "succeeded")
    with api.engine.begin() as connection:
        for shard, (name, key, result) in enumerate(units):
            if name != "prepare":
                connection.execute(
                    text("""
                    INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, progress_total)
                    VALUES (:id, CAST(:stage AS stage), :shard, :key, '{}', 'pending', 10)
                    """),
                    {"id": job_id, "stage": name, "shard": shard, "key": key},
                )
            ends = {
                "running": "lease_expires_at = now() + interval '1 hour', ",
                "succeeded": "lease_expires_at = NULL, ",
            }
            for state, lease in ends.items():
                connection.execute(
                    text(f"""
                    UPDATE job_units SET state = '{state}', worker_id = 'w', {lease} result = CAST(:result AS jsonb),
                        started_at = now() - interval '5 seconds', finished_at = now()
                    WHERE job_id = :id AND stage = CAST(:stage AS stage) AND shard = :shard
                    """),
                    {
                        "id": job_id,
                        "stage": name,
                        "shard": 0 if name == "prepare" else shard,
                        "result": json.dumps(result),
                    },
                )


def prepared(**tokens: str) -> dict[str, Any]:
    counts = {"samples": ROWS, "tokens": 1234, "response_tokens": 600}
    return {"pool_counts": counts, "target_counts": {**counts, "samples": 4, "tokens": 99}, **tokens}


def test_what_an_earlier_job_of_the_tenant_left_is_there_already(api: Api, body: dict[str, Any]) -> None:
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


def test_what_another_tenant_left_is_not_told_of(api: Api) -> None:
    data = b'{"prompt": "p", "completion": "c"}\n' * 3
    plans = []
    for client in (api.client, api.other):
        dataset = client.post("/v1/datasets", params={"name": "same"}, content=data).json()["id"]
        sent = {"model": "whole", "pool": dataset, "target": dataset, "budget": 1, "method": "exact_influence"}
        if client is api.client:
            key = new_id("key")
            job_id = posted(client, sent)["id"]
            finish(
                api,
                job_id,
                [("prepare", "", prepared(pool_tokens=key, target_tokens=key)), ("target_gradients", key, {})],
            )
            api.store.write_json(f"{key}.json", {})
        plans.append(stage(plan(client, sent), "target_gradients")["already_there"])
    assert plans == [1.0, 0.0]


def test_rates_are_of_the_newest_units_that_were_really_computed(api: Api, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    results = [{"operations": 4e12, "seconds": 3.0}, {"operations": 2e12, "seconds": 1.0}, {"seconds": 9.0}]
    reused = {"operations": 9e15, "seconds": 1.0, "reused": True}
    finish(api, job_id, [("curvature", new_id("key"), result) for result in (*results, reused)])
    with api.sessions() as session:
        rates = {row.stage: row for row in repository.stage_rates(session)}
    assert rates["curvature"].operations == pytest.approx(6e12 / 4)
    assert rates["curvature"].samples == pytest.approx(30 / 15)
    with api.engine.begin() as connection:
        connection.execute(text("DELETE FROM selection_jobs WHERE id = :id"), {"id": job_id})


# Looking


def set_status(api: Api, job_id: str, *steps: str) -> None:
    """Walks the job, and its first unit with it."""
    with api.engine.begin() as connection:
        for status in steps:
            ends = status in {s.value for s in TERMINAL}
            connection.execute(
                text("""
                UPDATE selection_jobs SET status = CAST(:status AS job_status),
                    finished_at = CASE WHEN :ends THEN now() END,
                    error = CASE WHEN :status = 'failed'
                        THEN '{"code": "broken", "detail": "It broke.", "stage": "embed", "shard": 2}'::jsonb END
                WHERE id = :id
                """),
                {"id": job_id, "status": status, "ends": ends},
            )


def test_pages_hold_every_job_once_newest_first(api: Api, body: dict[str, Any]) -> None:
    ids = {posted(api.client, body)["id"] for _ in range(5)}
    posted(api.other, {**body, "pool": upload(api.other), "target": upload(api.other)})
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = api.client.get(URL, params={"limit": 2, **after}).json()
        seen += [job["id"] for job in page["data"]]
        assert page["object"] == "list"
        assert page["last_id"] == seen[-1]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == sorted(ids, reverse=True)
    beyond = api.client.get(URL, params={"after": seen[-1]}).json()
    assert beyond == {"object": "list", "data": [], "has_more": False, "last_id": None}
    assert api.client.get(URL, params={"limit": 5}).json()["has_more"] is False


def test_the_list_holds_what_the_job_itself_answers(api: Api, body: dict[str, Any]) -> None:
    jobs = [posted(api.client, body) for _ in range(2)]
    listed = api.client.get(URL).json()["data"]
    assert sorted(listed, key=lambda job: job["id"]) == sorted(jobs, key=lambda job: job["id"])


def test_the_list_can_be_cut_to_one_state(api: Api, body: dict[str, Any]) -> None:
    ways = {
        "queued": (),
        "running": ("running",),
        "cancelling": ("running", "cancelling"),
        "succeeded": ("running", "succeeded"),
        "failed": ("running", "failed"),
        "cancelled": ("cancelled",),
    }
    ids = {}
    for status, steps in ways.items():
        ids[status] = posted(api.client, body)["id"]
        set_status(api, ids[status], *steps)
    assert set(ways) == set(JobStatus)
    for status, job_id in ids.items():
        page = api.client.get(URL, params={"status": status}).json()
        assert [(job["id"], job["status"]) for job in page["data"]] == [(job_id, status)]
    problem(api.client.get(URL, params={"status": "paused"}), 422, "invalid_request")


@pytest.mark.parametrize(
    ("params", "status", "param"),
    [
        ({"limit": 0}, 422, "limit"),
        ({"limit": 1001}, 422, "limit"),
        ({"limit": "x"}, 422, "limit"),
        ({"after": ""}, 422, "after"),
        ({"after": "job_"}, 422, "after"),
        ({"after": "\0"}, 422, "after"),
        ({"after": "ds_" + "0" * 32}, 422, "after"),
        ({"after": "job_" + "0" * 32 + "\n"}, 422, "after"),
    ],
)
def test_a_page_that_cannot_be_is_refused(api: Api, params: dict[str, Any], status: int, param: str) -> None:
    response = api.client.get(URL, params=params)
    assert problem(response, status, {400: "bad_request", 422: "invalid_request"}[status])["param"] == param


def test_a_failed_job_says_why_and_need_not_be_polled(api: Api, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    set_status(api, job_id, "running", "failed")
    response = api.client.get(f"{URL}/{job_id}")
    assert response.json()["error"] == {
        "code": "broken",
        "detail": "It broke.",
        "stage": "embed",
        "shard": 2,
        "attempts": None,
        "history": [],
    }
    assert "retry-after" not in response.headers


@pytest.fixture
def running(api: Api, body: dict[str, Any]) -> Iterator[tuple[str, ledger.Claim]]:
    """A job whose first unit is at work. The ledger of this database is shared, so the unit is claimed by its id."""
    job_id = posted(api.client, body)["id"]
    with api.sessions.begin() as session:
        unit_id = session.scalars(select(JobUnit.id).where(JobUnit.job_id == job_id)).one()
        claim = claims._take(session, unit_id, "w", 600)
        assert claim is not None
    set_status(api, job_id, "running")
    yield job_id, claim
    api.client.post(f"{URL}/{job_id}/cancel")


def test_a_running_job_tells_its_phase_and_progress(api: Api, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    with api.sessions.begin() as session:
        ledger.beat(session, claim, lease_seconds=600, done=11)
    job = api.client.get(f"{URL}/{job_id}").json()
    assert (job["status"], job["phase"]) == ("running", "prepare")
    seconds_left = job["progress"].pop("seconds_left")
    assert job["progress"] == {"phase": "prepare", "done": 11, "total": ROWS + 4, "unit": "samples"}
    assert seconds_left >= 0
    assert (job["stages"][0]["units_done"], job["stages"][0]["seconds"]) == (0, None)


def test_a_finished_stage_tells_its_seconds_and_what_was_found(api: Api, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    with api.sessions.begin() as session:
        job = ledger.lock_claim(session, claim)
        ledger.finish_unit(session, job, claim, {"reused": True})
    stage = api.client.get(f"{URL}/{job_id}").json()["stages"][0]
    assert (stage["units"], stage["units_done"], stage["units_reused"]) == (1, 1, 1)
    assert stage["done"] == stage["total"] == ROWS + 4
    assert stage["seconds"] >= 0


def test_events_come_in_pages_oldest_first(api: Api, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    posted(api.client, body)
    with api.sessions.begin() as session:
        for i in range(4):
            ledger.add_event(session, job_id, "test.event", i=i)
    path = f"{URL}/{job_id}/events"
    first = api.client.get(path, params={"limit": 3}).json()
    assert first["has_more"] is True
    rest = api.client.get(path, params={"limit": 3, "after": first["last_id"]}).json()
    assert rest["has_more"] is False
    events = first["data"] + rest["data"]
    assert [event["type"] for event in events][:2] == ["job.queued", "job.planned"]
    assert [event["data"] for event in events][2:] == [{"i": 0}, {"i": 1}, {"i": 2}, {"i": 3}]
    assert [event["id"] for event in events] == sorted({event["id"] for event in events})
    empty = api.client.get(path, params={"after": rest["last_id"]}).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "last_id": None}
    for after in (-1, 2**63, 10**30, "x", "\0"):
        assert problem(api.client.get(path, params={"after": after}), 422, "invalid_request")["param"] == "after"


# Cancelling


def test_a_cancel_can_be_repeated(api: Api, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    answers = [api.client.post(f"{URL}/{job_id}/cancel") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json()["status"] == "cancelled"
    assert answers[0].json() == answers[1].json() == answers[2].json() == api.client.get(f"{URL}/{job_id}").json()
    events = api.client.get(f"{URL}/{job_id}/events").json()["data"]
    assert [event["type"] for event in events].count("job.cancelled") == 1


def test_a_job_at_work_is_cancelled_in_two_steps(api: Api, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    for _ in range(2):
        assert api.client.post(f"{URL}/{job_id}/cancel").json()["status"] == "cancelling"
    with api.sessions.begin() as session:
        ledger.release_unit(session, claim, reason="cancelled")
    assert api.client.post(f"{URL}/{job_id}/cancel").json()["status"] == "cancelled"


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_cancel_leaves_an_ended_job_as_it_is(api: Api, body: dict[str, Any], status: str) -> None:
    job_id = posted(api.client, body)["id"]
    set_status(api, job_id, "running", status)
    before = api.client.get(f"{URL}/{job_id}").json()
    answer = api.client.post(f"{URL}/{job_id}/cancel")
    assert (answer.status_code, answer.json()) == (200, before)


# Who may ask

ROUTES = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/cancel"),
    ("POST", "/retry"),
    ("POST", "/reproduce"),
    ("GET", "/events"),
    ("GET", "/results"),
    ("GET", "/weights"),
    ("GET", "/selected"),
    ("GET", "/samples/0"),
    ("GET", "/export"),
    ("GET", "/provenance"),
]


@pytest.mark.parametrize(("method", "tail"), ROUTES)
def test_anothers_job_is_not_found_and_not_changed(api: Api, body: dict[str, Any], method: str, tail: str) -> None:
    job_id = posted(api.client, body)["id"]
    found = problem(api.other.request(method, f"{URL}/{job_id}{tail}"), 404, "not_found")
    absent = new_id("job")
    missing = problem(api.other.request(method, f"{URL}/{absent}{tail}"), 404, "not_found")
    assert found["detail"].replace(job_id, "") == missing["detail"].replace(absent, "")
    assert api.client.get(f"{URL}/{job_id}").json()["status"] == "queued"


@pytest.mark.parametrize(("method", "tail"), ROUTES)
@pytest.mark.parametrize(
    "job_id", ["%00", "job_%00", "x", "job_" + "0" * 31, "%F0%9F%98%80", "job_" + "G" * 32, "%27--"]
)
def test_an_id_that_cannot_be_is_not_found(api: Api, method: str, tail: str, job_id: str) -> None:
    problem(api.client.request(method, f"{URL}/{job_id}{tail}"), 404, "not_found")


def test_the_routes_above_are_all_that_name_a_job(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    named = {
        (method.upper(), path.removeprefix(f"{URL}/{{job_id}}").replace("{index}", "0"))
        for path, methods in document["paths"].items()
        for method in methods
        if path.startswith(f"{URL}/{{job_id}}")
    }
    assert named == set(ROUTES), "a new route: add it to ROUTES, so that it is tried with another tenant's key"


def _revoked(api: Api) -> str:
    with api.sessions.begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="k", secret_key=SECRET)
        session.flush()
        row = session.scalars(select(ApiKey).where(ApiKey.prefix == key.split("_")[1])).one()
    headers = {"Authorization": f"Bearer {key}"}
    assert api.client.get(URL, headers=headers).status_code == 200
    with api.engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET revoked_at = now() WHERE id = :id"), {"id": row.id})
    return key


def test_no_key_a_bad_key_and_a_revoked_key_are_refused_alike(api: Api) -> None:
    good = api.client.headers["authorization"].removeprefix("Bearer ")
    prefix = good.rsplit("_", 1)[0] if good.count("_") == 2 else "_".join(good.split("_")[:2])
    last = "A" if good[-1] != "A" else "B"
    bad = {
        "revoked": _revoked(api),
        "altered": good[:-1] + last,
        "another secret": f"{prefix}_{'A' * 43}",
        "cut": good[:-1],
        "longer": good + "A",
        "prefix only": prefix,
        "another scheme": "sk" + good[3:],
        "unknown": f"wnw_{'0' * 12}_{'A' * 43}",
        "nothing": "",
        "NUL": "wnw_\0_x",
        "not ASCII": "wnw_é_x".encode().decode("latin-1"),
    }
    headers = {name: f"Bearer {key}".encode("latin-1") for name, key in bad.items()}
    headers |= {"basic": b"Basic dXNlcjpwYXNz", "no scheme": good.encode()}
    del api.client.headers["authorization"]
    routes = [("GET", URL), ("POST", URL), *((method, f"{URL}/{new_id('job')}{tail}") for method, tail in ROUTES)]
    for method, path in [*routes, ("GET", "/v1/models"), ("GET", "/v1/datasets")]:
        problem(api.client.request(method, path), 401, "unauthorized")
    details = set()
    for name, header in headers.items():
        response = api.client.get(URL, headers={"Authorization": header})
        assert response.status_code == 401, name
        assert response.headers["www-authenticate"] == "Bearer"
        details.add(problem(response, 401, "unauthorized")["detail"])
    assert len(details) == 2, "no key and a key that is not valid; nothing tells one bad key from another"
    assert api.client.get(URL, headers={"Authorization": f"Bearer {good}"}).status_code == 200


def test_a_key_is_kept_only_as_its_hmac(api: Api) -> None:
    with api.sessions.begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="k", secret_key=SECRET)
    with api.engine.connect() as connection:
        rows = connection.execute(text("SELECT t::text FROM api_keys t")).scalars().all()
        digests = connection.execute(text("SELECT digest FROM api_keys")).scalars().all()
    assert not [row for row in rows if key.split("_", 2)[2] in row]
    assert len(set(digests)) == len(digests)


def test_a_key_made_under_another_secret_is_not_valid(api: Api) -> None:
    with api.sessions.begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="k", secret_key="another" * 8)
    assert api.client.get(URL, headers={"Authorization": f"Bearer {key}"}).status_code == 401


def test_a_tenant_has_all_its_keys_see_the_same(api: Api, body: dict[str, Any]) -> None:
    name = new_id("tenant")
    with api.sessions.begin() as session:
        keys = [create_key(session, tenant_name=name, key_name=str(i), secret_key=SECRET) for i in range(2)]
    first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
    data = b'{"text": "a"}\n'
    dataset = api.client.post("/v1/datasets", params={"name": "pool"}, content=data, headers=first).json()["id"]
    sent = {**body, "pool": dataset, "target": dataset, "budget": 1}
    job = api.client.post(URL, json=sent, headers=second).json()
    assert api.client.get(f"{URL}/{job['id']}", headers=first).json() == job


def test_the_request_id_of_the_caller_comes_back(api: Api) -> None:
    for path in (URL, f"{URL}/none", "/v1/nowhere", "/healthz"):
        assert api.client.get(path, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_the_registered_models_are_listed(api: Api) -> None:
    found = api.client.get("/v1/models").json()
    assert [(model["name"], model["model_type"], model["blocks"]) for model in found["data"]] == [
        ("bert", "bert", 12),
        ("small", "llama", 6),
        ("whole", "llama", 6),
    ]


# The document


def test_the_document_has_an_example_that_is_valid_and_every_problem(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    examples = document["components"]["schemas"]["JobRequest"]["examples"]
    assert examples
    for example in examples:
        JobRequest.model_validate(example)
    post = document["paths"][URL]["post"]
    assert post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/SelectionPlan")
    assert post["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/SelectionJobOut")
    assert "validate" in document["components"]["schemas"]["JobRequest"]["properties"]
    assert {"200", "202", "401", "422", "503"} <= post["responses"].keys()
    for status in ("401", "422", "503"):
        assert list(post["responses"][status]["content"]) == ["application/problem+json"]
    budget = document["components"]["schemas"]["JobRequest"]["properties"]["budget"]
    assert {option["type"] for option in budget["anyOf"]} == {"integer", "number"}


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from refs(child)


def test_every_reference_of_the_document_leads_somewhere(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    for ref in set(refs(document)):
        node = document
        for step in ref.removeprefix("#/").split("/"):
            assert step in node, ref
            node = node[step]
