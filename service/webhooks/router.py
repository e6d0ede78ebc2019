"""`/v1/webhooks`: where a tenant is notified of its jobs, and what became of each message."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, status
from fastapi.responses import JSONResponse

from service.auth.authentication import ReadDep, SubmitDep
from service.db.engine import SessionDep
from service.http.errors import Conflict, Forbidden, NotFound, Unauthorized, Unprocessable, responses
from service.http.pagination import AfterDelivery, AfterWebhook, Limit, Page
from service.idempotency.service import IdempotentDep, UnansweredDep
from service.webhooks import repository, service
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
    body: WebhookRequest, request: Request, session: SessionDep, principal: SubmitDep, idempotent: UnansweredDep
) -> JSONResponse:
    """Messages and signatures follow Standard Webhooks (standardwebhooks.com). The response has the secret, shown only once."""
    state = request.app.state
    session.commit()  # no transaction is open while the name is looked up
    service.check_url(state.outbound, body.url)
    idempotent.begin(session)
    endpoint, secret = service.create(session, principal, body, state.encryptor)
    location = {"Location": f"/v1/webhooks/{endpoint.id}"}
    return idempotent.keep(session, _with_secret(endpoint, secret), status.HTTP_201_CREATED, location)


@router.get("", summary="List your webhooks, newest first", responses=responses(Unprocessable))
def list_webhooks(
    session: SessionDep, principal: ReadDep, limit: Limit = 20, after: AfterWebhook = None
) -> Page[WebhookOut]:
    endpoints, has_more = repository.page(session, principal.tenant_id, after=after, limit=limit)
    return Page.of([WebhookOut.model_validate(endpoint) for endpoint in endpoints], has_more)


@router.get("/{webhook_id}", summary="One webhook", responses=responses(NotFound))
def get_webhook(webhook_id: str, session: SessionDep, principal: ReadDep) -> WebhookOut:
    return WebhookOut.model_validate(service.find(session, principal.tenant_id, webhook_id))


@router.patch("/{webhook_id}", summary="Change a webhook", responses=responses(NotFound, Unprocessable))
def change_webhook(
    webhook_id: str, body: WebhookChange, request: Request, session: SessionDep, principal: SubmitDep
) -> WebhookOut:
    service.find(session, principal.tenant_id, webhook_id)
    if body.url is not None:
        session.commit()  # no transaction is open while the name is looked up
        service.check_url(request.app.state.outbound, body.url)
    endpoint = service.change(session, principal, webhook_id, body)
    return WebhookOut.model_validate(endpoint)


@router.delete(
    "/{webhook_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a webhook",
    responses=responses(NotFound),
)
def delete_webhook(webhook_id: str, session: SessionDep, principal: SubmitDep) -> None:
    """Messages that are not yet delivered will not be."""
    service.delete(session, principal, webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret",
    summary="Rotate the secret of a webhook",
    response_model=NewSecret,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def rotate_secret(
    webhook_id: str, request: Request, session: SessionDep, principal: SubmitDep, idempotent: IdempotentDep
) -> JSONResponse:
    """For 24 hours messages are signed with the previous secret as well."""
    endpoint, secret = service.rotate(session, principal, webhook_id, request.app.state.encryptor)
    return idempotent.keep(session, _with_secret(endpoint, secret), status.HTTP_200_OK)


@router.post(
    "/{webhook_id}/test",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Send a test message",
    response_model=DeliveryOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def test_webhook(webhook_id: str, session: SessionDep, principal: SubmitDep, idempotent: IdempotentDep) -> JSONResponse:
    """Its type is `webhook.test`, whatever the webhook's events; see its delivery for the outcome."""
    delivery = service.test(session, principal, webhook_id)
    return idempotent.keep(session, DeliveryOut.model_validate(delivery), status.HTTP_202_ACCEPTED)


@router.get(
    "/{webhook_id}/deliveries",
    summary="List the messages of a webhook, newest first",
    responses=responses(NotFound, Unprocessable),
)
def list_deliveries(
    webhook_id: str,
    session: SessionDep,
    principal: ReadDep,
    limit: Limit = 20,
    after: AfterDelivery = None,
    state: Annotated[DeliveryState | None, Query(description="Only those in this state")] = None,
) -> Page[DeliveryOut]:
    """Messages are kept for 30 days after they were delivered or have failed."""
    deliveries, has_more = service.deliveries(
        session, principal.tenant_id, webhook_id, after=after, state=state, limit=limit
    )
    return Page.of([DeliveryOut.model_validate(delivery) for delivery in deliveries], has_more)


@router.get(
    "/{webhook_id}/deliveries/{delivery_id}",
    summary="Get a message: its body, and every delivery attempt",
    responses=responses(NotFound),
)
def get_delivery(webhook_id: str, delivery_id: str, session: SessionDep, principal: ReadDep) -> DeliveryDetail:
    delivery, attempts = service.delivery(session, principal.tenant_id, webhook_id, delivery_id)
    log = [Attempt.model_validate(attempt) for attempt in attempts]
    return DeliveryDetail(**DeliveryOut.model_validate(delivery).model_dump(), payload=delivery.payload, log=log)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/replay",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Replay a message",
    response_model=DeliveryOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def replay(
    webhook_id: str, delivery_id: str, session: SessionDep, principal: SubmitDep, idempotent: IdempotentDep
) -> JSONResponse:
    """Sends it now, with a full schedule of retries. It keeps its `webhook-id`, so that a receiver can recognise duplicates."""
    delivery = service.replay(session, principal, webhook_id, delivery_id)
    return idempotent.keep(session, DeliveryOut.model_validate(delivery), status.HTTP_202_ACCEPTED)


def _with_secret(endpoint: WebhookEndpoint, secret: str) -> NewSecret:
    return NewSecret(**WebhookOut.model_validate(endpoint).model_dump(), secret=secret)
