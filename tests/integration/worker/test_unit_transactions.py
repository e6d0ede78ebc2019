"""What a supervisor does while a transaction of its own is open: nothing that waits for the store or for a network."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session
from support.tiny import pool_rows, target_rows
from support.worker_jobs import post
from support.world import World

from service.jobs import planning
from service.storage.artifacts import ArtifactStore
from worker.supervisor import Supervisor

_OF_THE_STORE = ("exists", "size", "modified", "touch", "open", "read_json", "write_json", "writing", "local", "delete")


class Watch:
    """Names the calls that a thread made while it had a transaction open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open: defaultdict[int, set[Session]] = defaultdict(set)
        self.transactions, self.calls = 0, 0
        self.found: list[str] = []
        for name in _OF_THE_STORE:
            self._instrument(monkeypatch, ArtifactStore, name)
        self._instrument(monkeypatch, planning, "shape_of")  # which may ask the hub

    def _instrument(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        wrapped = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self._open[threading.get_ident()]:
                self.found.append(f"{name}{args[1:]}")
            return wrapped(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    @contextmanager
    def watching(self) -> Iterator[None]:
        def began(session: Session, *_: Any) -> None:
            self._open[threading.get_ident()].add(session)
            self.transactions += 1

        def ended(session: Session, transaction: Any) -> None:
            if transaction.parent is None:
                self._open[threading.get_ident()].discard(session)

        event.listen(Session, "after_begin", began)
        event.listen(Session, "after_transaction_end", ended)
        try:
            yield
        finally:
            event.remove(Session, "after_begin", began)
            event.remove(Session, "after_transaction_end", ended)


@pytest.mark.parametrize("validate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_job_touches_neither_store_nor_network_within_a_transaction(
    world: World, monkeypatch: pytest.MonkeyPatch, validate: bool
) -> None:
    pool, target = world.upload(pool_rows(60)), world.upload(target_rows(4, "python_function"))
    settings: dict[str, Any] = {"landmarks": {"count": 20}, "budget": 5, "validate": validate}
    job_id = post(world, pool, target, **settings)
    watch, supervisor = Watch(monkeypatch), Supervisor(world.settings)
    try:
        with watch.watching():
            assert supervisor.run_until_idle() > 3
    finally:
        supervisor.close()
    world.succeeded(job_id)
    assert watch.transactions > 10
    assert watch.calls > 10
    assert watch.found == []
