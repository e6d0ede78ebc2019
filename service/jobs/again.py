"""Jobs posted again: one that failed, as a new one; one that succeeded, computed anew from its provenance."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service import models
from service.artifacts import ArtifactStore
from service.datasets import repository as datasets
from service.datasets import service as dataset_service
from service.datasets.tables import Dataset
from service.errors import Conflict, NotFound, Unprocessable
from service.ids import new_id
from service.jobs import repository, service
from service.jobs.parameters import JobParameters
from service.jobs.state import JobStatus
from service.jobs.tables import SelectionJob
from service.results import repository as results
from service.settings import LimitSettings, ModelSettings
from service.tenants.caller import Caller

# What the record says of the model beyond what a job is made with.
_FOUND_OUT = frozenset({"fingerprint", "files", "chat_template", "tokenizer_fingerprint"})


def retry(
    session: Session, caller: Caller, job_id: str, settings: ModelSettings, limits: LimitSettings, store: ArtifactStore
) -> SelectionJob:
    """Posts a failed or cancelled job again, as it was, the model's commit included. What it had computed is found.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has not failed: `job_not_failed`.
        Unprocessable: its pool, target or model is gone; `param` names it.
        TooManyRequests: a quota of the caller's key does not allow it now.
    """
    first = service.require(session, caller.tenant_id, job_id)
    if first.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise Conflict(
            f"Job {job_id} is {first.status}; only one that failed or was cancelled can be posted again.",
            code="job_not_failed",
        )
    pool = dataset_service.require(session, caller.tenant_id, first.pool_id, "pool")
    target = dataset_service.require(session, caller.tenant_id, first.target_id, "target")
    job = _copy(caller, first, pool, target, model=first.model, parameters=first.parameters, budget=first.budget)
    job.retry_of, job.reproduces = first.id, first.reproduces
    _check_model(settings, job.model)
    return service.start(session, caller, job, pool, target, settings, limits, store)


def reproduce(
    session: Session, caller: Caller, job_id: str, settings: ModelSettings, limits: LimitSettings, store: ArtifactStore
) -> SelectionJob:
    """Posts a job that computes anew, from nothing but the data and the model, what the provenance of a succeeded one tells of.

    A deleted job's too. For a deleted dataset another one with the same content is taken.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has no provenance, since it has not succeeded: `job_not_succeeded`.
        Unprocessable: its pool, target or model is gone, or this version refuses its parameters; `param` names what.
        TooManyRequests: a quota of the caller's key does not allow it now.
    """
    first = repository.get(session, caller.tenant_id, job_id, or_deleted=True)
    if first is None:
        raise NotFound(f"No selection job {job_id!r}.", param="job_id")
    if first.status != JobStatus.SUCCEEDED:
        raise Conflict(
            f"Job {job_id} is {first.status}; only a job that has succeeded can be reproduced.",
            code="job_not_succeeded",
        )
    record = results.provenance(session, first.id).record
    pool, target = (_same_content(session, caller.tenant_id, record[name], name) for name in ("pool", "target"))
    model = {name: value for name, value in record["model"].items() if name not in _FOUND_OUT}
    # On another device `auto` might be another type.
    parameters = _known({**record["parameters"], "dtype": record["dtype"]})
    job = _copy(caller, first, pool, target, model=model, parameters=parameters, budget=record["budget"])
    job.reproduces = first.id
    _check_model(settings, model)
    return service.start(session, caller, job, pool, target, settings, limits, store)


def _copy(
    caller: Caller,
    first: SelectionJob,
    pool: Dataset,
    target: Dataset,
    *,
    model: dict[str, Any],
    parameters: dict[str, Any],
    budget: int,
) -> SelectionJob:
    return SelectionJob(
        id=new_id("job"),
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        status=JobStatus.QUEUED,
        pool_id=pool.id,
        target_id=target.id,
        model=model,
        budget=budget,
        parameters=parameters,
        request=first.request,
        job_metadata=first.job_metadata,
    )


def _same_content(session: Session, tenant_id: str, recorded: Mapping[str, Any], name: str) -> Dataset:
    """The recorded dataset, or the tenant's newest one with its content."""
    dataset = datasets.live_kept(session, tenant_id, recorded["id"])
    dataset = dataset or datasets.live_content_kept(session, tenant_id, recorded["fingerprint"])
    if dataset is None:
        raise Unprocessable(
            f"The {name} {recorded['id']} has been deleted, and you have no dataset with its content (fingerprint"
            f" {recorded['fingerprint']}); upload the same file again.",
            param=name,
            code="dataset_not_found",
        )
    return dataset


def _known(parameters: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return JobParameters.model_validate(parameters).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise Unprocessable(
            f"This version does not know {param} as it was recorded ({first['msg']}); reproduce the job with the version that"
            " computed it.",
            param=param or None,
        ) from error


def _check_model(settings: ModelSettings, model: Mapping[str, Any]) -> None:
    """A model of the hub is at its commit; whether a registered one is still the same shows when its files are hashed."""
    names = {each["name"] for each in (model, model.get("base", model)) if each["kind"] == "registered"}
    if missing := names - {known.name for known in models.registered(settings)}:
        raise Unprocessable(f"The model {min(missing)!r} is not registered any more.", param="model")
