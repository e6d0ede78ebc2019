"""What clients expect: OpenAI's official one, pointed at this API, posts, polls, lists, retries and gives up."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from openai.pagination import SyncCursorPage
from support.jobs import add_job, move, write_pool
from support.world import World, make_settings, register_model, serving

from service.auth.principal import Scope
from service.ledger.state import TERMINAL, JobStatus

JOBS = "/selection-jobs"


class Job(openai.BaseModel):
    id: str
    status: str


@dataclass
class Caller:
    """OpenAI's client, and the requests that it has sent."""

    client: openai.OpenAI
    sent: list[Any] = field(default_factory=list)

    def get(self, path: str) -> Any:
        return self.client.get(path, cast_to=object)


@pytest.fixture(scope="module")
def live(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str, Any]]:
    folder = tmp_path_factory.mktemp("openai")
    settings = make_settings(postgres_url, folder)
    register_model(settings)
    with World.made(settings, scopes=Scope) as world, serving(world.app) as url:
        yield world, url, write_pool(world.store, folder / "content", [(f"{i}", None, {"text": "x"}) for i in range(4)])


@pytest.fixture
def caller(live: tuple[World, str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Caller]:
    world, url, _ = live
    found = Caller(openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=2))
    send = found.client._client.send

    def noting(request: Any, **options: Any) -> Any:
        found.sent.append(request)
        return send(request, **options)

    monkeypatch.setattr(found.client._client, "send", noting)
    monkeypatch.setattr(found.client, "_sleep_for_retry", lambda **_: None)
    yield found
    found.client.close()


def upload(caller: Caller) -> str:
    options: Any = {"headers": {"Content-Type": "application/jsonl"}, "params": {"name": "d"}}
    rows = b'{"prompt": "a", "completion": "b"}\n' * 4
    return str(caller.client.post("/datasets", cast_to=object, content=rows, options=options)["id"])  # type: ignore[index]


def test_a_job_is_posted_once_polled_and_cancelled(live: tuple[World, str, Any], caller: Caller) -> None:
    dataset = upload(caller)
    body = {"model": "small", "pool": dataset, "target": dataset, "budget": 2}
    options: Any = {"headers": {"Idempotency-Key": "openai-1"}}
    first, second = (caller.client.post(JOBS, cast_to=Job, body=body, options=options) for _ in range(2))
    assert first == second
    assert caller.client.get(f"{JOBS}/{first.id}", cast_to=Job).status == "queued"
    assert caller.client.post(f"{JOBS}/{first.id}/cancel", cast_to=Job).status == "cancelled"
    job = caller.client.get(f"{JOBS}/{first.id}", cast_to=Job)
    assert JobStatus(job.status) in TERMINAL


def test_all_pages_of_a_list(live: tuple[World, str, Any], caller: Caller) -> None:
    world, _, content = live
    made = [add_job(world.sessions, world.key, content, JobStatus.QUEUED) for _ in range(7)]
    caller.sent.clear()
    jobs = caller.client.get_api_list(JOBS, page=SyncCursorPage[Job], model=Job, options={"params": {"limit": 3}})
    assert [job.id for job in jobs if job.id in made] == made[::-1]
    assert len(caller.sent) >= 3


@pytest.mark.parametrize(
    ("status", "tries"),
    [(JobStatus.RUNNING, 3), (JobStatus.CANCELLING, 1), (JobStatus.FAILED, 1), (JobStatus.CANCELLED, 1)],
)
def test_a_conflict_is_retried_only_where_that_helps(
    live: tuple[World, str, Any], caller: Caller, status: JobStatus, tries: int
) -> None:
    """The client retries every 409, unless the response says that it should not."""
    world, _, content = live
    job_id = add_job(world.sessions, world.key, content, status)
    with pytest.raises(openai.ConflictError) as caught:
        caller.get(f"{JOBS}/{job_id}/results")
    assert len(caller.sent) == tries
    assert caught.value.response.headers["x-should-retry"] == str(tries > 1).lower()


def test_results_that_arrive_between_retries_are_found(live: tuple[World, str, Any], caller: Caller) -> None:
    world, _, content = live
    job_id = add_job(world.sessions, world.key, content, JobStatus.RUNNING)

    def cancel(request: Any) -> None:
        if len(caller.sent) == 2:
            move(world.sessions, job_id, JobStatus.CANCELLED)

    caller.client._client.event_hooks["request"].append(cancel)
    with pytest.raises(openai.ConflictError) as caught:
        caller.get(f"{JOBS}/{job_id}/results")
    assert (len(caller.sent), caught.value.response.json()["code"]) == (2, "no_results")


@pytest.mark.parametrize(
    ("path", "error", "code"),
    [
        ("/selection-jobs/job_x", openai.NotFoundError, "not_found"),
        ("/selection-jobs?limit=0", openai.UnprocessableEntityError, "invalid_request"),
        ("/keys/key_x", openai.NotFoundError, "not_found"),
    ],
)
def test_a_final_error_is_not_retried(caller: Caller, path: str, error: type, code: str) -> None:
    with pytest.raises(error) as caught:
        caller.get(path)
    assert (len(caller.sent), caught.value.response.json()["code"]) == (1, code)
    assert caught.value.response.headers["x-request-id"] == caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(live: tuple[World, str, Any]) -> None:
    with (
        openai.OpenAI(base_url=f"{live[1]}/v1", api_key="wnw_nothing") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.get(JOBS, cast_to=object)


def test_there_are_six_statuses_and_three_of_them_are_final() -> None:
    """A new one once broke every poller: `phase` carries the detail."""
    assert {status.value for status in JobStatus} == {
        "queued",
        "running",
        "cancelling",
        "succeeded",
        "failed",
        "cancelled",
    }
    assert {status.value for status in TERMINAL} == {"succeeded", "failed", "cancelled"}
