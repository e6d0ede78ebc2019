"""What can be done with uploads in parts. Callers commit."""

from datetime import timedelta

from sqlalchemy.orm import Session

from service.auth import quotas
from service.auth.principal import Principal
from service.datasets import service as datasets
from service.datasets.tables import Upload
from service.datasets.uploads import repository
from service.datasets.uploads.schemas import UploadOut, UploadRequest
from service.http.errors import BadRequest, Conflict, NotFound, TooLarge
from service.ids import new_id
from service.settings import ApiSettings


def begin(session: Session, principal: Principal, settings: ApiSettings, asked: UploadRequest) -> tuple[Upload, bool]:
    """The upload of this content, and whether it is new: the same content of the same key again is the same upload.

    Raises:
        TooLarge: no upload may be so large.
        QuotaExceeded: the key may not store so much, or has too many uploads.
    """
    quotas.lock(session, principal.key_id, "uploads")
    found = repository.find_same(session, principal.key_id, asked.sha256, asked.bytes)
    if found is not None:
        return found, False
    limits = settings.uploads
    if asked.bytes > limits.max_bytes:
        raise TooLarge(
            f"The upload is larger than {limits.max_bytes:,} bytes; compress it with gzip or split it",
            code="upload_too_large",
        )
    most = quotas.limits_of(principal, settings.limits).open_uploads
    if most and repository.count(session, principal.key_id) >= most:
        raise quotas.QuotaExceeded(
            f"This key has {most:,} uploads in parts, which is its limit. Make datasets of them, or delete those that you do not"
            " need: GET /v1/uploads.",
            param="open_uploads",
            retry=False,
        )
    datasets.check_quota(session, principal, settings.limits, asked.bytes)
    upload = Upload(
        id=new_id("up"),
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        sha256=asked.sha256,
        bytes=asked.bytes,
        part_bytes=limits.part_bytes,
    )
    repository.add(session, upload)
    return upload, True


def find(session: Session, tenant_id: str, upload_id: str) -> Upload:
    """
    Raises:
        NotFound: the tenant has none with this id.
    """
    upload = repository.find(session, tenant_id, upload_id)
    if upload is None:
        raise not_found()
    return upload


def find_whole(session: Session, tenant_id: str, upload_id: str) -> Upload:
    """
    Raises:
        NotFound: the tenant has none with this id.
        Conflict: parts are missing.
    """
    upload = find(session, tenant_id, upload_id)
    if upload.received < parts(upload):
        raise Conflict(
            f"upload: {upload.received:,} of {parts(upload):,} parts have come; send part {upload.received} next.",
            param="upload",
            code="upload_incomplete",
            retry=False,
        )
    return upload


def in_use() -> Conflict:
    return Conflict(
        "upload: a dataset is being made of it by another request. Retry when that has ended; with the same Idempotency-Key you"
        " then get its answer.",
        param="upload",
        code="upload_in_use",
        headers={"Retry-After": "2"},
        retry=True,
    )


def remove(session: Session, upload: Upload) -> None:
    """Its parts are for `files.remove`, once that is committed.

    Raises:
        NotFound: it was removed meanwhile.
    """
    if not repository.remove(session, upload.id):
        raise not_found()


def require_next(upload: Upload, number: int) -> None:
    """
    Raises:
        Conflict: another part is the next one, or none.
    """
    if number != upload.received or number >= parts(upload):
        raise not_next(upload)


def not_next(upload: Upload) -> Conflict:
    left = f"part {upload.received} is the next" if upload.received < parts(upload) else "all parts have come"
    return Conflict(f"number: {left}.", param="number", code="part_not_next", retry=False)


def require_size(upload: Upload, number: int, size: int) -> None:
    """
    Raises:
        BadRequest: a part of this number has another size.
    """
    if size != (expected := part_size(upload, number)):
        raise BadRequest(
            f"Part {number} must have {expected:,} bytes; {size:,} came. Send it again.",
            param="number",
            code="part_size",
        )


def part_size(upload: Upload, number: int) -> int:
    return min(upload.part_bytes, upload.bytes - number * upload.part_bytes)


def parts(upload: Upload) -> int:
    return -(-upload.bytes // upload.part_bytes)


def not_found() -> NotFound:
    return NotFound("No such upload; see GET /v1/uploads.", code="upload_not_found")


def shown(upload: Upload, hours: float) -> UploadOut:
    """As the client sees it, where uploads are removed after so many hours; 0: never."""
    expires_at = upload.used_at + timedelta(hours=hours) if hours else None
    names = ("id", "bytes", "sha256", "part_bytes", "received", "rows_read", "created_at")
    return UploadOut(**{name: getattr(upload, name) for name in names}, parts=parts(upload), expires_at=expires_at)
