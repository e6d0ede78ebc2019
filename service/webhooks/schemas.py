"""Webhooks as the client sees them."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from service.names import Text


class Event(StrEnum):
    SUCCEEDED = "selection_job.succeeded"
    FAILED = "selection_job.failed"
    CANCELLED = "selection_job.cancelled"
    RUNNING = "selection_job.running"
    PHASE = "selection_job.phase"


TERMINAL_EVENTS = (Event.SUCCEEDED, Event.FAILED, Event.CANCELLED)


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


Url = Annotated[
    str,
    StringConstraints(max_length=2048),
    Field(
        description="https only, to public addresses; port 443 or from 1024", examples=["https://example.com/winnow"]
    ),
]
Events = Annotated[
    list[Event],
    Field(min_length=1, max_length=len(Event), description="`selection_job.phase`: a job's next stages start"),
]
Description = Annotated[Text, StringConstraints(max_length=500)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("events", check_fields=False)
    @classmethod
    def _once_each(cls, events: list[Event] | None) -> list[Event] | None:
        return None if events is None else list(dict.fromkeys(events))


class WebhookRequest(_Request):
    url: Url
    events: Events = Field(default_factory=lambda: list(TERMINAL_EVENTS))
    description: Description = ""


class WebhookChange(_Request):
    """Fields that are omitted or null are not changed."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = Field(default=None, description="Disabling fails pending messages; they can be replayed")


class WebhookOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    object: Literal["webhook"] = "webhook"
    id: str
    url: str
    description: str
    events: list[str]
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: str | None
    previous_secret_until: datetime | None = Field(
        description="Until then, messages are signed with the previous secret too"
    )
    created_at: datetime


class NewSecret(WebhookOut):
    secret: str = Field(description="`whsec_...`, for a Standard Webhooks library; shown only here")


class DeliveryOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str = Field(description="The header `webhook-id`, the same for every attempt")
    job_id: str | None = Field(description="None: a test")
    type: str
    state: DeliveryState
    attempts: int = Field(description="Since it was created or last replayed")
    next_attempt_at: datetime | None = Field(
        description="Time of the next attempt; during an attempt, the time when it is considered lost"
    )
    finished_at: datetime | None
    created_at: datetime


class Attempt(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    created_at: datetime
    status: int | None = Field(description="Status of the response; null: there was none")
    seconds: float
    error: str | None


class DeliveryDetail(DeliveryOut):
    payload: str = Field(description="The body as sent and signed")
    log: list[Attempt] = Field(description="Every attempt, oldest first")
