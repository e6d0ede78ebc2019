"""Checks of everything that the service needs.

A check changes nothing except for a file in the artifact store, which it removes. To add one, write a function that takes the
`System` and returns an `Outcome`, and list it in `CHECKS`.
"""

import os
import shutil
import statistics
import tempfile
import time
import timeit
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import redis
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.background.dispatcher import QUEUE
from service.datasets.storage import fingerprint_of
from service.datasets.uploads.files import upload_of
from service.db.locks import Lock, lock_holder
from service.db.migrate import standing
from service.health import connections
from service.jobs import repository
from service.ledger import store_identity
from service.ledger.workers import recent_workers
from service.models import registry
from service.models.dependency_check import unsafe_packages
from service.settings import ApiSettings, Settings
from service.storage.artifacts import ArtifactStore, named_keys
from service.storage.checksums import SUFFIX
from service.webhooks import repository as webhooks

OLDEST_POSTGRESQL = 15
_SLOW_ROUND_TRIP_SECONDS = 0.1  # a claim takes several
_MISSED_BEATS = 3
_LISTED = 100  # damaged files by name
_QUEUE_WAIT_SECONDS = 3.0  # a free worker takes a message sooner
_OVERDUE_SECONDS = 120.0
_GIB = 2**30

Level = Literal["ok", "warning", "FAIL", "skipped"]

Outcome = tuple[Level, str] | tuple[Level, str, str] | tuple[Level, str, str, Mapping[str, float]]
"""Level, detail, remedy and measurements of a `CheckResult`."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`error` is the type of an unexpected exception: `detail` then holds its message, which may name hosts and is not for the
    public. `measurements` are values for the metrics, by name.
    """

    name: str
    level: Level
    detail: str
    remedy: str = ""
    measurements: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.level in ("ok", "warning")

    def __str__(self) -> str:
        return f"{self.level:<8} {self.name}: {self.detail}" + (f". To do: {self.remedy}" if self.remedy else "")


class System:
    """What the checks examine; it uses the caller's engine. `deep`: every file of the artifact store is read."""

    def __init__(
        self, settings: Settings, engine: Engine, *, broker_timeout_seconds: float = 3.0, deep: bool = False
    ) -> None:
        self.settings = settings
        self.deep = deep
        self.engine = engine
        self._broker_timeout_seconds = broker_timeout_seconds

    @cached_property
    def jobs(self) -> Any:
        with Session(self.engine) as session:
            return repository.diagnosis(session, self.settings.ledger)

    @cached_property
    def workers(self) -> Sequence[Any]:
        with Session(self.engine) as session:
            silent_seconds = _MISSED_BEATS * self.settings.ledger.beat_seconds
            return recent_workers(session, silent_seconds=silent_seconds)

    @cached_property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.settings.artifacts.url)

    def broker(self) -> "closing[redis.Redis]":
        seconds = self._broker_timeout_seconds
        client = redis.Redis.from_url(self.settings.broker.url, socket_timeout=seconds, socket_connect_timeout=seconds)
        return closing(client)

    def secrets(self) -> Iterator[str]:
        """What no result may contain."""
        found = [self.engine.url.password]
        found += [urlsplit(url).password for url in (self.settings.broker.url, self.settings.artifacts.url)]
        if isinstance(self.settings, ApiSettings):
            found.append(self.settings.secret_key.get_secret_value())
        for secret in filter(None, found):
            yield from (str(secret), unquote(str(secret)))


def run_checks(system: System, *names: str) -> list[CheckResult]:
    """The results of the named checks, or of all, in order. A check is skipped if one that it needs has failed."""
    results: list[CheckResult] = []
    for check in CHECKS:
        if not names or check.name in names:
            failed = [result.name for result in results if not result.ok and result.name in check.needs]
            results.append(
                CheckResult(check.name, "skipped", f"not checked: requires {' and '.join(failed)}")
                if failed
                else check.run(system)
            )
    return results


def _database(system: System) -> Outcome:
    with system.engine.connect() as connection:
        version, number = connection.execute(
            text("SELECT current_setting('server_version'), current_setting('server_version_num')::int")
        ).one()
        seconds = statistics.median(timeit.repeat(lambda: connection.execute(text("SELECT 1")), number=1))
    detail = f"PostgreSQL {version}, round trip {seconds * 1000:.1f} ms"
    if number < OLDEST_POSTGRESQL * 10_000:
        return "FAIL", detail, f"upgrade the server to PostgreSQL {OLDEST_POSTGRESQL} or later"
    if seconds > _SLOW_ROUND_TRIP_SECONDS:
        return "warning", detail, "move it closer, or find out what keeps it busy: claims and heartbeats wait for it"
    return "ok", detail


def _connections(system: System) -> Outcome:
    alive = sum(row.is_alive for row in system.workers)
    detail, remedy = connections.examine(system.engine, system.settings, workers=alive)
    return "warning" if remedy else "ok", detail, remedy


def _migrations(system: System) -> Outcome:
    with system.engine.connect() as connection:
        found = standing(connection)
        holder = lock_holder(connection, Lock.MIGRATION)
    if found.is_behind:
        detail = f"the database is at {found.current}, this version requires {found.newest}"
        if holder is not None:
            return "FAIL", f"{detail}; a migration is running: {holder}", "wait until it has ended"
        return "FAIL", detail, "run `winnow migrate`"
    if holder is not None:
        return "warning", f"one is running: {holder}; the database is at {found.current}", "wait until it has ended"
    if found.is_later:  # as during an upgrade, and the service runs on
        detail = f"the database is at {found.current}, which is newer than this version ({found.newest})"
        return "warning", detail, "upgrade API and workers to that version"
    return "ok", f"at {found.current}"


def _leader(system: System) -> Outcome:
    with system.engine.connect() as connection:
        holder = lock_holder(connection, Lock.DISPATCHER)
    if holder is None:
        detail = "no API process is the leader: nothing wakes workers or reclaims the units of dead ones"
        return "FAIL", detail, "start the API; if it is running, search its log for `dispatcher`"
    return "ok", f"{holder} leads"


def _workers(system: System) -> Outcome:
    alive = [row for row in system.workers if row.is_alive]
    gone = ", ".join(row.worker_id for row in system.workers if not row.is_alive)
    versions = sorted({row.version for row in alive})
    if not alive and system.jobs.pending:
        detail = f"none is alive, and {system.jobs.pending} units are waiting"
        return "FAIL", detail, "start one: celery -A worker.celery_app worker -P threads -c 1"
    if not alive:
        return "warning", "none is alive, but no unit is waiting", "start one before jobs are posted"
    if lacking := [_lacking(row) for row in alive if row.problems]:
        level: Level = "FAIL" if all(row.is_retired for row in alive) else "warning"
        remedy = "correct this on those hosts, whose logs say more; each is back within WINNOW_WORKER__PROVE_SECONDS"
        return level, f"{len(alive)} alive; {'; '.join(lacking)}", remedy
    if len(versions) > 1:
        detail = f"{len(alive)} alive, of different versions ({', '.join(versions)}), which do not share artifacts"
        return "warning", detail, "run the same version everywhere"
    if gone:
        detail = f"{len(alive)} alive; {gone} disappeared within the last day without a shutdown"
        return "warning", detail, "check those hosts for a kill (out of memory) or a crash"
    return "ok", f"{len(alive)} alive, version {versions[0]}"


def _lacking(worker: Any) -> str:
    does = "takes no work" if worker.is_retired else "leaves jobs to others"
    return f"{worker.worker_id} {does}: {' '.join(worker.problems)}"


def _broker(system: System) -> Outcome:
    with system.broker() as client:
        try:
            messages = int(client.llen(QUEUE))
        except redis.AuthenticationError as error:
            detail = f"it rejects the password ({error})"
            return "FAIL", detail, f"correct WINNOW_BROKER__URL or WINNOW_BROKER__PASSWORD; {_COUNTED_ALONE}"
    return "ok", "answers", "", {"broker_messages": messages}


def _queue(system: System) -> Outcome:
    alive = sum(row.is_alive for row in system.workers)
    with system.broker() as client:
        queued = client.llen(QUEUE)
        detail = f"{queued} messages"
        if queued and not alive:
            return "warning", f"{detail}, and no worker is alive to receive them", "start a worker"
        deadline = time.monotonic() + _QUEUE_WAIT_SECONDS
        while queued and system.jobs.running < alive and client.llen(QUEUE) >= queued:
            if time.monotonic() > deadline:
                detail += ", and idle workers receive none: they use another broker, or hang"
                return "warning", detail, "compare their WINNOW_BROKER__URL with this one, or restart them"
            time.sleep(0.1)
    return "ok", detail


def _pair(system: System) -> Outcome:
    with Session(system.engine) as session:
        identity = store_identity.recorded(session)
    if identity is None:
        return "warning", "no API has run on this database yet: its artifact store is not known", "start the API"
    try:
        store_identity.check(identity, system.store)
    except store_identity.OtherStore as error:
        file = f"the file {store_identity.MARKER} at its root"
        remedy = f"correct WINNOW_ARTIFACTS__URL; only if the store was lost for good, write {identity.id} into {file}"
        return "FAIL", str(error), remedy
    except OSError as error:
        return "warning", f"the store's mark cannot be read ({type(error).__name__})", "see the line `store`"
    return "ok", f"store and database are both marked {identity.id}"


def _store(system: System) -> Outcome:
    store, key, content = system.store, f"tmp/check-{uuid.uuid4().hex}", [1, "é"]
    started = time.perf_counter()
    store.write_json(key, content)  # to a temporary name, which is then renamed
    try:
        same = store.read_json(key) == content
    finally:
        store.delete(key)
    if not same or store.exists(key):
        detail = "a written file could not be read back or deleted"
        return "FAIL", detail, "replace the store's file system"
    return "ok", f"writes, reads, renames and deletes; {(time.perf_counter() - started) * 1000:.0f} ms"


def _artifacts(system: System) -> Outcome:
    aside = system.store.set_aside()
    found, count, size = [], 0, 0
    for file in system.store.files() if system.deep else ():
        is_own = named_keys(file.key) or fingerprint_of(file.key) or upload_of(file.key)
        if is_own and not file.is_set_aside and not file.key.endswith(SUFFIX):
            count, size = count + 1, size + file.size
            if (damage := system.store.damage(file.key)) is not None:
                found.append(f"{file.key}: {damage}")
    details = [f"{count:,} files with {size:,} bytes read"] if system.deep else []
    details += [f"{len(found)} are damaged: {'; '.join(found[:_LISTED])}"] if found else []
    details += [f"{len(aside)} set aside: {', '.join(file.key for file in aside[:_LISTED])}"] if aside else []
    detail = "; ".join(details) or "none was found damaged; --deep reads them all"
    return "FAIL" if found else "warning" if aside else "ok", detail, _REPAIR if found or aside else ""


def _disk(system: System) -> Outcome:
    places = {"temporary files (TMPDIR)": Path(tempfile.gettempdir())}
    if isinstance(system.store.fs, LocalFileSystem):
        places["store"] = Path(system.store.root)
    levels: list[Level] = []
    details, measurements = [], {}
    for name, path in places.items():
        usage = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
        share = usage.free / usage.total
        is_low = usage.free < 2 * _GIB or share < 0.05
        levels.append("FAIL" if usage.free < _GIB // 4 else "warning" if is_low else "ok")
        details.append(f"{name} {usage.free / _GIB:.1f} GiB free ({share:.0%})")
        if name == "store" and path.is_dir():
            measurements["artifacts_free_bytes"] = usage.free
    worst: Level = "FAIL" if "FAIL" in levels else "warning" if "warning" in levels else "ok"
    remedy = "free space, delete old jobs, or collect artifacts sooner (WINNOW_RETENTION__ARTIFACTS_DAYS)"
    return worst, "; ".join(details), "" if worst == "ok" else remedy, measurements


def _packages(_: System) -> Outcome:
    if problems := unsafe_packages():
        return "FAIL", "; ".join(problems), "correct this on every worker's host: workers do not start otherwise"
    return "ok", "none is known to run code named in a model's files"


def _models(system: System) -> Outcome:
    settings = system.settings.models
    if not (settings.folder.is_dir() and os.access(settings.folder, os.R_OK | os.X_OK)):
        return "FAIL", f"{settings.folder} is not a readable folder", _CORRECT_FOLDER
    found = registry.registered(settings)
    count = sum(model.problem is None for model in found)
    if not count and not settings.hub:
        detail = (
            f"none usable in {settings.folder}, and no hub model is allowed (WINNOW_MODELS__HUB): no job can be posted"
        )
        return "FAIL", detail, _CORRECT_FOLDER
    detail = f"{count} usable; allowed from the hub: {', '.join(settings.hub) or 'none'}"
    if broken := [f"{model.name} cannot be used: {model.problem}" for model in found if model.problem is not None]:
        return "warning", "; ".join([detail, *broken]), "correct these folders, or remove them"
    return "ok", detail


def _jobs(system: System) -> Outcome:
    jobs = system.jobs
    units = f"{jobs.running} units running, {jobs.pending} pending, {jobs.delayed} of them delayed after a failure"
    summary = f"{jobs.open} open; {units}"
    problems = []
    if jobs.expired:
        problems.append(f"{jobs.expired} expired leases have not been reclaimed: the API's sweep is not running")
    if jobs.overdue:
        problems.append(f"{jobs.overdue} cancellations are past their deadline")
    if jobs.still:
        problems.append(f"{len(jobs.still)} without progress for ten leases ({', '.join(jobs.still[:3])})")
    if problems:
        return "FAIL", "; ".join([summary, *problems]), "see the lines above; if they are all ok, restart the API"
    return "ok", summary


def _webhooks(system: System) -> Outcome:
    with Session(system.engine) as session:
        overdue = webhooks.overdue(session, seconds=_OVERDUE_SECONDS)
    if overdue:
        detail = f"{overdue} messages have been due for more than {_OVERDUE_SECONDS:g} seconds"
        return "warning", detail, "start the API; if it is running, search its log for `webhooks`"
    return "ok", "no message is overdue"


@dataclass(frozen=True, slots=True)
class Check:
    """`remedy` is for unexpected exceptions. `needs` names the checks without which this one is meaningless."""

    name: str
    examine: Callable[[System], Outcome]
    remedy: str
    needs: tuple[str, ...] = ()

    def run(self, system: System) -> CheckResult:
        try:
            return CheckResult(self.name, *self.examine(system))
        except Exception as error:  # any exception is the result
            message = str(error.orig if isinstance(error, DBAPIError) else error).strip().partition("\n")[0]
            for secret in system.secrets():
                message = message.replace(secret, "***")
            # A ValueError may quote a part of a malformed URL, and with it a part of a password.
            detail = type(error).__name__ + ("" if isinstance(error, ValueError) else f": {message}")
            return CheckResult(self.name, "FAIL", detail, self.remedy, error=type(error).__name__)


_REPAIR = (
    "test the store's disk and this host's memory; artifacts are made again by the next job that needs them, datasets"
    " (datasets/...) have to be uploaded again"
)
_COUNTED_ALONE = "until then each API process counts rates and shares for itself"
_CORRECT_FOLDER = "correct WINNOW_MODELS__FOLDER or its permissions"
_SEE_LOG = "check the server's log"
CHECKS = (
    Check("database", _database, "start it, or correct WINNOW_DATABASE__URL"),
    Check("migrations", _migrations, _SEE_LOG, ("database",)),
    Check("connections", _connections, _SEE_LOG, ("database", "migrations")),
    Check("leader", _leader, _SEE_LOG, ("database",)),
    Check("workers", _workers, _SEE_LOG, ("database", "migrations")),
    Check("broker", _broker, f"start it, or correct WINNOW_BROKER__URL; {_COUNTED_ALONE}"),
    Check("queue", _queue, _SEE_LOG, ("broker", "database", "migrations")),
    Check("store", _store, "correct WINNOW_ARTIFACTS__URL or its permissions, or free space"),
    Check("artifacts", _artifacts, "correct WINNOW_ARTIFACTS__URL or its permissions", ("store",)),
    Check("pair", _pair, _SEE_LOG, ("database", "migrations", "store")),
    Check("disk", _disk, "correct WINNOW_ARTIFACTS__URL"),
    Check("packages", _packages, "reinstall them"),
    Check("models", _models, _CORRECT_FOLDER),
    Check("jobs", _jobs, _SEE_LOG, ("database", "migrations")),
    Check("webhooks", _webhooks, _SEE_LOG, ("database", "migrations")),
)
