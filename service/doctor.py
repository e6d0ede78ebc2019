"""`winnow doctor`: looks at every part that the service needs, and says of each what is wrong, why, and what to do.

It reads the settings as API and workers do, and looks from the machine that it runs on. It changes nothing but a scratch file
in the store, which it removes.
"""

import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import redis
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

from service import models
from service.artifacts import ArtifactStore
from service.database import make_engine
from service.dispatch import LEADER_LOCK, QUEUE
from service.jobs import repository
from service.local import running_stack
from service.operate import settings_problem
from service.packages import unsafe_packages
from service.schema import MIGRATION_LOCK, lock_holder, standing
from service.settings import ApiSettings, ArtifactSettings, BrokerSettings, DatabaseSettings, ModelSettings, Settings
from service.webhooks import repository as webhooks

OLDEST_POSTGRESQL = 15
_SLOW_SECONDS = 0.1  # of one round trip to the database, of which a claim takes several
_BEATS = 3
_TAKEN_SECONDS = 3.0  # a message that nobody has taken for so long, though a worker is free, is left alone
_OVERDUE_SECONDS = 120.0
_GIB = 2**30

Level = Literal["ok", "warning", "FAIL", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` says what is there or why it is wrong, `remedy` what to do about it."""

    check: str
    level: Level
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.check}: {self.found}" + (f". To do: {self.remedy}" if self.remedy else "")


Told = tuple[Level, str] | tuple[Level, str, str]


class _Patient:
    """What the checks look at."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))

    @cached_property
    def jobs(self) -> Any:
        with Session(self.engine) as session:
            return repository.diagnosis(session, self.settings.ledger)

    @cached_property
    def workers(self) -> Sequence[Any]:
        with Session(self.engine) as session:
            return repository.recent_workers(session, silent_seconds=_BEATS * self.settings.ledger.beat_seconds)

    def secrets(self) -> list[str]:
        """What no line may show."""
        found = [make_url(self.settings.database.url).password]
        found += [urlsplit(url).password for url in (self.settings.broker.url, self.settings.artifacts.url)]
        if isinstance(self.settings, ApiSettings):
            found.append(self.settings.secret_key.get_secret_value())
        return [shown for secret in found if secret for shown in (str(secret), unquote(str(secret)))]


def examine(home: Path | None = None) -> list[Finding]:
    """Every check in its order: of the settings of the environment, or of the stack that runs from `home`."""
    unseen = [Finding(check.name, "skipped", "not looked at without settings") for check in CHECKS]
    remedy = "set them as for the API and the workers, in the environment or in files"
    try:
        settings = _settings(home)
    except LookupError as error:
        return [Finding("settings", "FAIL", str(error), "start one with `winnow up`, or leave --home away"), *unseen]
    except ValueError as error:
        return [Finding("settings", "FAIL", settings_problem(error), remedy), *unseen]
    try:
        patient = _Patient(settings)
    except (ArgumentError, ValueError):  # they quote a part, which may be of a password
        why = "WINNOW_DATABASE__URL is no URL; what stands for itself in a password is written %XX there"
        return [Finding("settings", "FAIL", why, remedy), *unseen]
    has_key = "with" if isinstance(settings, ApiSettings) else "without"
    findings = [Finding("settings", "ok", f"readable, {has_key} the API's secret key")]
    for check in CHECKS:
        findings.append(_run(check, patient, {f.check for f in findings if f.level in ("FAIL", "skipped")}))
    patient.engine.dispose()
    return findings


def _settings(home: Path | None) -> Settings:
    if home is not None:
        stack = running_stack(home)
        if stack is None:
            raise LookupError(f"no stack runs from {home}")
        return Settings(
            database=DatabaseSettings(url=stack.database_url),
            broker=BrokerSettings(url=stack.broker_url),
            artifacts=ArtifactSettings(url=str(Path(stack.home, "artifacts"))),
            models=ModelSettings(folder=Path(stack.home, "models"), hub=("*/*",)),
        )
    try:
        return ApiSettings()
    except ValidationError as error:
        if any(e["loc"] != ("secret_key",) or e["type"] != "missing" for e in error.errors()):
            raise
        return Settings()  # as on a machine of workers


def _run(check: "_Check", patient: _Patient, away: set[str]) -> Finding:
    missing = [name for name in check.needs if name in away]
    if missing:
        return Finding(check.name, "skipped", f"not looked at: it needs {' and '.join(missing)}")
    try:
        told = check.look(patient)
    except Exception as error:  # whatever keeps the part from working is what is to be told
        why = str(error.orig if isinstance(error, DBAPIError) else error).strip().partition("\n")[0]
        for secret in patient.secrets():
            why = why.replace(secret, "***")
        quotes = isinstance(error, ValueError)  # a part of a URL that it cannot read, which may be of a password
        told = ("FAIL", type(error).__name__ + ("" if quotes else f": {why}"), check.remedy)
    return Finding(check.name, *told)


def _database(patient: _Patient) -> Told:
    with patient.engine.connect() as connection:
        version, number = connection.execute(
            text("SELECT current_setting('server_version'), current_setting('server_version_num')::int")
        ).one()
        times = []
        for _ in range(5):
            started = time.perf_counter()
            connection.execute(text("SELECT 1"))
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    found = f"PostgreSQL {version}, {seconds * 1000:.1f} ms there and back"
    if number < OLDEST_POSTGRESQL * 10_000:
        return "FAIL", found, f"upgrade the server to PostgreSQL {OLDEST_POSTGRESQL} or later"
    if seconds > _SLOW_SECONDS:
        return "warning", found, "move it nearer, or look for what keeps it busy: claims and heartbeats wait for it"
    return "ok", found


def _migrations(patient: _Patient) -> Told:
    with patient.engine.connect() as connection:
        found = standing(connection)
        holder = lock_holder(connection, MIGRATION_LOCK)
    if holder is not None:
        return "warning", f"one runs now: {holder}; the database is at {found.current}", "let it end, and look again"
    if found.is_behind:
        return "FAIL", f"the database is at {found.current}, this version needs {found.newest}", "run `winnow migrate`"
    if found.is_later:
        why = f"the database is at {found.current}, of a later version than this one ({found.newest})"
        return "warning", why, "bring API and workers to that version"
    return "ok", f"at {found.current}"


def _leader(patient: _Patient) -> Told:
    with patient.engine.connect() as connection:
        holder = lock_holder(connection, LEADER_LOCK)
    if holder is None:
        why = "no API process leads: nothing wakes workers, nothing takes back the units of dead ones"
        return "FAIL", why, "start the API; where it runs, look for `dispatcher` in its log"
    return "ok", f"{holder} leads"


def _workers(patient: _Patient) -> Told:
    alive = [row for row in patient.workers if row.is_alive]
    pending = patient.jobs.pending
    versions = sorted({row.version for row in alive})
    if not alive and pending:
        why = f"none is alive, and {pending} units wait"
        return "FAIL", why, "start one: celery -A worker.celery_app worker -P threads -c 1"
    if not alive:
        return "warning", "none is alive; nothing waits for one", "start one before jobs are posted"
    if len(versions) > 1:
        why = f"{len(alive)} alive, of different versions ({', '.join(versions)}): they do not share artifacts"
        return "warning", why, "bring them all to one version"
    if len(alive) < len(patient.workers):
        gone = ", ".join(row.worker_id for row in patient.workers if not row.is_alive)
        why = f"{len(alive)} alive; within a day, {gone} ended without saying so"
        return "warning", why, "look there for a kill: memory that ran out, a machine that was lost"
    return "ok", f"{len(alive)} alive, version {versions[0]}"


def _client(patient: _Patient) -> "closing[redis.Redis]":
    url = patient.settings.broker.url
    return closing(redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3))


def _broker(patient: _Patient) -> Told:
    with _client(patient) as client:
        try:
            client.ping()
        except redis.AuthenticationError as error:
            why = f"it refuses the password ({error})"
            return "FAIL", why, "correct WINNOW_BROKER__URL or WINNOW_BROKER__PASSWORD"
    return "ok", "answers"


def _queue(patient: _Patient) -> Told:
    alive = sum(row.is_alive for row in patient.workers)
    with _client(patient) as client:
        queued = client.llen(QUEUE)
        found = f"{queued} messages"
        if queued and not alive:
            return "warning", f"{found}, and no worker is alive to take them", "start a worker"
        deadline = time.monotonic() + _TAKEN_SECONDS
        while queued and patient.jobs.running < alive and client.llen(QUEUE) >= queued:
            if time.monotonic() > deadline:
                why = f"{found}, and free workers take none: they look at another broker, or hang"
                return "warning", why, "compare their WINNOW_BROKER__URL with this one, or start them anew"
            time.sleep(0.1)
    return "ok", found


def _store(patient: _Patient) -> Told:
    store, key, content = ArtifactStore(patient.settings.artifacts.url), f"tmp/doctor-{uuid.uuid4().hex}", [1, "é"]
    started = time.perf_counter()
    store.write_json(key, content)  # to a temporary name, which is then renamed
    try:
        same = store.read_json(key) == content
    finally:
        store.delete(key)
    if not same or store.exists(key):
        return "FAIL", "what was written did not come back, or could not be deleted", "exchange the store's file system"
    return "ok", f"writes, reads, renames and deletes; {(time.perf_counter() - started) * 1000:.0f} ms"


def _disk(patient: _Patient) -> Told:
    store = ArtifactStore(patient.settings.artifacts.url)
    places = {"temporary files (TMPDIR)": Path(tempfile.gettempdir())}
    if isinstance(store.fs, LocalFileSystem):
        places["store"] = Path(store.root)
    levels, words = set(), []
    for name, path in places.items():
        usage = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
        share = usage.free / usage.total
        levels.add("FAIL" if usage.free < _GIB // 4 else "warning" if usage.free < 2 * _GIB or share < 0.05 else "ok")
        words.append(f"{name} {usage.free / _GIB:.1f} GiB free ({share:.0%})")
    level: Level = next(level for level in ("FAIL", "warning", "ok") if level in levels)
    if level == "ok":
        return level, "; ".join(words)
    return level, "; ".join(words), "make room, delete old jobs, or collect sooner (WINNOW_RETENTION__ARTIFACTS_DAYS)"


def _packages(_: _Patient) -> Told:
    problems = unsafe_packages()
    if problems:
        return "FAIL", "; ".join(problems), "mend it on every machine of workers: they do not start otherwise"
    return "ok", "none is known to run what a model's files say"


def _models(patient: _Patient) -> Told:
    settings = patient.settings.models
    if not (settings.folder.is_dir() and os.access(settings.folder, os.R_OK | os.X_OK)):
        return "FAIL", f"{settings.folder} is no folder that can be read", _CORRECT_FOLDER
    count = len(models.registered(settings))
    if not count and not settings.hub:
        why = f"none in {settings.folder}, and none of the hub allowed (WINNOW_MODELS__HUB): no job can be posted"
        return "FAIL", why, _CORRECT_FOLDER
    return "ok", f"{count} registered; of the hub: {', '.join(settings.hub) or 'none'}"


def _jobs(patient: _Patient) -> Told:
    jobs = patient.jobs
    found = f"{jobs.open} open; {jobs.running} units run, {jobs.pending} wait, {jobs.delayed} of them for a delay"
    wrong = {
        f"{jobs.expired} leases ran out and were not taken back: the sweep of the API is off": jobs.expired,
        f"{jobs.overdue} cancels are beyond their deadline": jobs.overdue,
        f"{len(jobs.still)} stand still for more than ten leases ({', '.join(jobs.still[:3])})": jobs.still,
    }
    if any(wrong.values()):
        why = "; ".join([found, *(words for words, count in wrong.items() if count)])
        return "FAIL", why, "look at the lines above; where all is well there, start the API anew"
    return "ok", found


def _webhooks(patient: _Patient) -> Told:
    with Session(patient.engine) as session:
        overdue = webhooks.overdue(session, seconds=_OVERDUE_SECONDS)
    if overdue:
        why = f"{overdue} messages have been due for more than {_OVERDUE_SECONDS:g} seconds"
        return "warning", why, "start the API; where it runs, look for `webhooks` in its log"
    return "ok", "no message is overdue"


_CORRECT_FOLDER = "correct WINNOW_MODELS__FOLDER, or its owner and mode"


@dataclass(frozen=True, slots=True)
class _Check:
    """`remedy` is for what nobody foresaw: the check raised."""

    name: str
    look: Callable[[_Patient], Told]
    remedy: str
    needs: tuple[str, ...] = ()


_ASK = "look into the server's log"
CHECKS = (
    _Check("database", _database, "start it, or correct WINNOW_DATABASE__URL"),
    _Check("migrations", _migrations, _ASK, ("database",)),
    _Check("leader", _leader, _ASK, ("database",)),
    _Check("workers", _workers, _ASK, ("database", "migrations")),
    _Check("broker", _broker, "start it, or correct WINNOW_BROKER__URL"),
    _Check("queue", _queue, _ASK, ("broker", "database", "migrations")),
    _Check("store", _store, "correct WINNOW_ARTIFACTS__URL, the rights to it, or make room"),
    _Check("disk", _disk, "correct WINNOW_ARTIFACTS__URL"),
    _Check("packages", _packages, "install them anew"),
    _Check("models", _models, _CORRECT_FOLDER),
    _Check("jobs", _jobs, _ASK, ("database", "migrations")),
    _Check("webhooks", _webhooks, _ASK, ("database", "migrations")),
)
