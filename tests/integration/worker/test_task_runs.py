"""Tasks as a supervisor does them: in a process of their own, which is killed, kept or started again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.ledger_world import new_owner
from support.tiny import pool_rows, target_rows
from support.waiting import until
from support.worker_jobs import post
from support.world import World

from service import tasks
from service.settings import LedgerSettings
from service.tasks import Task, TaskState
from worker.supervisor import Supervisor
from worker.tasks.kinds import KINDS, Kind

TESTS = Path(__file__).parents[2]
MODULE = "support.task_modules"


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator")
    for name, kind in {
        "once": Kind(module=MODULE),
        "kept": Kind(module=MODULE, keeps_process=True),
        "of_hub": Kind(module=MODULE, from_hub=True),
    }.items():
        monkeypatch.setitem(KINDS, name, kind)


@contextmanager
def supervising(world: World, **ledger: Any) -> Iterator[Supervisor]:
    """A supervisor in this process, with the world's store and database."""
    changed = world.settings.ledger.model_copy(update=ledger)
    supervisor = Supervisor(world.settings.model_copy(update={"ledger": LedgerSettings(**changed.model_dump())}))
    try:
        yield supervisor
    finally:
        supervisor.close()


def create(world: World, do: str, kind: str = "once", **more: Any) -> str:
    owner = new_owner(world.sessions)
    with world.sessions.begin() as session:
        return tasks.create(
            session,
            kind=kind,
            subject="test",
            tenant_id=owner["tenant_id"],
            key_id=owner["key_id"],
            input={"do": do, **more},
        ).id


def row(world: World, task_id: str) -> Task | None:
    with world.sessions() as session:
        return session.get(Task, task_id)


def ended(world: World, task_id: str) -> Task:
    task = row(world, task_id)
    assert task is not None
    assert task.finished_at is not None, task.state
    return task


def test_a_task_is_done_by_a_process_without_our_secrets(world: World) -> None:
    plain, of_hub = create(world, "answer", name="plain"), create(world, "answer", "of_hub", name="of_hub")
    with supervising(world) as supervisor:
        supervisor.run_until_idle()
    results = {}
    for task_id in (plain, of_hub):
        task = ended(world, task_id)
        assert (task.state, task.error, task.attempt) == (TaskState.SUCCEEDED, None, 1)
        results[task_id] = task.result or {}
    assert world.store.read_json("tmp/plain") == {"do": "answer", "name": "plain"}
    assert "HF_TOKEN" in results[of_hub]["environment"]
    assert "HF_TOKEN" not in results[plain]["environment"]
    assert not [name for name in results[of_hub]["environment"] if name.startswith("WINNOW_")]


def test_only_a_kind_that_says_so_keeps_its_process(world: World) -> None:
    with supervising(world) as supervisor:
        found = {}
        for kind in ("kept", "kept", "once", "once", "kept"):
            task_id = create(world, "answer", kind, name=kind)
            supervisor.run_until_idle()
            found.setdefault(kind, []).append(ended(world, task_id).result or {})
        assert found["kept"][0]["pid"] == found["kept"][1]["pid"]
        assert [result["calls"] for result in found["kept"]] == [1, 2, 1]
        assert found["once"][0]["pid"] != found["once"][1]["pid"]
        left = [result["pid"] for results in found.values() for result in results]
    assert not [pid for pid in left if psutil.pid_exists(pid)], "a process outlived the worker"


@pytest.mark.parametrize(
    ("do", "code", "attempts"),
    [("die", "process_died", 2), ("break", "internal_error", 2), ("refuse", "data_not_usable", 1)],
)
def test_a_task_that_fails_is_tried_again_where_that_may_help(world: World, do: str, code: str, attempts: int) -> None:
    task_id = create(world, do, "kept")
    with supervising(world, max_attempts=2, retry_seconds=0) as supervisor:
        supervisor.run_until_idle()
    task = ended(world, task_id)
    assert task.error is not None
    assert (task.state, task.error["code"], task.attempt) == (TaskState.FAILED, code, attempts)


def test_a_deleted_task_is_killed(world: World) -> None:
    task_id = create(world, "report")
    with supervising(world) as supervisor, running(supervisor):
        progress = until("it reports", lambda: (task := row(world, task_id)) and task.progress)
        assert progress["rows"] == 3
        with world.sessions.begin() as session:
            tasks.delete(session, task_id)
        until("its process has gone", lambda: not psutil.pid_exists(progress["pid"]))
    assert row(world, task_id) is None


def test_a_worker_that_stops_gives_its_task_back(world: World) -> None:
    task_id = create(world, "report")
    with supervising(world) as supervisor, running(supervisor):
        until("it reports", lambda: (task := row(world, task_id)) and task.progress)
        supervisor.stop()
    task = row(world, task_id)
    assert task is not None
    assert (task.state, task.failures) == (TaskState.PENDING, 0)
    with world.sessions.begin() as session:
        tasks.delete(session, task_id)


def test_a_task_is_done_between_the_units_of_a_job(world: World) -> None:
    pool, target = world.upload(pool_rows(60)), world.upload(target_rows(4, "python_function"))
    job_id = post(world, pool, target, landmarks={"count": 20}, budget=5)
    task_id = create(world, "answer", name="between")
    with supervising(world) as supervisor:
        assert supervisor.run_until_idle() > 3
    job = world.succeeded(job_id)
    finished = ended(world, task_id).finished_at
    assert finished is not None
    assert finished.isoformat() < job["finished_at"].replace("Z", "+00:00")


def test_a_worker_does_no_kind_that_it_is_not_to_do(world: World) -> None:
    task_id, other = create(world, "answer", name="a"), create(world, "answer", "kept", name="b")
    worker = world.settings.worker.model_copy(update={"tasks": ("kept",)})
    supervisor = Supervisor(world.settings.model_copy(update={"worker": worker}))
    supervisor.run_until_idle()
    supervisor.close()
    assert ended(world, other).state is TaskState.SUCCEEDED
    task = row(world, task_id)
    assert task is not None
    assert task.state is TaskState.PENDING
    with world.sessions.begin() as session:
        tasks.delete(session, task_id)


@contextmanager
def running(supervisor: Supervisor) -> Iterator[None]:
    thread = threading.Thread(target=supervisor.run_until_idle)
    thread.start()
    try:
        yield
    finally:
        supervisor.stop()
        thread.join(60)
        assert not thread.is_alive()
