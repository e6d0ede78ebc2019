"""`/jobs/new`: a job's request as a form, made of its schema; its plan while it is filled; and data brought along."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.auth.authentication import SubmitDep
from service.auth.principal import Principal
from service.datasets import imports
from service.datasets import repository as datasets
from service.datasets.presets import PRESETS
from service.datasets.schemas import DatasetOut
from service.db.engine import SessionDep
from service.http.errors import ApiError, Unprocessable, field_error
from service.idempotency.service import IdempotentRequest, Replayed
from service.jobs import router as api
from service.jobs import service
from service.jobs.schemas import JobRequest, SelectionPlan
from service.models import registry
from service.web import schema_form
from service.web.admission import FormDep, logged_in
from service.web.rendering import address, render, see_other

router = APIRouter(prefix="/jobs/new", include_in_schema=False, dependencies=[Depends(logged_in)])

OWN = ("model", "pool", "target", "budget", "name", "labels", "metadata", "dry_run")
"""Fields of the request that the page has controls of its own for, or none."""
_DATASETS = 200
_PRESET = "preset:"
_FORM_ERROR_CODES = (400, 404, 409, 413, 422, 429)


@cache
def _fields() -> list[schema_form.Field]:
    return schema_form.fields(JobRequest.model_json_schema(), OWN)


@dataclass(slots=True)
class Filled:
    """A form as it was sent, and what is wrong with it: by field, "" is the form as a whole."""

    values: Mapping[str, str]
    errors: dict[str, str] = field(default_factory=dict)

    def request(self) -> JobRequest | None:
        """What it stands for; None: `errors` says why it is none."""
        missing = [name for name in ("model", "pool", "target", "budget") if not self.values.get(name, "").strip()]
        self.errors.update(dict.fromkeys(missing, "is needed"))
        if missing:
            return None
        sent: dict[str, Any] = schema_form.values(self.values, _fields())
        for name in ("model", "pool"):
            sent[name] = self.values.get(name, "").strip()
        target = self.values.get("target", "")
        sent["target"] = {"preset": target.removeprefix(_PRESET)} if target.startswith(_PRESET) else target
        sent["budget"] = _budget(self.values.get("budget", ""))
        sent["name"] = self.values.get("name", "").strip() or None
        sent["labels"] = _labels(self.values.get("labels", ""))
        try:
            return JobRequest.model_validate(sent)
        except ValidationError as error:
            for each in error.errors():
                found = field_error(each)
                self.refuse(found["param"], found["message"])
            return None

    def refuse(self, param: str | None, message: str) -> None:
        path = schema_form.error_path(param or "", _fields(), OWN)
        said = message if path or not param else f"{param}: {message}"
        self.errors[path] = f"{self.errors[path]}; {said}" if path in self.errors else said


def _budget(written: str) -> Any:
    """A count, a fraction, or so many percent."""
    text = written.strip().replace(",", "")
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return written


def _labels(written: str) -> Any:
    """Of `key:value, key:value`."""
    given = (each.strip().partition(":") for each in written.split(",") if each.strip())
    return {key.strip(): value.strip() for key, _, value in given}


@router.get("")
def new_job(request: Request, session: SessionDep, principal: SubmitDep) -> Response:
    """Filled with what the address says: a dataset that was just added, for one."""
    return _page(request, session, principal, Filled(dict(request.query_params)))


@router.post("")
def post_job(request: Request, session: SessionDep, principal: SubmitDep, form: FormDep) -> Response:
    """`do`: `post` it; without a script show its `plan`; look at the rows of the `pool` or `target` as its model sees them."""
    filled = Filled({name: str(value) for name, value in form.items()})
    if (role := filled.values.get("do", "")) in ("pool", "target"):
        return see_other(_rows_address(filled, role))
    if filled.values.get("do") == "plan":
        plan = _plan(request, session, principal, filled)
        return _page(request, session, principal, filled, plan)
    if (wanted := filled.request()) is not None:
        try:
            answer = api.submit_any(wanted, request, session, principal, _once(request, principal, wanted, filled))
            return see_other(_job_address(answer))
        except Replayed as replayed:
            return see_other(_job_address(replayed.response))
        except ApiError as error:
            if error.status not in _FORM_ERROR_CODES:
                raise
            session.rollback()
            filled.refuse(error.param, error.detail)
    return _page(request, session, principal, filled, status_code=422)


@router.post("/plan")
def plan_part(request: Request, session: SessionDep, principal: SubmitDep, form: FormDep) -> Response:
    """The plan of the form as it is now, for the page that is open."""
    filled = Filled({name: str(value) for name, value in form.items()})
    plan = _plan(request, session, principal, filled)
    return render(request, "plan.html", plan=plan, filled=filled)


def _plan(request: Request, session: Session, principal: Principal, filled: Filled) -> SelectionPlan | None:
    """None: `filled.errors` says why there is none."""
    wanted = filled.request()
    if wanted is None:
        return None
    state = request.app.state
    try:
        dry = wanted.model_copy(update={"dry_run": True})
        return service.describe_plan(service.draft(session, principal, dry, state.settings, state.store))
    except ApiError as error:
        if error.status not in _FORM_ERROR_CODES:
            raise
        session.rollback()
        filled.refuse(error.param, error.detail)
        return None


def _once(request: Request, principal: Principal, wanted: JobRequest, filled: Filled) -> IdempotentRequest:
    """The same form sent twice makes one job; one that was changed in between makes another."""
    digest = hashlib.sha256(wanted.model_dump_json().encode()).digest()
    key = hashlib.sha256(filled.values.get("once", "").encode() + digest).hexdigest()
    return IdempotentRequest(request.app.state.encryptor, principal, f"page-{key}", digest)


def _job_address(answer: Response) -> str:
    return answer.headers["Location"].replace("/v1/selection-jobs/", "/jobs/")


def _rows_address(filled: Filled, role: str) -> str:
    dataset = filled.values.get(role, "")
    if not datasets.is_id(dataset):
        raise Unprocessable(
            f"Choose a dataset as {role} first; a ready-made target has rows once it is imported.", param=role
        )
    given = {name: filled.values.get(name, "").strip() for name in ("model", "max_length", "reasoning")}
    return address(f"/datasets/{dataset}", **given)


def _page(
    request: Request,
    session: Session,
    principal: Principal,
    filled: Filled,
    plan: SelectionPlan | None = None,
    status_code: int = 200,
) -> Response:
    found, _ = datasets.page(session, principal.tenant_id, None, _DATASETS)
    described: list[DatasetOut] = imports.describe(session, found)
    session.commit()  # the models' folder is read
    settings = request.app.state.settings
    return render(
        request,
        "new_job.html",
        status_code=status_code,
        filled=filled,
        plan=plan,
        fields=_fields(),
        properties=JobRequest.model_json_schema()["properties"],
        datasets=[each for each in described if each.status != "failed"],
        presets=PRESETS.values() if settings.datasets.hub else (),
        models=registry.registered(settings.models),
        takes_hub=bool(settings.models.hub),
        imports_hub=bool(settings.datasets.hub),
        once=secrets.token_urlsafe(16),
    )
