"""One pass over what is kept: expired jobs, artifacts that nothing needs, content that no dataset has, temporary files."""

import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from service.audit import service as audit
from service.datasets import repository as datasets
from service.datasets import storage
from service.datasets.service import unused_files
from service.datasets.uploads import files as upload_files
from service.datasets.uploads import repository as uploads
from service.db.engine import Sessions
from service.db.locks import try_advisory_lock
from service.idempotency import repository as idempotency
from service.jobs import repository as job_rows
from service.jobs import service as jobs
from service.ledger import workers
from service.ledger.store_identity import MARKER
from service.retention import repository
from service.retention.repository import InUse
from service.settings import RetentionSettings
from service.storage.artifacts import KEY_PATTERN, ArtifactStore, Stored
from service.storage.checksums import SUFFIX
from service.webhooks import repository as webhooks

log = logging.getLogger(__name__)

_DAY = 86_400
_YOUNG_SECONDS = 3_600  # never removed for lack of room: it was made for a job that runs, or did just now
_ORPHAN_SECONDS = _DAY
_DAMAGED_SECONDS = 30 * _DAY
_JOBS = 100  # looked up at a time
_BATCH = 32  # artifacts a transaction, at most 96 files; while it lasts, no job can be posted
_BATCH_SECONDS = 1.0

_ARTIFACT = re.compile(rf"(?P<stem>{KEY_PATTERN})(\.[.a-z]+)?")


@dataclass(slots=True)
class Tally:
    files: int = 0
    bytes: int = 0

    def add(self, file: Stored) -> None:
        self.files += 1
        self.bytes += file.size


@dataclass(slots=True)
class Collected:
    """What a pass removed, or would remove; `unknown` are files in the store that are not ours, and are left alone."""

    removed: dict[str, Tally] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    scratch: int = 0
    unknown: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class _Artifact:
    """An artifact with the files beside it, its result for one: they go together."""

    stem: str
    files: list[Stored] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.stem.partition("/")[0]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def modified(self) -> float:
        return max(file.modified for file in self.files)

    def is_in(self, in_use: InUse) -> bool:
        return self.stem in in_use.stems or self.kind in in_use.kinds


@dataclass(slots=True)
class _Listing:
    artifacts: dict[str, _Artifact] = field(default_factory=dict)
    contents: dict[str, list[Stored]] = field(default_factory=lambda: defaultdict(list))
    uploads: dict[str, list[Stored]] = field(default_factory=lambda: defaultdict(list))
    damaged: list[Stored] = field(default_factory=list)
    unknown: Tally = field(default_factory=Tally)


def collect(
    sessions: Sessions,
    store: ArtifactStore,
    retention: RetentionSettings,
    *,
    dry_run: bool = False,
    stopping: threading.Event | None = None,
) -> Collected:
    """Does one pass; with `dry_run` only says what it would remove. Ends soon once `stopping` is set, and may be repeated."""
    one = _Pass(sessions, store, retention, dry_run, stopping or threading.Event())
    for step in (one.jobs, one.uploads, one.workers, one.answers, one.files, one.scratch):
        if not one.is_stopping():
            step()
    return one.collected


class _Pass:
    def __init__(
        self,
        sessions: Sessions,
        store: ArtifactStore,
        retention: RetentionSettings,
        dry_run: bool,
        stopping: threading.Event,
    ) -> None:
        self._sessions = sessions
        self._store = store
        self._retention = retention
        self._dry_run = dry_run
        self.is_stopping: Callable[[], bool] = stopping.is_set
        self.collected = Collected()

    def jobs(self) -> None:
        days = self._retention.results_days
        if not days:
            return
        while not self.is_stopping():
            with self._sessions() as session:
                found = repository.expired_jobs(session, days=days, limit=None if self._dry_run else _JOBS)
            if not self._dry_run:
                self._delete(found)
            self.collected.jobs += [job_id for _, job_id in found]
            if self._dry_run or not found:
                return

    def _delete(self, found: Iterable[tuple[str, str]]) -> None:
        for tenant_id, job_id in found:
            with self._sessions.begin() as session:
                if jobs.delete(session, tenant_id, job_id):
                    audit.record_own(session, "system", tenant_id, "selection_job.deleted", job_id, reason="retention")
            log.info("deleted %s: it ended more than %g days ago", job_id, self._retention.results_days)

    def uploads(self) -> None:
        """Uploads in parts that were given up; with their rows their bytes leave the quotas of their keys."""
        hours = self._retention.uploads_hours
        while hours and not self.is_stopping():
            with self._sessions() as session:
                found = uploads.expired(session, hours, None if self._dry_run else _JOBS)
                self.collected.uploads += [upload.id for upload in found]
                if self._dry_run or not found:
                    return
                for upload in found:
                    uploads.remove(session, upload.id)
                    audit.record_own(
                        session, "system", upload.tenant_id, "upload.deleted", upload.id, reason="retention"
                    )
                session.commit()
            for upload in found:
                upload_files.remove(self._store, upload)
                log.info("deleted %s: nothing came for more than %g hours", upload.id, hours)

    def workers(self) -> None:
        with self._sessions.begin() as session:
            find = workers.silent_workers if self._dry_run else workers.delete_silent_workers
            self.collected.workers = find(session)

    def answers(self) -> None:
        """Old idempotent answers and webhook deliveries, which no client may count on any longer; and old samples of quotas."""
        if not self._dry_run:
            with self._sessions.begin() as session:
                idempotency.delete_old(session)
                webhooks.delete_old(session)
                job_rows.delete_old_samples(session)

    def scratch(self) -> None:
        if self._dry_run:
            self.collected.scratch = self._store.count_abandoned()
        else:
            self.collected.scratch = self._store.remove_abandoned()

    def files(self) -> None:
        listing = self._listing()
        self.collected.unknown = listing.unknown
        with self._sessions() as session:
            in_use = repository.in_use(session)
        chosen = list(_chosen(listing.artifacts.values(), in_use, self._retention))
        while chosen and not self.is_stopping():
            chosen = self._remove_artifacts(chosen)
        self._remove_files(file for file in listing.damaged if time.time() - file.modified > _DAMAGED_SECONDS)
        self._remove_parts(listing.uploads)
        for fingerprint, files in listing.contents.items():
            if self.is_stopping():
                return
            self._remove_content(fingerprint, files)

    def _listing(self) -> _Listing:
        """All files of the store by what they belong to; cut short where we stop."""
        listing = _Listing()
        for file in self._store.files():
            if self.is_stopping():
                break
            if file.key == MARKER:
                continue
            artifact = _ARTIFACT.fullmatch(file.key)
            if artifact is not None:
                stem = artifact["stem"]
                listing.artifacts.setdefault(stem, _Artifact(stem)).files.append(file)
            elif fingerprint := storage.fingerprint_of(file.key):
                listing.contents[fingerprint].append(file)
            elif upload := upload_files.upload_of(file.key):
                listing.uploads[upload].append(file)
            elif file.is_set_aside:
                listing.damaged.append(file)
            else:
                listing.unknown.add(file)
        return listing

    def _remove_artifacts(self, chosen: list[_Artifact]) -> list[_Artifact]:
        """Removes the first of them, such as are still not in use, in one short transaction. Returns the rest."""
        if self._dry_run:
            for file in (file for artifact in chosen for file in artifact.files):
                self._count(file)
            return []
        with self._sessions.begin() as session:
            repository.lock_artifacts(session)
            in_use = repository.in_use(session)
            deadline = time.monotonic() + _BATCH_SECONDS
            for done, artifact in enumerate(chosen[:_BATCH], 1):
                if not artifact.is_in(in_use):
                    self._remove(artifact)
                if time.monotonic() > deadline or self.is_stopping():
                    return chosen[done:]
        return chosen[_BATCH:]

    def _remove(self, artifact: _Artifact) -> None:
        # The result goes first: where it is, a unit is done, and what it names must be there.
        files = sorted(artifact.files, key=lambda file: not file.key.endswith(".json"))
        try:
            if any(self._store.modified(file.key) > artifact.modified for file in files):
                return  # used since it was listed
        except FileNotFoundError:
            return  # another pass was first
        self._remove_files(files)

    def _remove_files(self, files: Iterable[Stored]) -> None:
        for file in files:
            if not self._dry_run:
                try:
                    self._store.delete(file.key)
                except OSError as error:
                    log.warning("%s could not be removed (%s); the next pass tries again", file.key, error)
                    return
            self._count(file)

    def _count(self, file: Stored) -> None:
        self.collected.removed.setdefault(file.key.partition("/")[0], Tally()).add(file)

    def _remove_parts(self, found: Mapping[str, Sequence[Stored]]) -> None:
        """Removes parts that came when their upload had just gone, a day after."""
        with self._sessions() as session:
            existing = uploads.existing(session, found.keys())
        for upload, parts in found.items():
            if upload not in existing:
                self._remove_files(part for part in parts if time.time() - part.modified > _ORPHAN_SECONDS)

    def _remove_content(self, fingerprint: str, files: Sequence[Stored]) -> None:
        """Removes what no dataset and no job has, a day after it was written: what a crash left before its dataset was there."""
        old = [file for file in files if time.time() - file.modified > _ORPHAN_SECONDS]
        if not old:
            return
        with self._sessions.begin() as session:
            if try_advisory_lock(session, datasets.content_lock(fingerprint)):
                unused = unused_files(session, fingerprint, (file.key.removesuffix(SUFFIX) for file in old))
                self._remove_files(file for file in old if file.key.removesuffix(SUFFIX) in unused)


def _chosen(artifacts: Iterable[_Artifact], in_use: InUse, retention: RetentionSettings) -> Iterator[_Artifact]:
    """Those that are too old and, oldest first, as many more as bring the rest within the bound."""
    now = time.time()
    ordered = sorted(artifacts, key=lambda artifact: artifact.modified)
    excess = sum(artifact.size for artifact in ordered) - retention.artifacts_bytes if retention.artifacts_bytes else 0
    for artifact in ordered:
        age = now - artifact.modified
        is_old = retention.artifacts_days and age > retention.artifacts_days * _DAY
        is_too_much = excess > 0 and age > _YOUNG_SECONDS
        if (is_old or is_too_much) and not artifact.is_in(in_use):
            excess -= artifact.size
            yield artifact
