"""`/v1/webhooks`: where a tenant is told of its jobs, and what became of each message."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, status
from fastapi.responses import JSONResponse

from service.database import SessionDep
from service.errors import Conflict, Forbidden, NotFound, Unauthorized, Unprocessable, responses
from service.idempotency.service import OnceDep
from service.pages import AfterDelivery, AfterWebhook, Limit, Page
from service.tenants.service import ReadDep, SubmitDep
from service.webhooks import service
from service.webhooks.schemas import (
    Attempt,
    DeliveryDetail,
    DeliveryOut,
    DeliveryState,
    NewSecret,
    WebhookChange,
    WebhookOut,
    WebhookRequest,
)
from service.webhooks.tables import WebhookEndpoint

router = APIRouter(prefix="/webhooks", tags=["webhooks"], responses=responses(Unauthorized, Forbidden))


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Create a webhook",
    response_model=NewSecret,
    responses=responses(Conflict, Unprocessable),
)
def create_webhook(
    body: WebhookRequest, request: Request, session: SessionDep, caller: SubmitDep, once: OnceDep
) -> JSONResponse:
    """Messages and signatures follow Standard Webhooks (standardwebhooks.com). The answer has the secret, once."""
    state = request.app.state
    endpoint, secret = service.create(session, caller, body, state.outbound, state.sealer)
    location = {"Location": f"/v1/webhooks/{endpoint.id}"}
    return once.keep(_with_secret(endpoint, secret), status.HTTP_201_CREATED, location)


@router.get("", summary="Your webhooks, newest first", responses=responses(Unprocessable))
def list_webhooks(
    session: SessionDep, caller: ReadDep, limit: Limit = 20, after: AfterWebhook = None
) -> Page[WebhookOut]:
    endpoints, has_more = service.page(session, caller.tenant_id, after=after, limit=limit)
    data = [WebhookOut.model_validate(endpoint) for endpoint in endpoints]
    return Page(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{webhook_id}", summary="One webhook", responses=responses(NotFound))
def get_webhook(webhook_id: str, session: SessionDep, caller: ReadDep) -> WebhookOut:
    return WebhookOut.model_validate(service.find(session, caller.tenant_id, webhook_id))


@router.patch("/{webhook_id}", summary="Change a webhook", responses=responses(NotFound, Unprocessable))
def change_webhook(
    webhook_id: str, body: WebhookChange, request: Request, session: SessionDep, caller: SubmitDep
) -> WebhookOut:
    endpoint = service.change(session, caller, webhook_id, body, request.app.state.outbound)
    return WebhookOut.model_validate(endpoint)


@router.delete(
    "/{webhook_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a webhook",
    responses=responses(NotFound),
)
def delete_webhook(webhook_id: str, session: SessionDep, caller: SubmitDep) -> None:
    """What has not been delivered will not be."""
    service.delete(session, caller, webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret",
    summary="Give a webhook a new secret",
    response_model=NewSecret,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def rotate_secret(
    webhook_id: str, request: Request, session: SessionDep, caller: SubmitDep, once: OnceDep
) -> JSONResponse:
    """For 24 hours messages are signed with the secret before it as well."""
    endpoint, secret = service.rotate(session, caller, webhook_id, request.app.state.sealer)
    return once.keep(_with_secret(endpoint, secret), status.HTTP_200_OK)


@router.post(
    "/{webhook_id}/test",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Send a test message",
    response_model=DeliveryOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def test_webhook(webhook_id: str, session: SessionDep, caller: SubmitDep, once: OnceDep) -> JSONResponse:
    """Of the type `webhook.test`, whatever the webhook's events are; its delivery tells what became of it."""
    delivery = service.test(session, caller, webhook_id)
    return once.keep(DeliveryOut.model_validate(delivery), status.HTTP_202_ACCEPTED)


@router.get(
    "/{webhook_id}/deliveries",
    summary="The messages of a webhook, newest first",
    responses=responses(NotFound, Unprocessable),
)
def list_deliveries(
    webhook_id: str,
    session: SessionDep,
    caller: ReadDep,
    limit: Limit = 20,
    after: AfterDelivery = None,
    state: Annotated[DeliveryState | None, Query(description="Only those in this state")] = None,
) -> Page[DeliveryOut]:
    """They are kept for 30 days after they were delivered or given up."""
    deliveries, has_more = service.deliveries(
        session, caller.tenant_id, webhook_id, after=after, state=state, limit=limit
    )
    data = [DeliveryOut.model_validate(delivery) for delivery in deliveries]
    return Page(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get(
    "/{webhook_id}/deliveries/{delivery_id}",
    summary="One message: its body, and every attempt to deliver it",
    responses=responses(NotFound),
)
def get_delivery(webhook_id: str, delivery_id: str, session: SessionDep, caller: ReadDep) -> DeliveryDetail:
    delivery, attempts = service.delivery(session, caller.tenant_id, webhook_id, delivery_id)
    log = [Attempt.model_validate(attempt) for attempt in attempts]
    return DeliveryDetail(**DeliveryOut.model_validate(delivery).model_dump(), payload=delivery.payload, log=log)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/replay",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Send a message again",
    response_model=DeliveryOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def replay(webhook_id: str, delivery_id: str, session: SessionDep, caller: SubmitDep, once: OnceDep) -> JSONResponse:
    """Now, and then as if for the first time. It keeps its `webhook-id`, by which a receiver knows what it has had."""
    delivery = service.replay(session, caller, webhook_id, delivery_id)
    return once.keep(DeliveryOut.model_validate(delivery), status.HTTP_202_ACCEPTED)


def _with_secret(endpoint: WebhookEndpoint, secret: str) -> NewSecret:
    return NewSecret(**WebhookOut.model_validate(endpoint).model_dump(), secret=secret)
