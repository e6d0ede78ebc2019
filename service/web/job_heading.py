"""What stands above the pages of a finished job."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service import ledger
from service.ledger.tables import SelectionJob
from service.results.service import FinishedJob, finished_job


@dataclass(frozen=True, slots=True)
class Heading:
    job: SelectionJob
    finished: FinishedJob

    @property
    def title(self) -> str:
        return self.job.name or f"Job {self.job.id}"

    def values(self) -> dict[str, Any]:
        """For the template."""
        return {"job": self.job, "title": self.title}


def finished(session: Session, tenant_id: str, job_id: str, *, or_deleted: bool = False) -> Heading:
    """The tenant's job, which has succeeded.

    Raises:
        NotFound, Conflict: as `finished_job`.
    """
    found = finished_job(session, tenant_id, job_id, or_deleted=or_deleted)
    return Heading(ledger.require_job(session, tenant_id, job_id, or_deleted=or_deleted), found)
