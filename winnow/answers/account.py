"""Registered models, keys, limits, webhooks and the audit log. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Any, Literal, TypeAlias

from winnow.answers.base import Answer
from winnow.answers.jobs import Stage


class RegisteredModel(Answer):
    """The object `RegisteredModel` of the API."""

    name: str
    model_type: str | None
    """null: unknown (a base model on the hub, or a model that cannot be used)"""
    blocks: int | None
    """Transformer blocks; null: as `model_type`"""
    base: str | None
    """The base model of this LoRA adapter: a name or a hub id"""
    optimizer_state: bool
    """Whether an optimiser state is registered with it"""
    problem: str | None
    """Why jobs cannot use the model; null: they can"""


Scope: TypeAlias = Literal["read", "submit", "admin"] | str


class KeyLimits(Answer):
    """The key's own limits; omitted ones use the service's defaults. 0: no limit."""

    requests_per_minute: int | None
    concurrent_jobs: int | None
    stored_bytes: int | None
    samples_per_day: int | None
    open_uploads: int | None


class NewKey(Answer):
    """The object `NewKey` of the API."""

    object: Literal["api_key"] | str
    id: str
    name: str
    prefix: str
    """The start of the key, to recognise it"""
    scopes: list[Scope]
    limits: KeyLimits
    created_at: datetime
    last_used_at: datetime | None
    """Within a minute"""
    expires_at: datetime | None
    revoked_at: datetime | None
    key: str
    """The key, shown only here"""


class Key(Answer):
    """A key without its secret part, which is not stored."""

    object: Literal["api_key"] | str
    id: str
    name: str
    prefix: str
    """The start of the key, to recognise it"""
    scopes: list[Scope]
    limits: KeyLimits
    created_at: datetime
    last_used_at: datetime | None
    """Within a minute"""
    expires_at: datetime | None
    revoked_at: datetime | None


class Used(Answer):
    """The object `Used` of the API."""

    used: int
    limit: int | None
    """null: none"""


class Usage(Answer):
    """The object `Usage` of the API."""

    object: Literal["usage"] | str
    key_id: str
    requests_per_minute: Used
    """In the last minute"""
    concurrent_jobs: Used
    """Jobs that have not ended"""
    stored_bytes: Used
    """Total size of the rows of its datasets, of the reports of those left out, and of its uploads in parts"""
    samples_per_day: Used
    """Rows of pool and target of its jobs of the last 24 hours"""
    open_uploads: Used
    """Uploads in parts of which no dataset was made yet"""


class AuditKey(Answer):
    """The API key that was used; never its secret part."""

    id: str
    prefix: str | None
    """The start of the key, after `wnw_`"""
    name: str | None


class AuditEntry(Answer):
    """The object `AuditEntryOut` of the API."""

    object: Literal["audit_entry"] | str
    id: int
    created_at: datetime
    actor: Literal["api", "cli", "system"] | str
    """`api`: the holder of the key; `cli`: an operator of the server; `system`: the server itself (retention)"""
    key: AuditKey | None
    """null unless the actor is `api`"""
    action: str
    object_id: str
    """The object of the action"""
    request_id: str | None
    """`X-Request-Id` of the request"""
    detail: dict[str, Any]


class NewSecret(Answer):
    """The object `NewSecret` of the API."""

    object: Literal["webhook"] | str
    id: str
    url: str
    description: str
    events: list[str]
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: str | None
    previous_secret_until: datetime | None
    """Until then, messages are signed with the previous secret too"""
    created_at: datetime
    secret: str
    """`whsec_...`, for a Standard Webhooks library; shown only here"""


class Webhook(Answer):
    """The object `WebhookOut` of the API."""

    object: Literal["webhook"] | str
    id: str
    url: str
    description: str
    events: list[str]
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: str | None
    previous_secret_until: datetime | None
    """Until then, messages are signed with the previous secret too"""
    created_at: datetime


DeliveryState: TypeAlias = Literal["pending", "delivered", "failed"] | str


class Delivery(Answer):
    """The object `DeliveryOut` of the API."""

    object: Literal["webhook_delivery"] | str
    id: str
    """The header `webhook-id`, the same for every attempt"""
    job_id: str | None
    """None: a test"""
    type: str
    state: DeliveryState
    attempts: int
    """Since it was created or last replayed"""
    next_attempt_at: datetime | None
    """Time of the next attempt; during an attempt, the time when it is considered lost"""
    finished_at: datetime | None
    created_at: datetime


class Attempt(Answer):
    """The object `Attempt` of the API."""

    created_at: datetime
    status: int | None
    """Status of the response; null: there was none"""
    seconds: float
    error: str | None


class DeliveryDetail(Answer):
    """The object `DeliveryDetail` of the API."""

    object: Literal["webhook_delivery"] | str
    id: str
    """The header `webhook-id`, the same for every attempt"""
    job_id: str | None
    """None: a test"""
    type: str
    state: DeliveryState
    attempts: int
    """Since it was created or last replayed"""
    next_attempt_at: datetime | None
    """Time of the next attempt; during an attempt, the time when it is considered lost"""
    finished_at: datetime | None
    created_at: datetime
    payload: str
    """The body as sent and signed"""
    log: list[Attempt]
    """Every attempt, oldest first"""


WorkerState: TypeAlias = Literal["busy", "idle", "unable", "silent"] | str


class WorkerUnit(Answer):
    """A unit of a job at work."""

    job_id: str
    stage: Stage
    shard: int
    attempt: int
    done: int
    """Samples, as of its last heartbeat"""
    total: int
    started_at: datetime


class WorkerTask(Answer):
    """What a worker does beside jobs."""

    kind: str
    subject: str
    """What it is for"""
    started_at: datetime


class Worker(Answer):
    """A worker; it serves all tenants. What it does for another tenant is not shown: it is `busy`, and that is all."""

    object: Literal["worker"] | str
    id: str
    """Host and process"""
    state: WorkerState
    """`unable`: it takes no work, `problems` say why; `silent`: no heartbeat for a lease, so it loses its unit"""
    version: str
    """Of what computes"""
    device: str | None
    """null: it has not started its compute process yet"""
    memory_bytes: int | None
    """Of the device"""
    matmul_rates: dict[str, float] | None
    """Operations a second that it measured, by dtype"""
    unit: WorkerUnit | None
    """Of your tenant's jobs; null: none"""
    task: WorkerTask | None
    """Of your tenant's; null: none"""
    problems: list[str]
    """What it lacks, for any work or for open jobs of yours"""
    started_at: datetime
    seen_at: datetime
    """Its last heartbeat"""
