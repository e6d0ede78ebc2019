"""What this worker has proved of itself: that its artifact store is the service's, that its device is there, and that it has the
models of the jobs that it claims. What it lacks it leaves to other workers, until that is mended."""

import errno
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError

from service.db.engine import Sessions, is_away
from service.ledger import Lack, store_identity
from service.ledger.state import TERMINAL
from service.ledger.tables import SelectionJob, StoreIdentity
from service.models.configs import ADAPTER_CONFIG, CONFIG
from service.models.fingerprints import sampled_fingerprint, signature
from service.models.registry import registered_folder
from service.settings import ModelSettings
from service.storage.artifacts import ArtifactStore
from service.storage.tempdirs import temporary_directory
from worker.errors import ModelNotHere, NotHere, StoreNotHere

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)  # as full for every other worker: units say so


@dataclass(frozen=True, slots=True)
class _Found:
    """When a lack was found; of a job's also its model, and what the files of that were like then."""

    lack: Lack
    at: float
    files: tuple[object, ...] = ()
    model: Mapping[str, Any] | None = None


class Fitness:
    """Used by the supervisor's thread, and by one that proves again now and then what is lacking.

    Args:
        probe: starts a compute process and ends it; raises `DeviceNotHere` where it does not find its device.
        changed: called when something is lacking, or no longer.
    """

    def __init__(
        self,
        sessions: Sessions,
        store: ArtifactStore,
        models: ModelSettings,
        *,
        probe: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._sessions, self._store, self._models = sessions, store, models
        self._probe, self._changed = probe, changed
        self._identity: StoreIdentity | None = None
        self._is_proved = False
        self._proving = threading.RLock()
        self._found: tuple[_Found, ...] = ()

    @property
    def lacks(self) -> list[Lack]:
        return [found.lack for found in self._found]

    @property
    def problem(self) -> str | None:
        """Why the worker takes no work at all; None where it does."""
        return next((lack.problem for lack in self.lacks if lack.is_all), None)

    def report(self) -> list[dict[str, Any]]:
        """What is lacking, and for how many seconds already, as the worker's row holds it."""
        now = time.monotonic()
        return [
            {
                "problem": found.lack.problem,
                "seconds": round(now - found.at, 1),
                **({} if found.lack.model is None else {"model": dict(found.lack.model)}),
                **({} if found.lack.job_id is None else {"job_id": found.lack.job_id}),
            }
            for found in self._found
        ]

    def may_work(self) -> bool:
        """Whether a unit may be claimed. The first time everything is proved, later on that the store is still the service's."""
        with self._proving:
            if self.problem is not None:
                return False
            try:
                self.check_store() if self._is_proved else self._prove()
            except NotHere as error:
                self.lost(error)
            except DBAPIError as error:
                if not is_away(error):
                    raise
                log.warning("nothing is claimed: the database is unavailable (%s)", type(error).__name__)
                return False
            return self._identity is not None and self.problem is None

    def _prove(self) -> None:
        self.check_store()
        if self._identity is None:
            log.info("nothing is claimed: no API has run on this database yet")
            return
        self._check_writing()
        self._probe()
        self._is_proved = True

    def check_store(self) -> None:
        """
        Raises:
            StoreNotHere: the store is not the service's.
        """
        if self._identity is None:
            with self._sessions() as session:
                self._identity = store_identity.recorded(session)
        if self._identity is not None:
            try:
                store_identity.check(self._identity, self._store)
            except store_identity.OtherStore as error:
                log.error("%s: %s", self._store.url, error)
                raise StoreNotHere("A worker's artifact store is not the service's.") from error
            except OSError as error:
                log.error("%s: %s", self._store.url, error)
                raise StoreNotHere(f"A worker cannot read its artifact store ({type(error).__name__}).") from error

    def _check_writing(self) -> None:
        key = f"tmp/check-{uuid.uuid4().hex}"
        try:
            if self._store.is_local:  # there, what a killed process leaves is found and removed
                with temporary_directory(self._store.temporary_folder) as folder:
                    (folder / "check").write_text(key)
                return
            self._store.write_json(key, key)
            self._store.delete(key)
        except OSError as error:
            if error.errno in _FULL:
                return
            log.error("%s: %s", self._store.url, error)
            raise StoreNotHere(f"A worker cannot write to its artifact store ({type(error).__name__}).") from error

    def check(self, model: Mapping[str, Any]) -> None:
        """
        Raises:
            StoreNotHere: the store is not, or no longer, the service's.
            ModelNotHere: the job's model, or the base of its adapter, is not here, or other files are in its place.
        """
        self.check_store()
        for each in _registered(model):
            self._check_registered(each["name"], each.get("submitted_fingerprint"))

    def _check_registered(self, name: str, submitted: str | None) -> None:
        try:
            folder = registered_folder(self._models.folder, name)
            is_here = any((folder / config).is_file() for config in (CONFIG, ADAPTER_CONFIG))
            is_same = is_here and (submitted is None or sampled_fingerprint(folder) == submitted)
        except (OSError, ValueError) as error:
            log.error("the model %s: %s", name, error)
            raise ModelNotHere(f"A worker cannot read the model {name!r}.") from error
        if not is_here:
            raise ModelNotHere(f"A worker does not have the model {name!r}.")
        if not is_same:
            raise ModelNotHere(
                f"A worker has other files under the model's name {name!r} than when the job was posted."
            )

    def lost(self, error: NotHere) -> None:
        """From now on no work is taken."""
        self._add(_Found(Lack(problem=error.detail), time.monotonic()))

    def lost_model(self, error: NotHere, model: Mapping[str, Any]) -> None:
        """From now on the jobs of the model are left to others."""
        self._add(_Found(Lack(problem=error.detail, model=model), time.monotonic()))

    def lost_job(self, error: NotHere, job_id: str, model: Mapping[str, Any]) -> None:
        """From now on the job is left to others, until the model's files change again."""
        lack = Lack(problem=error.detail, job_id=job_id)
        self._add(_Found(lack, time.monotonic(), self._signature(model), model))

    def _add(self, found: _Found) -> None:
        lack = found.lack
        with self._proving:
            if lack in self.lacks:
                return
            self._found = (*self._found, found)
        whose = "no work is taken" if lack.is_all else f"{lack.job_id or lack.model} is left to others"
        log.critical("%s: %s", whose, lack.problem)
        self._changed()

    def _signature(self, model: Mapping[str, Any]) -> tuple[object, ...]:
        return tuple(signature(self._models.folder / each["name"]) for each in _registered(model))

    def prove_again(self) -> None:
        """Forgets what is no longer lacking."""
        with self._proving:
            try:
                mended = [found for found in self._found if not self._is_lacking(found)]
            except DBAPIError as error:
                if not is_away(error):
                    raise
                return
            for found in mended:
                log.warning("mended: %s", found.lack.problem)
            if mended:
                self._found = tuple(found for found in self._found if found not in mended)
                self._changed()

    def _is_lacking(self, found: _Found) -> bool:
        try:
            if found.lack.is_all:
                self._prove()
            elif found.lack.model is not None:
                self.check(found.lack.model)
            elif found.lack.job_id is not None and found.model is not None:
                return self._is_open(found.lack.job_id) and found.files == self._signature(found.model)
        except NotHere:
            return True
        return False

    def _is_open(self, job_id: str) -> bool:
        with self._sessions() as session:
            job = session.get(SelectionJob, job_id)
            return job is not None and job.status not in TERMINAL


def _registered(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of the model and the base of its adapter, those that are folders of this worker."""
    return [each for each in (model, model.get("base")) if each is not None and each["kind"] == "registered"]
