"""What a model makes of a page of rows: computed by a worker as a task, which keeps the answer for an hour.

Callers commit. A preview is found by what it depends on: the dataset's and the model's fingerprints, the page and the arguments.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from service import tasks
from service.auth.principal import Principal
from service.datasets import service as datasets
from service.datasets.storage import read_samples
from service.datasets.tables import Dataset
from service.db.locks import advisory_lock
from service.http.errors import ApiError, TooManyRequests, Unavailable, Unprocessable
from service.ledger.workers import recent_workers
from service.models import registry
from service.plan.parameters import Parameters, TemplateArguments
from service.previews import repository
from service.previews.repository import KIND
from service.previews.schemas import PendingRows, Rendered, RenderedBy, Row, RowPage
from service.settings import ModelSettings
from service.storage.artifacts import ArtifactStore
from service.tasks import Task, TaskState

RETRY_SECONDS = "2"
_KEPT_SECONDS = 3_600
KEPT, OPEN = 50, 8
"""Previews of a tenant that are kept, each of a few megabytes at most, and that wait."""
FAILED_FOR = timedelta(seconds=30)
"""A failure is the answer for so long; then the next request tries again."""
_USERS_FAULT = ("model_not_usable", "data_not_usable", "parameters_not_usable")
_ARGUMENTS: TypeAdapter[TemplateArguments] = TypeAdapter(TemplateArguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A page of rows, [start, stop), and how they are rendered. `model` is as it was named, `input` is the task's."""

    dataset_id: str
    fingerprint: str
    row_count: int
    start: int
    model: str
    subject: str
    input: dict[str, Any]


def arguments(
    reasoning: str | None, template_arguments: str | None, max_length: int | None, *, has_model: bool
) -> dict[str, Any]:
    """Those that are given, as of a job.

    Raises:
        Unprocessable: `param` names the one that is wrong, or that is of no use without a model.
    """
    given = {"reasoning": reasoning, "template_arguments": template_arguments, "max_length": max_length}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if found and not has_model:
        name = next(iter(found))
        raise Unprocessable(f"{name} says how a model renders the rows: name a model as well.", param=name)
    if template_arguments is not None:
        found["template_arguments"] = _template_arguments(template_arguments)
    return found


def _template_arguments(given: str) -> TemplateArguments:
    try:
        found = _ARGUMENTS.validate_json(given)
        return Parameters(method="random", template_arguments=found).template_arguments
    except ValidationError as error:
        first = error.errors()[0]
        raise Unprocessable(
            f"template_arguments must be a JSON object of strings, numbers, booleans and nulls: {first['msg']}.",
            param="template_arguments",
        ) from error


def wanted(
    settings: ModelSettings, dataset: Dataset, start: int, limit: int, model: str, arguments: Mapping[str, Any]
) -> Wanted:
    """Resolves the model, for which it may ask the hub: call it while no transaction is open.

    Raises:
        Unprocessable: there is no such model.
        Unavailable: the hub does not answer.
    """
    parameters = Parameters(method="random", **arguments)
    return wanted_by(settings, dataset, start, limit, registry.resolve(settings, model, parameters), parameters, model)


def wanted_by(
    settings: ModelSettings,
    dataset: Dataset,
    start: int,
    limit: int,
    resolved: Mapping[str, Any],
    parameters: Parameters,
    model: str,
) -> Wanted:
    """The same for a model that was resolved before, as that of a job. Its files are looked at, and no hub is asked.

    Raises:
        Unprocessable: its files cannot be read.
    """
    input = {
        "dataset": dataset.fingerprint,
        "start": start,
        "stop": min(start + limit, dataset.row_count),
        "model": registry.with_fingerprints(settings, resolved),
        "parameters": parameters.model_dump(mode="json", include={"reasoning", "template_arguments", "max_length"}),
    }
    digest = hashlib.sha256(json.dumps(input, sort_keys=True).encode()).hexdigest()
    return Wanted(
        dataset_id=dataset.id,
        fingerprint=dataset.fingerprint,
        row_count=dataset.row_count,
        start=start,
        model=model,
        subject=f"{dataset.fingerprint}/{digest}",
        input=input,
    )


def find_or_start(session: Session, principal: Principal, wanted: Wanted) -> Task:
    """The task that renders the page, or has done it.

    Raises:
        TooManyRequests: too many others of the tenant wait.
    """
    known = tasks.latest(session, principal.tenant_id, KIND, wanted.subject)
    if known is not None and not _is_stale(known):
        return known
    advisory_lock(session, f"previews/{principal.tenant_id}")
    if known is None and (other := tasks.latest(session, principal.tenant_id, KIND, wanted.subject)) is not None:
        return other
    if repository.open_count(session, principal.tenant_id) >= OPEN:
        raise TooManyRequests(
            f"{OPEN} other pages of rows are to be rendered already; ask again when they are.",
            code="too_many_previews",
            headers={"Retry-After": RETRY_SECONDS},
        )
    datasets.require(session, principal.tenant_id, wanted.dataset_id, "dataset_id")  # from here on it cannot be deleted
    repository.delete_all_but_newest(session, principal.tenant_id, KEPT - 1)
    return tasks.create(
        session,
        kind=KIND,
        subject=wanted.subject,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        input=wanted.input,
        urgent=True,
        kept_seconds=_KEPT_SECONDS,
    )


def _is_stale(task: Task) -> bool:
    return task.state == TaskState.FAILED and (
        task.finished_at is None or datetime.now(UTC) - task.finished_at > FAILED_FOR
    )


def page(store: ArtifactStore, wanted: Wanted, result: Mapping[str, Any]) -> RowPage:
    """The rows that a task has rendered, by its result: fewer than were asked for where the texts are long. Reads the store: call
    it while no transaction is open."""
    rendered = [Rendered.model_validate(made) for made in json.loads(result["rows"])]
    stop = wanted.start + len(rendered)
    samples = read_samples(store, wanted.fingerprint, range(wanted.start, stop))
    rows = [
        Row.model_validate(sample).model_copy(update={"rendered": made})
        for sample, made in zip(samples, rendered, strict=True)
    ]
    found = RowPage.of(rows, stop < wanted.row_count, "index")
    found.rendered_by = RenderedBy(name=wanted.model, **result["rendered_by"])
    return found


def failure(task: Task) -> ApiError:
    """What is told of a task that has failed."""
    error = task.error or {}
    if error["code"] in _USERS_FAULT:
        return Unprocessable(error["detail"], param="model", code=error["code"])
    return Unavailable(f"The rows could not be rendered ({error['code']}): {error['detail']}", code="preview_failed")


def pending(session: Session, task: Task, silent_seconds: float) -> PendingRows:
    """What the client is told meanwhile. `silent_seconds`: after which a worker is taken to be gone."""
    if task.state == TaskState.RUNNING:
        return PendingRows(status="running", detail="A worker renders the rows. Repeat the request.")
    alive = [worker for worker in recent_workers(session, silent_seconds=silent_seconds) if worker.is_alive]
    if not alive:
        detail = "No worker is running; the rows are rendered as soon as one is. Repeat the request then."
    elif all(worker.problems for worker in alive):
        problems = sorted({problem for worker in alive for problem in worker.problems})
        detail = f"No worker may be able to render the rows now. {' '.join(problems)}"
    else:
        detail = "The rows are rendered as soon as a worker is free. Repeat the request."
    if task.error is not None:
        detail += f" The last attempt failed: {task.error['detail']}"
    return PendingRows(status="pending", detail=detail)
