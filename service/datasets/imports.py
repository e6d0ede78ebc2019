"""Datasets that a worker imports from the hub: asked for, described, and filled when the rows are in the store."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from service import tasks
from service.auth import quotas
from service.auth.principal import Principal
from service.datasets import repository, storage
from service.datasets.import_schemas import HubSource, ImportFailure, ImportProgress, Origin
from service.datasets.schemas import DatasetOut
from service.datasets.service import check_stored_bytes
from service.datasets.tables import Dataset
from service.db.locks import advisory_lock
from service.http.errors import Unprocessable
from service.ids import new_id
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore
from service.tasks import Task, TaskClaim, TaskState

KIND = "import_dataset"


class ContentGone(Exception):
    """The rows that the import published are no longer in the store: another dataset with them was deleted just then."""


def create(
    session: Session, principal: Principal, settings: ApiSettings, source: HubSource, commit: str, name: str | None
) -> Dataset:
    """A dataset without rows, and the task that will fill it. Budgets and quota are those of now, as for an upload."""
    origin = {**source.model_dump(mode="json"), "commit": commit}
    dataset = Dataset(
        id=new_id("ds"),
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        name=name or ":".join(part for part in (source.id, source.config, source.split) if part),
        origin=origin,
    )
    repository.add(session, dataset)
    tasks.create(
        session,
        kind=KIND,
        subject=dataset.id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        input={
            "dataset_id": dataset.id,
            "hub": origin,
            "limits": settings.uploads.model_dump(mode="json"),
            "stored_bytes": quotas.limits_of(principal, settings.limits).stored_bytes,
        },
    )
    return dataset


def find(session: Session, principal: Principal, source: HubSource, commit: str) -> Dataset | None:
    """The key's newest dataset of the same source and commit whose import has not failed."""
    same = repository.of_origin(session, principal.key_id, {**source.model_dump(mode="json"), "commit": commit})
    return next((dataset for dataset in same if status_of(session, dataset) != "failed"), None)


def find_or_create(
    session: Session, principal: Principal, settings: ApiSettings, source: HubSource, commit: str, name: str | None
) -> Dataset:
    """What `find` finds, or a new one."""
    advisory_lock(session, f"imports/{principal.key_id}")
    found = find(session, principal, source, commit)
    return found or create(session, principal, settings, source, commit, name)


def status_of(session: Session, dataset: Dataset) -> str:
    """`ready`, `importing` or `failed`."""
    return "ready" if dataset.is_ready else _status(tasks.newest_of(session, KIND, [dataset.id]).get(dataset.id))


def refuse_failed(session: Session, **named: Dataset) -> None:
    """
    Raises:
        Unprocessable: the import of one of the datasets has failed; `param` is its name here.
    """
    waiting = [dataset.id for dataset in named.values() if not dataset.is_ready]
    found = tasks.newest_of(session, KIND, waiting) if waiting else {}
    for param, dataset in named.items():
        task = found.get(dataset.id)
        if not dataset.is_ready and _status(task) == "failed":
            why = "Its import was deleted." if task is None or task.error is None else task.error["detail"]
            raise Unprocessable(
                f"{param}: the dataset {dataset.id} could not be imported. {why}", param=param, code="dataset_failed"
            )


def describe(session: Session, datasets: Sequence[Dataset]) -> list[DatasetOut]:
    """As clients see them; one query more where any of them is not ready."""
    waiting = [dataset.id for dataset in datasets if not dataset.is_ready]
    found = tasks.newest_of(session, KIND, waiting) if waiting else {}
    return [_describe(dataset, found.get(dataset.id)) for dataset in datasets]


def _describe(dataset: Dataset, task: Task | None) -> DatasetOut:
    described = DatasetOut.model_validate(dataset)
    if dataset.origin is not None:
        described.hub = Origin.model_validate(dataset.origin)
    if not dataset.is_ready:
        described.status = _status(task)
        if described.status == "failed" and task is not None and task.error is not None:
            described.error = ImportFailure.model_validate(task.error)
        elif task is not None:
            described.progress = ImportProgress.model_validate(
                task.progress or {"rows": 0, "bytes": 0, "total_bytes": None}
            )
    return described


def _status(task: Task | None) -> Any:
    return "failed" if task is None or task.state is TaskState.FAILED else "importing"


def cancel(session: Session, dataset: Dataset) -> None:
    """Deletes the task of a dataset that is not ready: its worker finds it gone."""
    if (task := tasks.newest_of(session, KIND, [dataset.id]).get(dataset.id)) is not None:
        tasks.delete(session, task.id)


def finish(session: Session, store: ArtifactStore, claim: TaskClaim, result: Mapping[str, Any]) -> None:
    """Fills the dataset with what the task's process has published.

    Raises:
        QuotaExceeded: the key may not store so much.
        ContentGone: the rows are no longer in the store; another attempt publishes them again.
    """
    fingerprint = result["fingerprint"]
    size = result["byte_count"] + result["skipped_bytes"]
    check_stored_bytes(session, claim.key_id, claim.input["stored_bytes"], size)
    # From here on nothing removes the files: until now the fingerprint was no dataset's.
    advisory_lock(session, repository.content_lock(fingerprint))
    keys = [storage.rows_key(fingerprint), storage.ids_key(fingerprint)]
    keys += [storage.skipped_key(fingerprint, claim.subject)] if result["skipped"] else []
    if not all(store.exists(key) for key in keys):
        raise ContentGone(f"The rows of {claim.subject} were removed from the store before it was ready.")
    dataset = session.get_one(Dataset, claim.subject)
    dataset.fingerprint, dataset.row_count = fingerprint, result["row_count"]
    dataset.byte_count, dataset.sources = result["byte_count"], result["sources"]
    dataset.detected, dataset.skipped = result["detected"], result["skipped"]
    dataset.skipped_bytes = result["skipped_bytes"]
    dataset.origin = {**(dataset.origin or {}), "read": result["read"]}
