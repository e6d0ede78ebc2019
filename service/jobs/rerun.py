"""New jobs from earlier ones: retrying a failed job, and reproducing a succeeded one from its provenance."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service import ledger
from service.auth.principal import Principal
from service.datasets import imports
from service.datasets import repository as dataset_repository
from service.datasets import service as datasets
from service.datasets.tables import Dataset
from service.http.errors import Conflict, Unprocessable
from service.jobs.service import Draft, budget_of, new_job, ready, waiting
from service.ledger.state import JobStatus
from service.models import registry
from service.plan.parameters import JobParameters
from service.results import repository as results
from service.settings import ModelSettings

# What the provenance records of the model beyond the fields that identify it.
_DERIVED = frozenset({"fingerprint", "files", "chat_template", "tokenizer_fingerprint"})
_COPIED = ("request", "job_metadata", "name", "labels", "folded_name", "terms")


def retry(session: Session, principal: Principal, job_id: str, settings: ModelSettings) -> Draft:
    """Drafts a copy of a failed or cancelled job, including the model's commit. What it had computed is reused.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has not failed: `job_not_failed`.
        Unprocessable: its pool, target or model is gone, or the import of one has failed; `param` names it.
    """
    first = ledger.require_job(session, principal.tenant_id, job_id)
    if first.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise Conflict(
            f"Job {job_id} is {first.status}; only a failed or cancelled job can be retried.",
            code="job_not_failed",
        )
    pool = datasets.require(session, principal.tenant_id, first.pool_id, "pool")
    target = datasets.require(session, principal.tenant_id, first.target_id, "target")
    imports.refuse_failed(session, pool=pool, target=target)
    session.close()
    copied = {name: getattr(first, name) for name in ("model", "parameters", "budget", "reproduces", *_COPIED)}
    job = new_job(principal, pool, target, retry_of=first.id, **copied)
    _check_model(settings, job.model)
    if job.budget is None and pool.is_ready:  # a share of a pool whose import had not ended then
        job.budget = budget_of(first.request["budget"], pool)
    if not (pool.is_ready and target.is_ready):
        return waiting(job, pool, target, settings)
    return ready(job, pool, target, settings)


def reproduce(session: Session, principal: Principal, job_id: str, settings: ModelSettings) -> Draft:
    """Drafts a job that recomputes, from nothing but the data and the model, what the provenance of a succeeded job records.

    The job may be deleted. A deleted dataset is replaced by another with the same content.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has no provenance, since it has not succeeded: `job_not_succeeded`.
        Unprocessable: its pool, target or model is gone, or this version refuses its parameters; `param` names it.
    """
    first = ledger.require_job(session, principal.tenant_id, job_id, or_deleted=True)
    if first.status != JobStatus.SUCCEEDED:
        raise Conflict(
            f"Job {job_id} is {first.status}; only a succeeded job can be reproduced.",
            code="job_not_succeeded",
        )
    record = results.provenance(session, first.id).record
    pool, target = (_same_content(session, principal.tenant_id, record[name], name) for name in ("pool", "target"))
    session.close()
    model = {name: value for name, value in record["model"].items() if name not in _DERIVED}
    # On another device `auto` might be a different type.
    # Of a version that had no bound, none was exceeded.
    parameters = _validated({"max_unusable": 1.0, **record["parameters"], "dtype": record["dtype"]})
    copied = {name: getattr(first, name) for name in _COPIED}
    made = {"model": model, "parameters": parameters, "budget": record["budget"]}
    job = new_job(principal, pool, target, reproduces=first.id, **made, **copied)
    _check_model(settings, model)
    return ready(job, pool, target, settings)


def _same_content(session: Session, tenant_id: str, recorded: Mapping[str, Any], name: str) -> Dataset:
    """The recorded dataset, or the tenant's newest one with its content."""
    dataset = dataset_repository.live_kept(session, tenant_id, recorded["id"])
    dataset = dataset or dataset_repository.live_content_kept(session, tenant_id, recorded["fingerprint"])
    if dataset is None:
        raise Unprocessable(
            f"The {name} {recorded['id']} has been deleted, and you have no other dataset with the same content (fingerprint"
            f" {recorded['fingerprint']}); upload the same file once more.",
            param=name,
            code="dataset_not_found",
        )
    return dataset


def _validated(parameters: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return JobParameters.model_validate(parameters).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise Unprocessable(
            f"This version does not accept the recorded {param} ({first['msg']}); reproduce the job with the version that"
            " computed it.",
            param=param or None,
        ) from error


def _check_model(settings: ModelSettings, model: Mapping[str, Any]) -> None:
    """A hub model is pinned to its commit; whether a registered one is unchanged shows when its files are hashed."""
    names = {each["name"] for each in (model, model.get("base", model)) if each["kind"] == "registered"}
    if missing := names - {known.name for known in registry.registered(settings) if known.problem is None}:
        raise Unprocessable(f"The model {min(missing)!r} is no longer registered, or no longer usable.", param="model")
