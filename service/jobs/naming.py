"""What people call a job: its name and its labels. Nothing that is computed depends on them, so they may change at any time.

Lists are filtered by `terms`: each label of a job, each character of its name, and each two that follow one another there. One
index has them all, whatever a list asks for at once; of the few jobs that it finds, the name itself is looked at.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Select
from sqlalchemy.orm import Session

from service import ledger
from service.audit import service as audit
from service.auth.principal import Principal
from service.http.errors import Unprocessable
from service.ledger.tables import SelectionJob
from service.names import Name

MAX_LABELS = 16

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,126}}[a-z0-9])?/)?{_WORD}"
_IS_KEY = re.compile(_KEY)

JobName = Annotated[Name, StringConstraints(min_length=1, max_length=200)]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^(?:{_WORD})?$")]


def _checked(labels: dict[str, Any]) -> dict[str, Any]:
    for key in labels:
        if _IS_KEY.fullmatch(key) is None:
            raise ValueError(
                f"{key[:80]!r} is no key: 1 to 63 letters, digits, '-', '_' and '.', the first and last a letter or digit;"
                " before that, if you like, lower-case letters, digits, '-' and '.', then '/'"
            )
    return labels


_SCHEMA = {
    "propertyNames": {"pattern": f"^{_KEY}$"},
    "maxProperties": MAX_LABELS,
    "examples": [{"team": "search", "example.org/sweep": "lr-3"}],
}
Labels = Annotated[
    dict[str, LabelValue], Field(max_length=MAX_LABELS, json_schema_extra=_SCHEMA), AfterValidator(_checked)
]
LabelChanges = Annotated[
    dict[str, LabelValue | None],
    Field(max_length=2 * MAX_LABELS, json_schema_extra={**_SCHEMA, "maxProperties": 2 * MAX_LABELS}),
    AfterValidator(_checked),
]

NameFilter = Annotated[
    Name | None,
    Query(
        min_length=1,
        max_length=200,
        description="Only jobs whose name contains this, in upper or lower case",
        examples=["gsm8k"],
    ),
]
LabelFilter = Annotated[
    list[Annotated[str, StringConstraints(pattern=rf"^{_KEY}:(?:{_WORD})?$")]] | None,
    Query(
        max_length=MAX_LABELS,
        description="Only jobs with this label, `key:value`; several: with all of them",
        examples=[["team:search"]],
    ),
]


class JobChange(BaseModel):
    """A merge patch (RFC 7396) of what people call the job: what is omitted stays as it is."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "lr 3e-4", "labels": {"old": None}}]}
    )

    name: JobName | None = Field(default=None, description="null: none any more")
    labels: LabelChanges = Field(
        default_factory=dict, description="Labels to set; null removes one. Those that are not named stay"
    )


def columns(tenant_id: str, name: str | None, labels: Mapping[str, str]) -> dict[str, Any]:
    """The columns of a job of that name and those labels."""
    folded = None if name is None else _folded(name)
    terms = {*(folded or ""), *_pairs(folded or ""), *(f"{key}:{value}" for key, value in labels.items())}
    return {"name": name, "labels": dict(labels), "folded_name": folded, "terms": _terms(tenant_id, terms) or None}


def _folded(name: str) -> str:
    """As names are compared: without regard to case, or to which of several equal characters stands there."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _pairs(folded: str) -> set[str]:
    return {folded[i : i + 2] for i in range(len(folded) - 1)}


def _terms(tenant_id: str, terms: set[str]) -> list[str]:
    """Each begins with a part of the tenant's id, so that no tenant's search goes through another's jobs."""
    return [tenant_id[-8:] + term for term in sorted(terms)]


def narrow(jobs: Select[SelectionJob], tenant_id: str, name: str | None, labels: Sequence[str]) -> Select[SelectionJob]:
    """Those of the tenant's jobs whose name contains `name` and that have all the `labels`, each `key:value`."""
    folded = "" if name is None else _folded(name)
    if terms := {*(_pairs(folded) or folded), *labels}:
        jobs = jobs.where(SelectionJob.terms.contains(_terms(tenant_id, terms)))
    return jobs.where(SelectionJob.folded_name.contains(folded, autoescape=True)) if folded else jobs


def change(session: Session, principal: Principal, job_id: str, asked: JobChange) -> SelectionJob:
    """The tenant's job, named as asked. Where that is how it is named already, nothing is written.

    Raises:
        NotFound: the tenant has no such job.
        Unprocessable: it would have too many labels.
    """
    ledger.require_job(session, principal.tenant_id, job_id)
    job = ledger.lock_job(session, job_id)
    if job.deleted_at is not None:
        ledger.require_job(session, principal.tenant_id, job_id)
    name = asked.name if "name" in asked.model_fields_set else job.name
    merged = {**job.labels, **asked.labels}
    labels = {key: value for key, value in merged.items() if value is not None}
    if len(labels) > MAX_LABELS:
        raise Unprocessable(
            f"The job would have {len(labels)} labels; at most {MAX_LABELS} are possible. Remove some with null.",
            param="labels",
        )
    detail: dict[str, Any] = {} if name == job.name else {"name": name}
    if changed := {key: value for key, value in asked.labels.items() if job.labels.get(key) != value}:
        detail["labels"] = changed
    if detail:
        for column, value in columns(principal.tenant_id, name, labels).items():
            setattr(job, column, value)
        audit.record(session, principal, "selection_job.changed", job.id, **detail)
    return job
