"""What a submission costs the database, and the counters of its key, which hold whatever happens at once."""

import random
from importlib import import_module
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, text
from support.job_requests import URL, posted, upload
from support.waiting import at_once, until
from support.world import World

from service.app import create_app
from service.db.reader import Away, Reader
from service.jobs import repository

MIGRATION = import_module("migrations.versions.0008_submissions")
SUMS = text("""
    SELECT k.id, coalesce(u.open_jobs, 0), coalesce(u.samples, 0), count(j.id) FILTER (WHERE j.finished_at IS NULL),
        coalesce(sum(p.row_count + t.row_count), 0)
    FROM api_keys k LEFT JOIN key_usage u ON u.key_id = k.id LEFT JOIN selection_jobs j ON j.key_id = k.id
    LEFT JOIN datasets p ON p.id = j.pool_id LEFT JOIN datasets t ON t.id = j.target_id
    WHERE k.prefix IN (:one, :two) GROUP BY k.id, u.open_jobs, u.samples
""")


def test_a_plain_submission_is_three_statements_each_a_transaction_of_its_own(
    api: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    read, write = Reader.rows, Reader.write

    async def noted_read(*given: Any) -> Any:
        found.append("read")
        return await read(*given)

    async def noted_write(*given: Any) -> Any:
        found.append("written")
        return await write(*given)

    def note(*_: Any) -> None:
        found.append("in a session")

    def posts(client: TestClient) -> list[str]:
        found.clear()
        posted(client, body)
        return found

    plain = ["read", "read", "written"]
    app = create_app(api.settings)  # which plans no job at once, as those of other tests do
    with TestClient(app, headers=api.client.headers) as client:
        monkeypatch.setattr(Reader, "rows", noted_read)
        monkeypatch.setattr(Reader, "write", noted_write)
        event.listen(app.state.engine, "before_cursor_execute", note)
        until("its connections are open and the key's use is noted", lambda: posts(client) == plain, 60)
        found.clear()
        answers = [client.post(URL, json=body, headers={"Idempotency-Key": key}) for key in ("one", "two", "two")]
    app.state.metrics.close()
    assert [answer.status_code for answer in answers] == [202] * 3
    assert answers[1].json() == answers[2].json()
    assert found == [*plain, *plain, "read", "read"]


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("key", [None, "one-of-its-own"])
def test_a_connection_that_is_lost_while_a_job_is_written_leaves_one_job(
    api: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch, key: str | None, is_done: bool
) -> None:
    """Whether it was lost before the statement took effect or after."""
    write, lost = Reader.write, []

    async def write_and_lose(*given: Any) -> Any:
        if is_done:
            await write(*given)
        lost.append(given)
        raise Away

    body = {**body, "metadata": {"run": f"{key} {is_done}"}}
    headers = {} if key is None else {"Idempotency-Key": f"{key}-{is_done}"}
    app = create_app(api.settings)
    with TestClient(app, headers=api.client.headers) as client:
        monkeypatch.setattr(Reader, "write", write_and_lose)

        def answer() -> Any:
            return client.post(URL, json=body, headers=headers)

        until("its connections are open", lambda: client.get(URL).is_success and (answer().status_code, lost)[1], 60)
        lost.clear()
        found = answer()
        assert len(lost) == (0 if key else 1)
        assert found.status_code == 202
        listed = [
            job for job in client.get(URL, params={"limit": 100}).json()["data"] if job["metadata"] == body["metadata"]
        ]
    app.state.metrics.close()
    ids = [job["id"] for job in listed]
    assert found.json()["id"] in ids
    assert len(ids) == len(set(ids))
    if key:
        assert len(ids) == 1


def test_the_answer_is_what_is_read_and_what_was_kept(api: World, body: dict[str, Any]) -> None:
    sent = {**body, "budget": 0.25, "metadata": {"z": "1", "a": "2"}, "kernel": {"ridge": 1e-7}}
    answers = [api.client.post(URL, json=sent, headers={"Idempotency-Key": "kept"}) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert api.client.get(answers[0].headers["location"]).json() == answers[0].json()
    with api.engine.connect() as connection:
        entries = text("SELECT action, detail FROM audit_log WHERE object_id = :id")
        ((action, detail),) = connection.execute(entries, {"id": answers[0].json()["id"]}).all()
    assert (action, detail) == ("selection_job.created", {"pool": body["pool"], "target": body["target"]})


def counters(api: World) -> list[tuple[str, int, int, int, int]]:
    """(key, open jobs and samples by the counters, and by their sums) of the two keys."""
    one, two = (key.split("_")[1] for key in (api.key, api.other_key))
    with api.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(SUMS, {"one": one, "two": two})]


def test_counters_are_the_sums_whatever_happens_at_once(api: World, body: dict[str, Any]) -> None:
    theirs = {**body, "pool": upload(api.other, 7), "target": upload(api.other, 3)}
    chance = random.Random(0)

    def work(client: TestClient, sent: dict[str, Any]) -> None:
        jobs: list[str] = []
        for _ in range(6):
            jobs.append(posted(client, sent)["id"])
            job_id = chance.choice(jobs)
            chance.choice([client.post, client.post, client.delete])(f"{URL}/{job_id}" + chance.choice(["/cancel", ""]))
            client.post(f"{URL}/{job_id}/cancel")
            client.post(f"{URL}/{job_id}/retry")

    def remove() -> None:
        with api.engine.begin() as connection:
            connection.execute(
                text("DELETE FROM selection_jobs WHERE id = :id"), {"id": posted(api.client, body)["id"]}
            )

    calls = [lambda: work(api.client, body), lambda: work(api.other, theirs)] * 2 + [remove]
    assert [outcome for outcome in at_once(calls) if outcome is not None] == []
    found = counters(api)
    assert len(found) == 2
    assert min(row[1] for row in found) > 0
    removed = 44  # samples of the job that was removed stay counted
    for _, open_jobs, samples, open_sum, samples_sum in found:
        assert open_jobs == open_sum
        assert samples - samples_sum in (0, removed)
    with api.sessions() as session:
        used = {row[0]: repository.usage(session, row[0]) for row in found}
        assert used == {row[0]: (row[1], row[2]) for row in found}


def test_the_migration_counts_what_is_there(api: World, body: dict[str, Any]) -> None:
    jobs = [posted(api.client, body)["id"] for _ in range(3)]
    api.client.post(f"{URL}/{jobs[0]}/cancel")
    ((key_id, *_),) = [row for row in counters(api) if row[1]]
    with api.sessions() as session:
        before = repository.usage(session, key_id)
        session.execute(text("DELETE FROM key_samples"))
        session.execute(text("DELETE FROM key_usage"))
        session.execute(text(MIGRATION.FILL))
        assert repository.usage(session, key_id) == before == (2, 3 * 44)
        last = text("SELECT max(created_at) + interval '1 day' FROM selection_jobs WHERE key_id = :key")
        at = repository.samples_leave_at(session, key_id, room=0)
        assert at is not None
        assert 0 < (at - session.scalar(last, {"key": key_id})).total_seconds() <= 1
        session.rollback()


def test_old_samples_are_removed_and_change_nothing(api: World, body: dict[str, Any]) -> None:
    posted(api.client, body)
    ((key_id, *_),) = [row for row in counters(api) if row[1]]
    with api.sessions() as session:
        old = text("INSERT INTO key_samples VALUES (:key, now() - interval '26 hours', 0)")
        session.execute(old, {"key": key_id})
        before = repository.usage(session, key_id)
        assert repository.delete_old_samples(session) >= 1
        assert repository.usage(session, key_id) == before == (1, 44)
        session.rollback()
