"""Log records as they leave a process: one line each, with what they are about, and never a secret or a user's text."""

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError

from service.observability import logs
from service.settings import LogSettings

SECRET = "log-tests-only-0123456789abcdef0123456789"
KEY = "wnw_0123456789ab_" + "K" * 43
PATIENCE = 120.0

Lines = Callable[[], list[str]]
Json = dict[str, Any]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lines]]:
    """Configures this process's logs as asked, and gives the lines; afterwards all is as it was."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    levels = {name: logging.getLogger(name).level for name in logs._QUIET}

    def configure(**settings: Any) -> Lines:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        # `force` closes the handlers that it replaces: not those of pytest.
        root.handlers.clear()
        logs.configure(LogSettings(**settings), service="api")
        return lambda: stream.getvalue().splitlines()

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def test_a_json_line_says_when_what_and_about_what(configured: Callable[..., Lines]) -> None:
    lines = configured(format="json")
    before = datetime.now(UTC)
    with logs.bound(job_id="job_1", stage="embed"), logs.bound(shard=3):
        logging.getLogger("worker.x").warning("at %d %%", 50, extra={"seconds": 1.5})
    logging.getLogger("worker.x").info("two\nlines")
    first, second = map(json.loads, lines())
    assert datetime.fromisoformat(first.pop("timestamp")) >= before
    assert first == {
        "level": "WARNING",
        "logger": "worker.x",
        "message": "at 50 %",
        "seconds": 1.5,
        "service": "api",
        "job_id": "job_1",
        "stage": "embed",
        "shard": 3,
    }
    assert second["message"] == "two\nlines"
    assert "job_id" not in second, "the block has ended"


def test_fields_are_those_of_the_thread(configured: Callable[..., Lines]) -> None:
    lines = configured(format="json")
    with logs.bound(job_id="mine"):
        thread = threading.Thread(target=lambda: logging.getLogger().error("x"))
        thread.start()
        thread.join()
    assert "job_id" not in json.loads(lines()[0])


def test_text_is_for_people_and_no_path_can_forge_a_record(configured: Callable[..., Lines]) -> None:
    lines = configured(format="text")
    with logs.bound(request_id="req_1"):
        logging.getLogger("service.x").info("GET %s", "/a\n2026-01-01 00:00:00,000 CRITICAL root: forged")
    assert len(lines()) == 1
    assert re.fullmatch(r"20\S+ \S+ INFO service\.x: GET /a\\n2026.* forged \[request_id=req_1\]", lines()[0])


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_level_is_kept_to_by_loggers_that_have_one_of_their_own(
    configured: Callable[..., Lines], form: str
) -> None:
    lines = configured(format=form, level="ERROR")
    uvicorn = logging.getLogger("uvicorn.error")
    level = uvicorn.level
    uvicorn.setLevel("INFO")
    uvicorn.info("started")
    uvicorn.error("failed")
    uvicorn.setLevel(level)
    assert len(lines()) == 1
    assert "failed" in lines()[0]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_database_error_is_logged_without_its_values(configured: Callable[..., Lines], form: str) -> None:
    lines = configured(format=form)
    try:
        try:
            raise psycopg.IntegrityError("null value\nDETAIL:  Failing row contains (1, my sample\n\ttext).")
        except psycopg.Error as cause:
            sql, values = "INSERT INTO t VALUES (%(x)s)", {"x": "my sample"}
            raise DBAPIError.instance(sql, values, cause, psycopg.Error) from cause
    except IntegrityError:
        logging.getLogger("service.x").exception("the pass failed")
    written = "\n".join(lines())
    assert "null value" in written
    assert "INSERT INTO t" in written
    assert "test_logs.py" in written, "where it was raised"
    assert "sample" not in written
    assert "text)" not in written
    assert form == "text" or len(lines()) == 1


@pytest.mark.timeout(60)
def test_an_error_that_is_its_own_cause_is_logged(configured: Callable[..., Lines]) -> None:
    lines = configured(format="json")
    try:
        try:
            raise OSError("broken")
        except OSError as error:
            raise error from error
    except OSError:
        logging.getLogger("worker.x").exception("the unit failed")
    assert "OSError: broken" in json.loads(lines()[0])["exc_info"]


def test_warnings_and_the_error_that_ends_a_process_are_records_too(configured: Callable[..., Lines]) -> None:
    lines = configured(format="json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    try:
        raise ValueError("no device")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    warned, ended = map(json.loads, lines())
    assert (warned["logger"], "DeprecationWarning: old" in warned["message"]) == ("py.warnings", True)
    assert (ended["level"], "ValueError: no device" in ended["exc_info"]) == ("CRITICAL", True)


# Whole processes


def environment(folder: Path, **settings: str) -> dict[str, str]:
    return {
        **os.environ,
        "WINNOW_DATABASE__URL": "postgresql://nobody:hunter2@127.0.0.1:1/none",
        "WINNOW_BROKER__URL": "redis://:hunter2@127.0.0.1:1/0",
        "WINNOW_ARTIFACTS__URL": str(folder),
        "WINNOW_MODELS__FOLDER": str(folder),
        "WINNOW_SECRET_KEY": SECRET,
        "WINNOW_LOG__FORMAT": "json",
        **settings,
    }


def records(path: Path) -> list[Json]:
    """Every line of the log is one JSON record."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        assert datetime.fromisoformat(record["timestamp"]).utcoffset().total_seconds() == 0
        assert record.keys() >= {"level", "logger", "message", "service"}
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_the_api_writes_nothing_but_records_and_one_for_each_request(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", "--port", str(port)]
    log, url = tmp_path / "api.log", f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(tmp_path))

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/healthz").is_success
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up, process, log)
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"}
        httpx.get(f"{url}/v1/datasets?name=my-private-name", headers=headers)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    found = records(log)
    access = [record for record in found if record["logger"] == "service.access"]
    assert [(r["method"], r["route"], r["status"]) for r in access][-1] == ("GET", "/v1/datasets", 503)
    assert access[-1]["request_id"] == "mine"
    assert 0 < access[-1]["seconds"] < PATIENCE
    below = [r for r in found if r.get("request_id") == "mine" and r["logger"] == "service.http.errors"]
    assert "the database is unavailable" in below[0]["message"], "what is logged below a request carries its id"
    assert any(record["logger"] == "uvicorn.error" for record in found)
    assert {record["service"] for record in found} == {"api"}
    written = log.read_text()
    assert not [secret for secret in (KEY, SECRET, "hunter2", "my-private-name") if secret in written]


def test_a_celery_worker_writes_nothing_but_records(tmp_path: Path) -> None:
    """Its broker is unavailable: it logs that, and goes on until it is stopped."""
    command = [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1"]
    command += ["--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    log = tmp_path / "worker.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(tmp_path))
    try:
        wait_for(lambda: "Cannot connect" in log.read_text(), process, log)
    finally:
        process.kill()
        process.wait(PATIENCE)
    found = records(log)
    assert any(record["logger"].startswith("celery.") for record in found)
    assert all(re.fullmatch(r".+:\d+", record["worker_id"]) for record in found)
    assert not [secret for secret in (SECRET, "hunter2") if secret in log.read_text()]
