"""Limits of a key: the rate of its requests, and what it may have made; each key has its own."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import limits.storage.memory
import limits.strategies
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from support.jobs import move
from support.ledger_world import at_once, wait_until
from support.world import SECRET, World

from service.app import create_app
from service.auth import quotas, rate_limit
from service.auth.principal import Principal, Scope
from service.auth.rate_limit import RateLimiter
from service.http.errors import TooManyRequests
from service.ids import new_id
from service.keys.service import create_key
from service.ledger.state import JobStatus
from service.settings import ApiSettings, LimitSettings

JOBS, DATASETS = "/v1/selection-jobs", "/v1/datasets"
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 5


def limited(api: World, tenant: str | None = None, **own: int) -> TestClient:
    """A key with limits of its own, of a new tenant or the one that is named."""
    tenant = tenant or new_id("tenant")
    with api.sessions.begin() as session:
        key = create_key(session, tenant_name=tenant, key_name="k", secret_key=SECRET, scopes=tuple(Scope))
    with api.engine.begin() as connection:
        set_limits = text("UPDATE api_keys SET limits = CAST(:own AS jsonb) WHERE prefix = :prefix")
        connection.execute(set_limits, {"own": json.dumps(own), "prefix": key.split("_")[1]})
    return TestClient(api.client.app, headers={"Authorization": f"Bearer {key}"})


def upload(client: TestClient, content: bytes = ROWS, **headers: str) -> Any:
    return client.post(DATASETS, params={"name": "pool"}, content=content, headers=headers)


def post(client: TestClient, dataset: str, **more: Any) -> Any:
    return client.post(JOBS, json={"model": "small", "pool": dataset, "target": dataset, "budget": 1, **more})


def usage(client: TestClient, name: str) -> Any:
    return client.get("/v1/usage").json()[name]


def refused(response: Any, param: str | None, retry: str, code: str = "quota_exceeded") -> int | None:
    """The seconds after which to come back."""
    assert (response.status_code, response.json()["code"]) == (429, code), response.text
    assert response.json().get("param") == param
    assert response.headers["x-should-retry"] == retry
    after = response.headers.get("retry-after")
    return None if after is None else int(after)


@pytest.fixture(autouse=True)
def model(settings: ApiSettings) -> None:
    (settings.models.folder / "small").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 6}
    (settings.models.folder / "small" / "config.json").write_text(json.dumps(config))


# The rate of requests


class Clock:
    """The time of the limiter."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (limits.storage.memory, limits.strategies, rate_limit):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=made.time))
    return made


def wait_of(limiter: RateLimiter, key: str, per_minute: int) -> int:
    """0 where a request fits, else what is told."""
    try:
        limiter.hit(key, per_minute)
    except TooManyRequests as error:
        return int(error.headers["Retry-After"])
    return 0


@pytest.mark.parametrize("per_minute", [1, 2, 7, 60, 500])
@pytest.mark.parametrize("pause", [0.0, 0.013, 0.9])
def test_a_minute_holds_so_many_requests_and_the_time_that_is_told_is_true(
    clock: Clock, per_minute: int, pause: float
) -> None:
    limiter, came = RateLimiter(), []
    for _ in range(3 * per_minute + 5):
        clock.now += pause
        seconds = wait_of(limiter, "k", per_minute)
        if seconds:
            assert 1 <= seconds <= 61
            clock.now += seconds
            assert wait_of(limiter, "k", per_minute) == 0, "it fits when it was told to"
        came.append(clock.now)
    for at in came:
        assert sum(at <= other < at + 60 for other in came) <= 2 * per_minute
    assert len(came) / max((came[-1] - came[0]) / 60, 1) <= 1.5 * per_minute + 1


def test_keys_that_are_gone_leave_nothing(clock: Clock) -> None:
    limiter = RateLimiter()
    for number in range(2_000):
        limiter.hit(f"k{number}", 10)
    storage = limiter._limiter.storage
    assert len(storage.storage) == 2_000
    clock.now += 121
    storage._MemoryStorage__expire_events()  # as its timer does after a hit
    assert (len(storage.storage), len(storage.expirations), len(storage.locks)) == (0, 0, 0)


def test_a_key_that_asks_too_often_is_told_when_to_come_back(api: World) -> None:
    client, other = limited(api, requests_per_minute=3), limited(api)
    for status in (404, 200, 422):  # whatever comes of a request, it counts
        path = {404: f"{JOBS}/x", 200: JOBS, 422: f"{JOBS}?limit=0"}[status]
        assert client.get(path).status_code == status
    for method, path in (("GET", JOBS), ("POST", JOBS), ("GET", "/v1/usage"), ("POST", DATASETS)):
        response = client.request(method, path)
        seconds = refused(response, None, "true", "rate_limited")
        assert seconds is not None
        assert 1 <= seconds <= 61
        assert response.headers["x-ratelimit-limit"] == "3"
        assert response.headers["x-ratelimit-remaining"] == "0"
        assert response.headers["x-ratelimit-reset"] == str(seconds)
    assert other.get(JOBS).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path).status_code != 429
    assert usage(other, "requests_per_minute")["used"] == 2


def test_no_limit_is_none(api: World) -> None:
    client = limited(api, requests_per_minute=0, concurrent_jobs=0, stored_bytes=0, samples_per_day=0, open_uploads=0)
    dataset = upload(client).json()["id"]
    assert post(client, dataset).status_code == 202
    counted = client.get("/v1/usage").json()
    assert {name: counted[name]["limit"] for name in counted if name not in ("object", "key_id")} == dict.fromkeys(
        ("requests_per_minute", "concurrent_jobs", "stored_bytes", "samples_per_day", "open_uploads")
    )


def test_the_settings_hold_for_a_key_that_has_none_of_its_own(settings: ApiSettings) -> None:
    few = settings.limits.model_copy(update={"requests_per_minute": 1, "stored_bytes": 1})
    app = create_app(settings.model_copy(update={"limits": few}))
    with app.state.sessions.begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="k", secret_key=SECRET)
    client = TestClient(app, headers={"Authorization": f"Bearer {key}"})
    refused(upload(client), "stored_bytes", "false")
    refused(client.get(JOBS), None, "true", "rate_limited")
    app.state.engine.dispose()


# Quotas


def test_so_many_jobs_may_be_open_and_an_end_makes_room(api: World) -> None:
    client = limited(api, concurrent_jobs=2)
    dataset = upload(client).json()["id"]
    jobs = [post(client, dataset).json()["id"] for _ in range(2)]
    assert usage(client, "concurrent_jobs") == {"used": 2, "limit": 2}
    assert refused(post(client, dataset), "concurrent_jobs", "true") == 60
    assert post(client, dataset, dry_run=True).status_code == 200, "a plan uses no quota"
    retry = client.post(f"{JOBS}/{jobs[0]}/retry")
    assert retry.status_code == 409
    assert client.post(f"{JOBS}/{jobs[0]}/cancel").json()["status"] == "cancelled"
    assert client.post(f"{JOBS}/{jobs[0]}/retry").status_code == 202
    move(api.sessions, jobs[1], JobStatus.RUNNING, JobStatus.CANCELLING)
    refused(client.post(f"{JOBS}/{jobs[0]}/retry"), "concurrent_jobs", "true")
    assert usage(client, "concurrent_jobs")["used"] == 2, "what is being cancelled has not ended"


def test_posts_at_once_do_not_pass_the_quota(api: World) -> None:
    client = limited(api, concurrent_jobs=3)
    dataset = upload(client).json()["id"]
    outcomes = at_once([lambda: post(client, dataset).status_code] * 8)
    assert sorted(outcomes) == [202] * 3 + [429] * 5
    assert len(client.get(JOBS).json()["data"]) == 3


FILL = import_module("migrations.versions.0008_submissions").FILL


@pytest.mark.parametrize("limits", [{"concurrent_jobs": 1}, {"samples_per_day": 19}])
def test_a_post_that_waited_for_another_sees_what_that_one_used(api: World, limits: dict[str, int]) -> None:
    client = limited(api, **limits)
    dataset = upload(client).json()["id"]
    key_id = client.get("/v1/usage").json()["key_id"]
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%key_usage%'")
    with ThreadPoolExecutor(2) as pool, api.engine.connect() as holder:
        holder.execute(text("SELECT FROM key_usage WHERE key_id = :id FOR UPDATE"), {"id": key_id})
        posts = [pool.submit(lambda: post(client, dataset).status_code) for _ in range(2)]

        def both_wait() -> bool:
            with api.engine.connect() as watcher:  # which sees the activity of the beginning of its transaction
                return watcher.scalar(waiting) == 2

        wait_until(both_wait, 15, "both wait")
        holder.rollback()
        assert sorted(each.result() for each in posts) == [202, 429]


def move_jobs(api: World, jobs: dict[str, timedelta]) -> None:
    """As if they had been posted so long ago: what is counted of keys is counted anew, as the migration does it."""
    with api.engine.begin() as connection:
        for job_id, ago in jobs.items():
            connection.execute(
                text("UPDATE selection_jobs SET created_at = now() - :ago WHERE id = :id"), {"ago": ago, "id": job_id}
            )
        connection.execute(text("DELETE FROM key_samples"))
        connection.execute(text("DELETE FROM key_usage"))
        connection.execute(text(FILL))


def test_the_samples_of_a_day_come_back_as_their_jobs_leave_it(api: World) -> None:
    client = limited(api, samples_per_day=32)
    small = upload(client).json()["id"]  # a job has 10 samples
    jobs = [post(client, small).json()["id"] for _ in range(3)]
    move_jobs(api, {jobs[0]: timedelta(hours=23), jobs[1]: timedelta(hours=22), jobs[2]: timedelta(hours=1)})
    client.post(f"{JOBS}/{jobs[2]}/cancel")
    assert client.delete(f"{JOBS}/{jobs[2]}").status_code == 204
    assert usage(client, "samples_per_day") == {"used": 30, "limit": 32}, "what was cancelled or deleted counts"
    seconds = refused(post(client, small), "samples_per_day", "true")
    assert seconds is not None
    assert 3_480 < seconds <= 3_601, "when the oldest job leaves the day"
    larger = upload(client, ROWS * 2).json()["id"]  # 20 samples: the two oldest must leave
    seconds = refused(post(client, larger), "samples_per_day", "true")
    assert seconds is not None
    assert 7_080 < seconds <= 7_201
    assert refused(post(client, upload(client, ROWS * 4).json()["id"]), "samples_per_day", "false") is None
    move_jobs(api, {jobs[0]: timedelta(hours=24, seconds=1)})
    assert post(client, small).status_code == 202
    assert usage(client, "samples_per_day")["used"] == 30


def test_posts_at_once_do_not_pass_the_samples_of_a_day(api: World) -> None:
    client = limited(api, samples_per_day=25)
    dataset = upload(client).json()["id"]
    assert sorted(at_once([lambda: post(client, dataset).status_code] * 6)) == [202] * 2 + [429] * 4


def test_what_is_stored_has_a_bound_and_a_deletion_makes_room(api: World) -> None:
    size = usage_after_upload(api)
    client = limited(api, stored_bytes=2 * size)
    first = upload(client, **{"Idempotency-Key": "one"})
    assert refused(upload(client, ROWS * 3), "stored_bytes", "false") is None, "it would be over"
    assert upload(client).status_code == 201
    assert usage(client, "stored_bytes") == {"used": 2 * size, "limit": 2 * size}
    refused(upload(client, b"not even rows"), "stored_bytes", "false")
    assert upload(client, **{"Idempotency-Key": "one"}).json() == first.json(), "what was answered before is"
    refused(upload(client, **{"Idempotency-Key": "two"}), "stored_bytes", "false")
    assert len(client.get(DATASETS).json()["data"]) == 2
    assert client.delete(f"{DATASETS}/{first.json()['id']}").status_code == 204
    assert upload(client).status_code == 201


def usage_after_upload(api: World) -> int:
    client = limited(api)
    upload(client)
    return int(usage(client, "stored_bytes")["used"])


def test_uploads_at_once_do_not_pass_the_bound(api: World) -> None:
    size = usage_after_upload(api)
    client = limited(api, stored_bytes=2 * size)
    # Each of other content: equal ones wait for each other all the same, to be written once.
    contents = [ROWS.replace(b'"a"', word) for word in (b'"v"', b'"w"', b'"x"', b'"y"', b'"z"')]
    outcomes = at_once([lambda content=content: upload(client, content).status_code for content in contents])
    assert sorted(outcomes) == [201] * 2 + [429] * 3


def test_a_refused_request_leaves_nothing(api: World) -> None:
    client = limited(api, concurrent_jobs=1)
    dataset = upload(client).json()["id"]
    post(client, dataset)
    tables = ("selection_jobs", "job_units", "job_events", "audit_log", "idempotency_keys")
    before = [count(api, table) for table in tables]
    body = {"model": "small", "pool": dataset, "target": dataset, "budget": 1}
    refused(client.post(JOBS, json=body, headers={"Idempotency-Key": "k"}), "concurrent_jobs", "true")
    assert [count(api, table) for table in tables] == before
    job = client.get(JOBS).json()["data"][0]["id"]
    client.post(f"{JOBS}/{job}/cancel")
    assert client.post(JOBS, json=body, headers={"Idempotency-Key": "k"}).status_code == 202


def count(api: World, table: str) -> Any:
    with api.engine.connect() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}"))


def test_another_keys_use_does_not_count(api: World) -> None:
    tenant, size = new_id("tenant"), usage_after_upload(api)
    own = {"concurrent_jobs": 1, "samples_per_day": 10, "stored_bytes": size}
    for client in (limited(api, tenant, **own), limited(api, tenant, **own)):
        dataset = upload(client).json()["id"]
        assert post(client, dataset).status_code == 202


def test_a_limit_of_a_later_version_is_no_error() -> None:
    principal = Principal("tnt", "key", limits={"unheard_of": 1, "concurrent_jobs": 7})
    assert quotas.limits_of(principal, LimitSettings()) == LimitSettings(concurrent_jobs=7)
