"""What can be done with datasets. Callers commit; files follow rows in such an order that a live dataset has its files."""

from collections.abc import Generator, Iterable
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from service.auth import quotas
from service.auth.principal import Principal
from service.datasets import repository, storage
from service.datasets.storage import Content, Sample
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.db.locks import advisory_lock
from service.http.errors import Conflict, NotFound, Unprocessable
from service.ids import new_id
from service.settings import LimitSettings
from service.storage.artifacts import ArtifactStore


def register(
    session: Session, store: ArtifactStore, principal: Principal, limits: LimitSettings, name: str, content: Content
) -> Dataset:
    """Publishes converted content and makes it a dataset of the tenant.

    Raises:
        TooManyRequests: the key may not store so much; nothing was published.
    """
    skipped_bytes = content.report.stat().st_size if content.report else 0
    check_quota(session, principal, limits, content.byte_count + skipped_bytes)
    advisory_lock(session, repository.content_lock(content.fingerprint))
    dataset_id = new_id("ds")
    storage.publish(store, content, dataset_id)
    dataset = Dataset(
        id=dataset_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        name=name,
        fingerprint=content.fingerprint,
        row_count=content.row_count,
        byte_count=content.byte_count,
        sources=content.sources,
        detected=content.detected,
        skipped=content.skipped,
        skipped_bytes=skipped_bytes,
    )
    repository.add(session, dataset)
    return dataset


def check_quota(session: Session, principal: Principal, settings: LimitSettings, adding: int) -> None:
    """Whether the key may store so many bytes more; until the transaction ends no other one of the key may store any.

    Raises:
        QuotaExceeded: it may not before something is deleted.
    """
    check_stored_bytes(session, principal.key_id, quotas.limits_of(principal, settings).stored_bytes, adding)


def check_stored_bytes(session: Session, key_id: str, limit: int, adding: int) -> None:
    """The same under a limit that is known; 0: none."""
    if not limit:
        return
    quotas.lock(session, key_id, "bytes")
    used = repository.stored_bytes(session, key_id)
    if used + adding > limit:
        raise quotas.QuotaExceeded(
            f"The datasets and uploads of this key have {used:,} bytes; {adding:,} more would exceed its limit of {limit:,}."
            " Delete datasets, or uploads in parts, that you no longer need.",
            param="stored_bytes",
            retry=False,
        )


def find(session: Session, tenant_id: str, dataset_id: str) -> Dataset:
    """The live dataset.

    Raises:
        NotFound: the tenant has none with this id.
    """
    dataset = repository.live(session, tenant_id, dataset_id)
    if dataset is None:
        raise _not_found()
    return dataset


def find_ready(session: Session, tenant_id: str, dataset_id: str) -> Dataset:
    """As `find`, and it has its rows.

    Raises:
        Conflict: its import has not ended, or has failed.
    """
    dataset = find(session, tenant_id, dataset_id)
    if not dataset.is_ready:
        raise Conflict(
            f"The dataset has no rows: its import has not ended, or has failed; see GET /v1/datasets/{dataset_id}.",
            code="dataset_not_ready",
        )
    return dataset


def require(session: Session, tenant_id: str, dataset_id: str, param: str) -> Dataset:
    """The live dataset that a job's field `param` names, whose import may not have ended; it cannot be deleted before the
    transaction ends.

    Raises:
        Unprocessable: the tenant has none with this id; the error names `param`.
    """
    dataset = repository.live_kept(session, tenant_id, dataset_id)
    if dataset is None:
        raise Unprocessable(
            f"{param}: no such dataset; upload one with POST /v1/datasets, or see GET /v1/datasets.",
            param=param,
            code="dataset_not_found",
        )
    return dataset


def rows(
    session: Session, store: ArtifactStore, tenant_id: str, dataset_id: str, start: int, limit: int
) -> tuple[list[Sample], bool]:
    """The rows from `start` on, and whether there are more.

    Raises:
        NotFound: the tenant has no live dataset of this id.
        Conflict: it has no rows yet.
    """
    dataset = find_ready(session, tenant_id, dataset_id)
    session.commit()  # no transaction is open while the store is read
    stop = min(start + limit, dataset.row_count)
    samples = storage.read_samples(store, dataset.fingerprint, range(start, stop)) if start < stop else []
    return samples, stop < dataset.row_count


def skipped(session: Session, store: ArtifactStore, tenant_id: str, dataset_id: str) -> Generator[bytes]:
    """The report of the rows that the upload had and the dataset has not, JSON lines in pieces; nothing where none was skipped.

    Raises:
        NotFound: the tenant has no live dataset of this id.
        Conflict: it has no rows yet.
    """
    dataset = find_ready(session, tenant_id, dataset_id)
    return storage.read_skipped(store, dataset.fingerprint, dataset.id) if dataset.skipped else _nothing()


def _nothing() -> Generator[bytes]:
    yield b""


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
            f"The selection job {job_id} still needs the dataset; cancel the job or wait until it ends.",
            code="dataset_in_use",
        )
    dataset.deleted_at = datetime.now(UTC)
    repository.delete_tasks_of(session, tenant_id, dataset.fingerprint)
    return dataset


def remove_unused_files(sessions: Sessions, store: ArtifactStore, fingerprint: str, dataset_id: str) -> None:
    """Removes the report of a deleted dataset, the rows unless a live dataset has the same, and the ids unless a job names
    samples by them."""
    keys = [storage.rows_key(fingerprint), storage.ids_key(fingerprint), storage.skipped_key(fingerprint, dataset_id)]
    with sessions.begin() as session:
        advisory_lock(session, repository.content_lock(fingerprint))
        for key in unused_files(session, fingerprint, keys):
            store.delete(key)


def unused_files(session: Session, fingerprint: str, keys: Iterable[str]) -> list[str]:
    """Those of the content's files that nothing refers to. Under the content's lock, nothing will until it is given back."""
    owners = {key: storage.dataset_of(key) for key in keys}
    live = repository.live_among(session, {owner for owner in owners.values() if owner is not None})
    used = {key for key, owner in owners.items() if owner in live}
    if repository.is_live_content(session, fingerprint):
        used |= {storage.rows_key(fingerprint), storage.ids_key(fingerprint)}
    elif repository.is_named_content(session, fingerprint):
        used.add(storage.ids_key(fingerprint))
    return [key for key in owners if key not in used]


def _not_found() -> NotFound:
    return NotFound("No such dataset; see GET /v1/datasets.", code="dataset_not_found")
