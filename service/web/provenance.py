"""`/jobs/{id}/provenance`: the audit record of a result, and whether what is stored is what it says."""

import json

from fastapi import APIRouter, Depends, Request, Response

from service.audit import service as audit
from service.auth.authentication import ReadDep
from service.db.engine import SessionDep
from service.results import repository, verification
from service.web.admission import logged_in
from service.web.job_heading import finished
from service.web.rendering import HEADERS, render

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_KNOWN = (
    *("request", "request_sha256", "selection_sha256", "pool", "target", "model", "budget", "seed", "max_length"),
    *("dtype", "device", "versions", "code", "landmarks", "units"),
)
"""What is shown; records of earlier versions may lack some."""


@router.get("/jobs/{job_id}/provenance")
def provenance_page(
    request: Request, job_id: str, session: SessionDep, principal: ReadDep, check: bool = False
) -> Response:
    """With `check` the server hashes what it has stored."""
    heading = finished(session, principal.tenant_id, job_id, or_deleted=True)
    is_deleted = heading.job.deleted_at is not None
    row = repository.provenance(session, job_id)
    verified = verification.verify(session, heading.finished) if check and not is_deleted else None
    audit.record(session, principal, "provenance.read", job_id)
    record = {**dict.fromkeys(_KNOWN), **row.record}
    return render(
        request,
        "provenance.html",
        **heading.values(),
        is_deleted=is_deleted,
        root=row.weights_root.hex(),
        created_at=row.created_at,
        record=record,
        units=record["units"] or [],
        reused=sum(unit["reused"] for unit in record["units"] or []),
        request_text=json.dumps(record["request"], indent=2, ensure_ascii=False),
        verified=verified,
    )


@router.get("/jobs/{job_id}/provenance.json")
def provenance_file(job_id: str, session: SessionDep, principal: ReadDep) -> Response:
    """The whole record, as the API answers it, to keep."""
    finished(session, principal.tenant_id, job_id, or_deleted=True)
    row = repository.provenance(session, job_id)
    audit.record(session, principal, "provenance.read", job_id)
    found = {"job_id": job_id, "created_at": row.created_at.isoformat(), "weights_root": row.weights_root.hex()}
    content = json.dumps({**found, "record": row.record}, indent=2, ensure_ascii=False)
    download = {"Content-Disposition": f'attachment; filename="{job_id}.provenance.json"'}
    return Response(content, media_type="application/json", headers={**HEADERS, **download})
