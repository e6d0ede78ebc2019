"""The rows of a dataset as a model sees them: rendered by a worker, kept for a while, and without a worker told in words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ColumnElement, func, select, update
from support.servers import Servers
from support.templates import THINKING
from support.tiny import make_tokenizer, pool_rows, save_model, turns
from support.waiting import at_once
from support.worker_jobs import MODEL, SharedWorker, computing_world
from support.world import DATASETS, Json, World

from service.datasets.storage import Sample
from service.datasets.tables import Dataset
from service.plan.parameters import Parameters
from service.previews import service as previews
from service.previews.repository import KIND
from service.tasks import Task, TaskState
from worker.loading import folders
from worker.text.preview import Renderer

REASONING, REFUSING, BROKEN = "tiny-qwen3", "refusing", "broken"
TEMPLATE = (
    "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('it was asked to') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
)
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}


@pytest.fixture(scope="module")
def world(servers: Servers, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    with computing_world(servers, tmp_path_factory.mktemp("previews"), tiny_llama) as made:
        folder = made.settings.models.folder
        save_model(folder / REASONING, "qwen3", template=THINKING.plain)
        save_model(folder / REFUSING, template=TEMPLATE)
        save_model(folder / BROKEN, template="{% for m in messages %}")
        yield made


def given() -> list[Json]:
    rows: list[Json] = pool_rows(3)
    rows.append({"id": "thought", "messages": [turns("2 + 2?")[0], THOUGHT]})
    rows.append({"id": "long", "messages": turns("word " * 300, "reply")})
    rows.append({"id": "refused", "messages": turns("refuse", "never")})
    rows.append({"id": "empty", "messages": turns("say nothing", "")})
    rows.append({"id": "text", "text": "A text: \u202e\x01 \u27e6 \U0001f600."})
    return rows


@pytest.fixture(scope="module")
def dataset(world: World) -> str:
    return world.upload(given())


def get(world: World, dataset: str, client: Any = None, **params: Any) -> Any:
    named = {name: value for name, value in {"model": MODEL, **params}.items() if value is not None}
    return (client or world.client).get(f"{DATASETS}/{dataset}/rows", params=named)


def page(world: World, dataset: str, **params: Any) -> Json:
    """The page, however long a worker takes."""

    def rendered() -> Json | None:
        answer = get(world, dataset, wait=20, **params)
        assert answer.status_code in (200, 202), answer.text
        return dict(answer.json()) if answer.status_code == 200 else None

    return dict(world.until("the rows are rendered", rendered))


def expected(world: World, model: str, rows: list[Json], **parameters: Any) -> list[Json]:
    """What this process makes of the rows."""
    folder = folders.find({"kind": "registered", "name": model}, world.settings.models.folder, weights=False)
    by = Renderer(folder, Parameters.model_validate({"method": "random", **parameters}))
    samples = (Sample(i, row["id"], None, row.get("messages"), row.get("text")) for i, row in enumerate(rows))
    return [{**by.row(sample), **_lists(by.row(sample))} for sample in samples]


def _lists(row: Json) -> Json:
    return {"spans": [list(span) for span in row["spans"]], "kept": row["kept"] and list(row["kept"])}


def task_count(world: World) -> int:
    with world.sessions() as session:
        return session.scalar(select(func.count()).where(Task.kind == KIND)) or 0


@pytest.mark.usefixtures("worker")
class TestRendered:
    @pytest.mark.parametrize("model", [MODEL, REASONING, REFUSING])
    def test_each_row_has_what_a_job_with_the_model_would_read(self, world: World, dataset: str, model: str) -> None:
        found = page(world, dataset, model=model)
        assert [row["id"] for row in found["data"]] == [row["id"] for row in given()]
        assert [row["rendered"] for row in found["data"]] == expected(world, model, given())
        assert found["rendered_by"] == {"name": model, "chat_template": "the model's own", "max_length": 256}
        assert not found["has_more"]
        rows = {row["id"]: row["rendered"] for row in found["data"]}
        assert (rows["long"]["truncated"], rows["long"]["response_truncated"]) == (True, False)
        assert rows["long"]["tokens"]["kept"] == 256 < rows["long"]["tokens"]["total"]
        reasons = {id: row["unusable"]["reason"] for id, row in rows.items() if row["unusable"] is not None}
        assert reasons == ({"refused": "template_refuses", "empty": "no_reply"} if model == REFUSING else {})
        counted = [rows["thought"]["text"][start:end] for start, end in rows["thought"]["spans"]]
        assert ("Two and two." in "".join(counted)) == (model == REASONING)

    def test_arguments_are_those_of_a_job(self, world: World, dataset: str) -> None:
        found = page(world, dataset, model=REASONING, reasoning="strip", max_length=40)
        assert [row["rendered"] for row in found["data"]] == expected(
            world, REASONING, given(), reasoning="strip", max_length=40
        )
        assert found["rendered_by"]["max_length"] == 40
        named = page(world, dataset, template_arguments='{"enable_thinking": false}')
        assert len(named["data"]) == len(given())

    def test_pages_follow_one_another(self, world: World, dataset: str) -> None:
        first = page(world, dataset, limit=3)
        assert (first["has_more"], first["last_id"]) == (True, 2)
        second = page(world, dataset, limit=100, after=2)
        rows = [row["rendered"] for row in (*first["data"], *second["data"])]
        assert rows == expected(world, MODEL, given())
        assert page(world, dataset, after=len(given()) - 1)["data"] == []

    def test_long_texts_make_a_short_page(self, world: World) -> None:
        long = [{"id": str(i), "text": "word " * 120_000} for i in range(3)]
        dataset = world.upload(long)
        found = page(world, dataset)
        assert ([row["id"] for row in found["data"]], found["has_more"], found["last_id"]) == (["0", "1"], True, 1)
        rest = page(world, dataset, after=1)
        assert ([row["id"] for row in rest["data"]], rest["has_more"]) == (["2"], False)

    def test_a_model_that_cannot_be_used_is_told_and_tried_again_later(self, world: World, dataset: str) -> None:
        def failed() -> Any:
            answer = get(world, dataset, model=BROKEN, wait=20)
            return answer if answer.status_code != 202 else None

        answer = world.until("it fails", failed)
        assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (422, "model_not_usable", "model")
        count = task_count(world)

        def ended(when: ColumnElement[Any]) -> None:
            with world.sessions.begin() as session:
                failed = Task.kind == KIND, Task.state == TaskState.FAILED
                session.execute(update(Task).where(*failed).values(finished_at=when))

        ended(func.now())
        assert get(world, dataset, model=BROKEN).status_code == 422
        assert task_count(world) == count, "the failure is the answer for a while"
        ended(func.now() - previews.FAILED_FOR)
        assert get(world, dataset, model=BROKEN).status_code == 202
        assert task_count(world) == count + 1

    def test_a_deleted_dataset_leaves_nothing(self, world: World) -> None:
        dataset = world.upload([{"text": "to be deleted"}])
        count = task_count(world)
        page(world, dataset)
        assert task_count(world) == count + 1
        world.call("DELETE", f"{DATASETS}/{dataset}")
        assert get(world, dataset).status_code == 404
        assert task_count(world) == count

    def test_another_tenant_finds_nothing(self, world: World, dataset: str) -> None:
        page(world, dataset)
        assert get(world, dataset, world.other).status_code == 404

    def test_a_text_may_have_any_character(self, world: World, dataset: str) -> None:
        text = page(world, dataset)["data"][-1]["rendered"]
        assert text["text"] == given()[-1]["text"] + "</s>"
        assert text["tokens"]["total"] == len(make_tokenizer()(text["text"]).input_ids)


def test_without_a_worker_what_was_rendered_is_there_and_the_rest_waits(
    world: World, dataset: str, shared: SharedWorker
) -> None:
    shared.running()
    first = page(world, dataset, limit=2)
    shared.stop()
    count = task_count(world)
    again = get(world, dataset, limit=2)
    assert (again.status_code, again.json()) == (200, first)
    assert task_count(world) == count
    answers = at_once([lambda: get(world, dataset, limit=4)] * 3)
    for answer in answers:
        assert answer.status_code == 202, answer.text
        assert answer.headers["Retry-After"]
        assert (answer.json()["status"], "No worker is running" in answer.json()["detail"]) == ("pending", True)
    assert task_count(world) == count + 1, "one for the same page"
    shared.running()
    assert [row["rendered"] for row in page(world, dataset, limit=4)["data"]] == expected(world, MODEL, given()[:4])


def test_a_tenant_keeps_few_pages_and_few_wait(
    world: World, shared: SharedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "KEPT", 3)
    shared.stop()
    other = world.other
    own = other.post(DATASETS, params={"name": "own"}, content=b'{"text": "a"}\n' * 200).json()["id"]
    with world.sessions() as session:
        mine = Task.tenant_id == session.get_one(Dataset, own).tenant_id, Task.kind == KIND
    wait = [get(world, own, other, after=i) for i in range(previews.OPEN + 1)]
    assert [answer.status_code for answer in wait] == [202] * previews.OPEN + [429]
    assert wait[-1].json()["code"] == "too_many_previews"
    done: Json = {"state": TaskState.SUCCEEDED, "lease_expires_at": None, "finished_at": func.now(), "result": {}}
    with world.sessions.begin() as session:
        session.execute(update(Task).where(*mine).values(state=TaskState.RUNNING, lease_expires_at=func.now()))
        session.execute(update(Task).where(*mine).values(**done))
    assert get(world, own, other, after=100).status_code == 202
    with world.sessions() as session:
        assert session.scalar(select(func.count()).where(*mine)) == 3


class TestRefused:
    @pytest.mark.parametrize(
        ("params", "param"),
        [
            ({"model": "absent"}, "model"),
            ({"model": "owner/name"}, "model"),
            ({"model": "../secret"}, "model"),
            ({"template_arguments": "[1]"}, "template_arguments"),
            ({"template_arguments": '{"a": {"b": 1}}'}, "template_arguments"),
            ({"template_arguments": '{"messages": 1}'}, "template_arguments"),
            ({"reasoning": "some"}, "reasoning"),
            ({"max_length": 3}, "max_length"),
            ({"model": None, "max_length": 32}, "max_length"),
            ({"model": None, "template_arguments": "{}"}, "template_arguments"),
        ],
    )
    def test_a_wrong_argument_is_named(self, world: World, dataset: str, params: Json, param: str) -> None:
        answer = get(world, dataset, **params)
        assert (answer.status_code, answer.json()["param"]) == (422, param), answer.text

    def test_without_a_model_nothing_is_rendered(self, world: World, dataset: str) -> None:
        found = world.call("GET", f"{DATASETS}/{dataset}/rows").json()
        assert {row["rendered"] for row in found["data"]} == {None}
        assert found["rendered_by"] is None
