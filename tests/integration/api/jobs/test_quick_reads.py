"""Polls and lists that are answered by one statement: the same bytes as the route answers, and only where it would answer 200."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from support.job_requests import URL, posted, set_status, upload
from support.waiting import until
from support.world import World, serving

from service import ledger
from service.app import create_app
from service.auth import authentication, uses
from service.auth.rate_limit import Rates
from service.db.engine import make_engine, make_sessions
from service.db.reader import Reader
from service.peers import Peers
from service.settings import DatabaseSettings
from service.shares import Share

NOWHERE = DatabaseSettings(url="postgresql://nobody@127.0.0.1:1/none")
OWN = {"x-request-id", "date", "server"}  # of each answer


class Serving:
    """The application as a server runs it, without the loops beside it."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._is_open = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._is_open:
            self._is_open = True
            await self._app.state.reader.open()
        await self._app(scope, receive, send)


@dataclass
class Quick:
    """A server that has nothing but the quick way: its routes reach no database, not even for a key."""

    app: FastAPI
    client: httpx.Client

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)


@pytest.fixture(scope="module")
def quick_app(app: FastAPI) -> Iterator[tuple[FastAPI, str]]:
    quick = create_app(app.state.settings)
    quick.state.sessions = make_sessions(make_engine(NOWHERE))

    async def nobody(*_: Any) -> None: ...

    with pytest.MonkeyPatch.context() as patch, serving(Serving(quick)) as url:
        patch.setattr(authentication, "_read", nobody)
        yield quick, url
    quick.state.metrics.close()


@pytest.fixture
def quick(quick_app: tuple[FastAPI, str], api: World) -> Iterator[Quick]:
    api.client.get(URL).raise_for_status()  # the key's first use is recorded the usual way
    app, url = quick_app
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {api.key}"}) as client:
        yield Quick(app, client)


def assert_same(quick: Quick, api: World, path: str, **options: Any) -> None:
    """The body of a running job holds the time that is left, which is none here."""
    found, usual = quick.get(path, **options), api.client.get(path, **options)
    assert (found.status_code, found.content) == (usual.status_code, usual.content)
    headers, expected = (
        {name: value for name, value in answer.headers.items() if name not in OWN} for answer in (found, usual)
    )
    assert headers == expected


def test_jobs_in_every_state_are_answered_as_the_route_answers_them(
    quick: Quick, api: World, body: dict[str, Any]
) -> None:
    for steps in ((), ("running",), ("running", "cancelling"), ("running", "succeeded"), ("running", "failed")):
        named = {"name": 'Größe "模型" 1e-05', "labels": {"z": "", "example.org/a": "b"}}
        job_id = posted(api.client, {**body, **named, "metadata": {"run": 'ä "quoted" 1e-05'}})["id"]
        set_status(api, job_id, *steps)
        assert_same(quick, api, f"{URL}/{job_id}")
        assert_same(quick, api, f"{URL}/{job_id}", headers={"accept-encoding": "identity"})
    ended = quick.get(f"{URL}/{job_id}")
    assert ended.status_code == 200
    known = {"if-none-match": ended.headers["etag"]}
    assert quick.get(f"{URL}/{job_id}", headers=known).status_code == 304
    assert_same(quick, api, f"{URL}/{job_id}", headers=known)
    api.client.patch(f"{URL}/{job_id}", json={"name": None, "labels": {"z": None, "new": "1"}}).raise_for_status()
    assert quick.get(f"{URL}/{job_id}", headers=known).json()["labels"] == {"example.org/a": "b", "new": "1"}
    assert_same(quick, api, f"{URL}/{job_id}")
    assert_same(quick, api, URL)


def test_stages_and_times_are_those_of_the_route(quick: Quick, api: World, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    assert_same(quick, api, f"{URL}/{job_id}")
    with api.sessions.begin() as session:
        ledger.beat(session, claim, lease_seconds=600, done=11)
        long_ago = "UPDATE job_units SET started_at = now() - interval '1 hour' WHERE job_id = :job"
        session.execute(text(long_ago), {"job": job_id})  # so that a second between the two answers makes no difference
    found = quick.get(f"{URL}/{job_id}").json()
    usual = api.client.get(f"{URL}/{job_id}").json()
    assert found["progress"].pop("seconds_left") == pytest.approx(usual["progress"].pop("seconds_left"), rel=0.01)
    assert found == usual
    with api.sessions.begin() as session:
        job = ledger.lock_claim(session, claim)
        ledger.finish_unit(session, job, claim, {"reused": True})
    assert_same(quick, api, f"{URL}/{job_id}")


def test_lists_are_those_of_the_route(quick: Quick, api: World, body: dict[str, Any]) -> None:
    assert_same(quick, api, URL)  # an empty one
    jobs = [posted(api.client, body)["id"] for _ in range(4)]
    set_status(api, jobs[0], "running")
    for query in (
        "",
        "?limit=2",
        "?limit=4",
        "?limit=100",
        "?limit=3&status=queued",
        "?status=running",
        "?status=failed",
        f"?after={jobs[2]}",
        f"?status=queued&after={jobs[2]}&limit=1",
    ):
        assert_same(quick, api, f"{URL}{query}")


def test_pages_of_events_are_those_of_the_route(
    quick: Quick, api: World, running: tuple[str, ledger.Claim], body: dict[str, Any]
) -> None:
    path = f"{URL}/{running[0]}/events"
    with api.sessions.begin() as session:
        ledger.add_event(session, running[0], "test.event", text="ä", number=1e-7, none=None)
    last = quick.get(path).json()["last_id"]
    for query in ("", "?limit=1", f"?after={last}", f"?after={last - 1}&limit=5", "?after=999999999999999999"):
        assert_same(quick, api, f"{path}{query}")
    for query in ("?after=-1", "?after=9999999999999999999", "?limit=0", "?limit=101", "?status=queued"):
        assert quick.get(f"{path}{query}").status_code == 503
    for headers in ({"accept": "text/event-stream"}, {"last-event-id": "x"}):
        assert quick.get(path, headers=headers).status_code == 503
    assert quick.get(f"{URL}/job_{'0' * 32}/events").status_code == 503


@pytest.mark.parametrize(
    ("query", "status"),
    [
        *(("?limit=" + value, 422) for value in ("0", "", "x", "1001")),
        *(("?status=" + value, 422) for value in ("paused", "", "%71ueued%00")),
        ("?after=job_", 422),
        *(
            (query, 200)
            for query in ("?limit=101", "?limit=1000", "?limit=1&limit=2", "?x=1", "?limit=%31", "?limit=2&")
        ),
    ],
)
def test_another_query_is_left_to_the_route(
    quick: Quick, api: World, body: dict[str, Any], query: str, status: int
) -> None:
    posted(api.client, body)
    assert api.client.get(f"{URL}{query}").status_code == status
    if quick.get(f"{URL}{query}").status_code == 200:
        assert_same(quick, api, f"{URL}{query}")
    else:
        assert quick.get(f"{URL}{query}").status_code == 503


def test_only_what_is_found_and_allowed_is_answered_here(quick: Quick, api: World, body: dict[str, Any]) -> None:
    """Each of these is refused by the route, which here has no database: 503. Without a key it needs none."""
    job_id = posted(api.client, body)["id"]
    path = f"{URL}/{job_id}"
    assert quick.get(path).status_code == 200
    of_other = posted(api.other, {**body, "pool": upload(api.other), "target": upload(api.other)})["id"]
    assert quick.get(f"{URL}/{of_other}").status_code == 503
    assert quick.get(f"{URL}/job_{'0' * 32}").status_code == 503
    assert quick.get(f"{path}?wait=0").status_code == 503
    wrong = api.key[:-1] + ("a" if api.key[-1] != "a" else "b")
    assert quick.get(path, headers={"Authorization": f"Bearer {wrong}"}).status_code == 503
    assert quick.get(path, headers={"Authorization": f"Basic {api.key}"}).status_code == 401
    assert httpx.get(f"{quick.client.base_url}{path}").status_code == 401
    api.client.post(f"{path}/cancel").raise_for_status()
    api.client.delete(path).raise_for_status()
    assert quick.get(path).status_code == 503
    assert job_id not in quick.get(URL).text


@pytest.mark.parametrize("change", ["revoked_at = now()", "expires_at = now()", "scopes = '{submit}'"])
def test_a_key_that_the_route_must_look_at_is_left_to_it(
    quick: Quick, api: World, body: dict[str, Any], change: str
) -> None:
    path = f"{URL}/{posted(api.client, body)['id']}"
    assert quick.get(path).status_code == 200
    with api.engine.begin() as connection:
        connection.execute(text(f"UPDATE api_keys SET {change} WHERE prefix = :prefix"), {"prefix": api.key[4:16]})
    assert quick.get(path).status_code == 503
    assert quick.get(URL).status_code == 503


@pytest.mark.parametrize("before", ["now() - interval '2 minutes'", "NULL"])
def test_a_use_that_is_due_is_recorded_by_one_request_a_second(
    quick: Quick, api: World, body: dict[str, Any], before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{URL}/{posted(api.client, body)['id']}"
    clock = [0.0]
    monkeypatch.setattr(uses, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(quick.app.state, "uses", uses.Uses())
    assert quick.get(path).status_code == 200
    with api.engine.begin() as connection:
        connection.execute(
            text(f"UPDATE api_keys SET last_used_at = {before} WHERE prefix = :prefix"), {"prefix": api.key[4:16]}
        )
    assert [quick.get(path).status_code for _ in range(4)] == [503, 200, 200, 200], "the route has no database here"
    clock[0] = 1.0
    assert [quick.get(path).status_code for _ in range(3)] == [503, 200, 200]
    monkeypatch.setattr(quick.app.state, "sessions", api.sessions)
    clock[0] = 2.0
    assert quick.get(path).status_code == 200
    with api.engine.begin() as connection:
        used = connection.scalar(text("SELECT last_used_at FROM api_keys WHERE prefix = :p"), {"p": api.key[4:16]})
    assert used is not None
    assert datetime.now(UTC) - used < timedelta(minutes=1)


def test_the_rate_counts_each_answer_once_and_its_end_is_left_to_the_route(
    quick: Quick, api: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{URL}/{posted(api.client, body)['id']}"
    with api.engine.begin() as connection:
        connection.execute(
            text("""UPDATE api_keys SET limits = '{"requests_per_minute": 3}' WHERE prefix = :prefix"""),
            {"prefix": api.key[4:16]},
        )
    monkeypatch.setattr(quick.app.state, "rate", Rates(Peers("redis://127.0.0.1:1/0")))
    assert [quick.get(path).status_code for _ in range(5)] == [200, 200, 200, 503, 503]


def test_where_nothing_can_be_read_the_route_answers(
    quick: Quick, api: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{URL}/{posted(api.client, body)['id']}"
    monkeypatch.setattr(quick.app.state, "sessions", api.sessions)
    monkeypatch.setattr(quick.app.state, "reader", Reader(NOWHERE, Share("reads", 1, 1.0), Share("writes", 1, 1.0)))
    assert_same(quick, api, path)
    monkeypatch.undo()
    with api.engine.begin() as connection:  # its connections are lost, as by a restart
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%WITH key AS%' AND state = 'idle'"
            )
        )
    monkeypatch.setattr(quick.app.state, "sessions", api.sessions)
    for _ in range(8):
        assert_same(quick, api, path)
    monkeypatch.undo()
    until("it reads again", lambda: quick.get(path).status_code == 200)
