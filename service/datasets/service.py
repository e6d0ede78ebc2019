"""What can be done with datasets. Callers commit; files follow rows in such an order that a live dataset has its files."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from service.artifacts import ArtifactStore
from service.database import Sessions
from service.datasets import repository, storage
from service.datasets.storage import Content, Sample
from service.datasets.tables import Dataset
from service.errors import Conflict, NotFound, Unprocessable
from service.ids import new_id
from service.limits import quotas
from service.settings import LimitSettings
from service.tenants.caller import Caller


def register(
    session: Session, store: ArtifactStore, *, caller: Caller, limits: LimitSettings, name: str, content: Content
) -> Dataset:
    """Publishes converted content and makes it a dataset of the tenant.

    Raises:
        TooManyRequests: the key may not store so much; nothing was published.
    """
    quotas.check_stored(session, caller, limits, content.byte_count)
    repository.lock_content(session, content.fingerprint)
    storage.publish(store, content)
    dataset = Dataset(
        id=new_id("ds"),
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        name=name,
        fingerprint=content.fingerprint,
        row_count=content.row_count,
        byte_count=content.byte_count,
        sources=content.sources,
    )
    repository.add(session, dataset)
    return dataset


def find(session: Session, tenant_id: str, dataset_id: str) -> Dataset:
    """The live dataset.

    Raises:
        NotFound: the tenant has none of this id.
    """
    dataset = repository.live(session, tenant_id, dataset_id)
    if dataset is None:
        raise _not_found()
    return dataset


def require(session: Session, tenant_id: str, dataset_id: str, param: str) -> Dataset:
    """The live dataset that a job's field `param` names; it cannot be deleted before the transaction ends.

    Raises:
        Unprocessable: the tenant has none of this id; `param` is named.
    """
    dataset = repository.live_kept(session, tenant_id, dataset_id)
    if dataset is None:
        raise Unprocessable(
            f"{param}: there is no such dataset; upload one with POST /v1/datasets, or see GET /v1/datasets",
            param=param,
            code="dataset_not_found",
        )
    return dataset


def page(session: Session, tenant_id: str, after: str | None, limit: int) -> tuple[Sequence[Dataset], bool]:
    """A page of live datasets, newest first, and whether there are more."""
    found = repository.page(session, tenant_id, after, limit + 1)
    return found[:limit], len(found) > limit


def rows(
    session: Session, store: ArtifactStore, tenant_id: str, dataset_id: str, start: int, limit: int
) -> tuple[list[Sample], bool]:
    """The rows from `start` on, and whether there are more.

    Raises:
        NotFound: the tenant has no live dataset of this id.
    """
    dataset = find(session, tenant_id, dataset_id)
    stop = min(start + limit, dataset.row_count)
    samples = storage.read_samples(store, dataset.fingerprint, range(start, stop)) if start < stop else []
    return samples, stop < dataset.row_count


def delete(session: Session, tenant_id: str, dataset_id: str) -> Dataset:
    """Marks the dataset as deleted. Its files are for `remove_unused_files`, once that is committed.

    Raises:
        NotFound: the tenant has no live dataset of this id.
        Conflict: a job that is not finished needs it.
    """
    dataset = repository.live_to_delete(session, tenant_id, dataset_id)
    if dataset is None:
        raise _not_found()
    job_id = repository.unfinished_job_of(session, dataset.id)
    if job_id is not None:
        raise Conflict(
            f"The selection job {job_id} still needs the dataset; cancel the job or wait for its end",
            code="dataset_in_use",
        )
    dataset.deleted_at = datetime.now(UTC)
    return dataset


def remove_unused_files(sessions: Sessions, store: ArtifactStore, fingerprint: str) -> None:
    """Removes the rows of content that no live dataset has, and the ids where no job names samples by them either."""
    with sessions.begin() as session:
        repository.lock_content(session, fingerprint)
        for key in unused_files(session, fingerprint):
            store.delete(key)


def unused_files(session: Session, fingerprint: str) -> list[str]:
    """The keys of the content's files that nothing refers to. Under the content's lock, nothing will until it is given back."""
    if repository.is_live_content(session, fingerprint):
        return []
    if repository.is_named_content(session, fingerprint):
        return [storage.rows_key(fingerprint)]
    return [storage.rows_key(fingerprint), storage.ids_key(fingerprint)]


def _not_found() -> NotFound:
    return NotFound("There is no such dataset; see GET /v1/datasets", code="dataset_not_found")
