"""Crash points in a process of Winnow, without a line of it in the product: Python imports this file when it starts, where
its folder is on PYTHONPATH and PYTHON_FAULTS names a folder.

A crash point is a moment at which what other processes see is about to change, or has just changed: a commit, a rename in
the artifact store, the rows of a result, a message to the broker. Every passing is appended to `trace` in the folder. A
`plan` there ({"point", "passing", "token", "action"}) has the process that passes the point for the n-th time kill itself,
stop itself, or stand still until `token.go` is there; the token is a file that is made first, so that it happens once. In the
plan's point an ellipsis stands for any text.

Two more plans are no matter of a point. `tear` ({"kind", "suffix", "token"}) has the writer of such an artifact cut it to half
and die before it is published. `batches` ({"bytes_per_token", "touch", "poison"}) has every batch of the compute child take
memory as if the model were larger, and those that hold the poison's tokens abort; each tells its size in `sizes`.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("PYTHON_FAULTS", ""))
_COMMANDS = {"uvicorn": "api", "celery": "worker", "worker.process.main": "compute"}
_ID = re.compile(r"[0-9a-f]{32,}|(?<=job_)\w+")


def _take(token: str) -> None:
    """Makes the token's file, which says who strikes.

    Raises:
        FileExistsError: another did.
    """
    file = os.open(FOLDER / token, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(file, str(os.getpid()).encode())
    os.close(file)


def _plan(name: str) -> dict[str, Any] | None:
    try:
        plan: dict[str, Any] = json.loads((FOLDER / name).read_bytes())
    except FileNotFoundError:
        return None
    return plan


class Points:
    """Counts, tells, and kills."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._passed: Counter[str] = Counter()

    def passed(self, name: str) -> None:
        point = f"{self._process}: {name}"
        with self._lock, (FOLDER / "trace").open("ab", buffering=0) as file:
            file.write(f"{point}\n".encode())
            self._kill_if_planned(point)

    def _kill_if_planned(self, point: str) -> None:
        plan = _plan("plan")
        if plan is None or not re.fullmatch(".*".join(map(re.escape, plan["point"].split("…"))), point):
            return
        self._passed[plan["token"]] += 1
        if self._passed[plan["token"]] != plan["passing"]:
            return
        try:
            _take(plan["token"])
        except FileExistsError:
            return
        match plan.get("action", "kill"):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hold":
                while not (FOLDER / f"{plan['token']}.go").exists():
                    time.sleep(0.02)

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        self.passed(f"before {name}")
        yield
        self.passed(f"after {name}")


def _written(session: Any) -> tuple[int, int, int]:
    return session.info.get("writes", 0), len(session.new), len(session.dirty)


def _note(function: Callable[..., Any]) -> Callable[..., Any]:
    """Has a transaction remember that the function was called in it, and whether it wrote."""

    @functools.wraps(function)
    def noted(session: Any, *args: Any, **options: Any) -> Any:
        before = _written(session)
        result = function(session, *args, **options)
        session.info.setdefault("calls", {}).setdefault(function.__name__, False)
        session.info["calls"][function.__name__] |= _written(session) != before
        return result

    return noted


def _name_of(session: Any) -> str | None:
    """What the transaction does: the calls that wrote, or the tables; those that only read tell that. None: just reads."""
    calls = session.info.get("calls", {})
    for row in (*session.new, *session.dirty, *session.deleted):
        _write(session, row.__tablename__)
    if wrote := [name for name, wrote in calls.items() if wrote]:
        return "+".join(wrote)
    if tables := session.info.get("tables"):
        return "+".join(sorted(tables))
    return f"{'+'.join(calls)} with nothing to write" if calls else None


def _write(session: Any, table: str) -> None:
    session.info["writes"] = session.info.get("writes", 0) + 1
    session.info.setdefault("tables", set()).add(table)


def _of_sessions(points: Points, orm: ModuleType) -> None:
    from sqlalchemy import event

    def executed(state: Any) -> None:
        if state.is_insert or state.is_update or state.is_delete:
            _write(state.session, state.statement.table.name)

    def flushed(session: Any, _: Any) -> None:
        for row in (*session.new, *session.dirty, *session.deleted):
            _write(session, row.__tablename__)

    def before(session: Any) -> None:
        if session.in_nested_transaction():
            return
        session.info["name"] = _name_of(session)
        if session.info["name"]:
            points.passed(f"before commit of {session.info['name']}")

    def after(session: Any) -> None:
        if not session.in_nested_transaction() and session.info["name"]:
            points.passed(f"after commit of {session.info['name']}")

    def ended(session: Any, transaction: Any) -> None:
        if transaction.parent is None:
            for noted in ("writes", "calls", "tables", "name"):
                session.info.pop(noted, None)

    for name, listener in (
        ("do_orm_execute", executed),
        ("after_flush", flushed),
        ("before_commit", before),
        ("after_commit", after),
        ("after_transaction_end", ended),
    ):
        event.listen(orm.Session, name, listener)


def _of_ledger(points: Points, ledger: ModuleType) -> None:
    for name in ledger.__all__:
        if callable(function := getattr(ledger, name)) and not isinstance(function, type):
            setattr(ledger, name, _note(function))


def _of_datasets(points: Points, datasets: ModuleType) -> None:
    for name in ("register", "delete"):
        setattr(datasets, name, _note(getattr(datasets, name)))


def _of_results(points: Points, results: ModuleType) -> None:
    publish = _note(results.publish)

    def published(*args: Any, **options: Any) -> None:
        with points.around("the rows of a result"):
            publish(*args, **options)

    results.publish = published


def _of_store(points: Points, artifacts: ModuleType) -> None:
    roots: set[Path] = set()
    made, replace = artifacts.ArtifactStore.__init__, os.replace

    def remember(store: Any, *args: Any, **options: Any) -> None:
        made(store, *args, **options)
        roots.add(Path(store.root))

    def replaced(source: Any, target: Any, **options: Any) -> None:
        root = next((root for root in roots if Path(target).is_relative_to(root)), None)
        if root is None:
            replace(source, target, **options)
            return
        path = Path(target).relative_to(root)
        with points.around(f"rename to {path.parts[0]}/{_ID.sub('*', path.name)}"):
            replace(source, target, **options)

    writing = artifacts.ArtifactStore.writing

    @contextmanager
    def written(store: Any, key: str) -> Iterator[Path]:
        with writing(store, key) as path:
            yield path
            _tear_if_planned(key, path)

    artifacts.ArtifactStore.__init__ = remember
    artifacts.ArtifactStore.writing = written
    os.replace = replaced


def _tear_if_planned(key: str, path: Path) -> None:
    plan = _plan("tear")
    if plan is None or not (key.startswith(f"{plan['kind']}/") and key.endswith(plan["suffix"])):
        return
    with suppress(FileExistsError):
        _take(plan["token"])
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def _of_batches(_: Points, batching: ModuleType) -> None:
    padded = batching.padded

    def weighed(samples: Any, indices: Any, lengths: Any, device: Any) -> Any:
        batch = padded(samples, indices, lengths, device)
        plan = _plan("batches")
        if plan is not None:
            _weigh(plan, batch)
        return batch

    batching.padded = weighed


def _weigh(plan: dict[str, Any], batch: Any) -> None:
    import torch

    with (FOLDER / "sizes").open("ab", buffering=0) as file:
        file.write(f"{batch.numel()}\n".encode())
    poison = plan["poison"]
    if poison and any(window == poison for row in batch.tolist() for window in _windows(row, len(poison))):
        os.abort()
    memory = torch.empty(batch.numel() * plan["bytes_per_token"], dtype=torch.uint8)
    if plan["touch"]:
        memory.fill_(1)


def _windows(row: list[int], length: int) -> Iterator[list[int]]:
    return (row[start : start + length] for start in range(len(row) - length + 1))


def _of_broker(points: Points, celery: ModuleType) -> None:
    send = celery.Celery.send_task

    def sent(*args: Any, **options: Any) -> Any:
        with points.around("message to the broker"):
            return send(*args, **options)

    celery.Celery.send_task = sent


WRAPPERS: dict[str, Callable[[Points, ModuleType], None]] = {
    "sqlalchemy.orm": _of_sessions,
    "service.ledger": _of_ledger,
    "service.datasets.service": _of_datasets,
    "service.results.service": _of_results,
    "service.storage.artifacts": _of_store,
    "celery.app.base": _of_broker,
    "worker.influence.batching": _of_batches,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps what a module holds, once it has been imported."""

    def __init__(self, points: Points) -> None:
        self._points = points

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wrap = WRAPPERS.get(name)
        if wrap is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            wrap(self._points, module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if "PYTHON_FAULTS" in os.environ:
    process = next((kind for command, kind in _COMMANDS.items() if command in sys.orig_argv[1:3]), None)
    if process is not None:
        sys.meta_path.insert(0, _Finder(Points(process)))
