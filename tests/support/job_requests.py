"""What the tests of jobs over HTTP send, and how they move a job on as a worker would."""

import json
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import text

from service.ids import new_id
from service.ledger.state import TERMINAL
from support.world import World

URL = "/v1/selection-jobs"
ROWS = 40
WHOLE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512}


def upload(client: TestClient, rows: int = ROWS) -> str:
    data = "".join(json.dumps({"prompt": f"p{i}", "completion": new_id("c")}) + "\n" for i in range(rows))
    response = client.post("/v1/datasets", params={"name": "pool"}, content=data.encode())
    assert response.status_code == 201, response.text
    return response.json()["id"]


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


def no_job_was_made(api: World) -> bool:
    return api.client.get(URL).json()["data"] == []


def plan(client: TestClient, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    response = post(client, body, dry_run=True, **changes)
    assert response.status_code == 200, response.text
    return response.json()


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in found["stages"] if entry["stage"] == name)


def finish(api: World, job_id: str, units: list[tuple[str, str, dict[str, Any]]]) -> None:
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
            unit = {"id": job_id, "stage": name, "shard": 0 if name == "prepare" else shard}
            for state, lease in (("running", "now() + interval '1 hour'"), ("succeeded", "NULL")):
                update = text(f"""
                    UPDATE job_units SET state = '{state}', worker_id = 'w', result = CAST(:result AS jsonb),
                        started_at = now() - interval '5 seconds', finished_at = now(), lease_expires_at = {lease}
                    WHERE job_id = :id AND stage = CAST(:stage AS stage) AND shard = :shard
                """)
                connection.execute(update, {**unit, "result": json.dumps(result)})


def prepared(**tokens: str) -> dict[str, Any]:
    counts = {"samples": ROWS, "tokens": 1234, "response_tokens": 600}
    return {"pool_counts": counts, "target_counts": {**counts, "samples": 4, "tokens": 99}, **tokens}


def set_status(api: World, job_id: str, *steps: str) -> None:
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
