"""Deliveries: events become messages that a Standard Webhooks library verifies, retried for a day, and never lost."""

import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from standardwebhooks import WebhookVerificationError
from support.ledger_world import unit, wait_until
from support.webhook_receiver import Receiver, answers, receiving, status
from support.webhooks import PATIENCE, WEBHOOKS, SlowOutbound, WebhookWorld, outbound_of, verified

from service import ledger
from service.app import create_app
from service.background.webhook_sender import AT_ONCE, SCHEDULE, Sender
from service.ids import new_id
from service.ledger.tables import SelectionJob
from service.plan.stages import Stage
from service.retention.service import collect
from service.settings import RetentionSettings
from service.storage.artifacts import ArtifactStore
from service.storage.encryption import Encryptor
from service.webhooks import repository
from service.webhooks.safe_http import Answer


def received(receiver: Receiver, count: int) -> list[Any]:
    wait_until(lambda: len(receiver.requests) >= count, PATIENCE, f"{count} requests")
    assert len(receiver.requests) == count
    return receiver.requests


def test_the_end_of_a_job_is_delivered_and_verified(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.sending():
        job_id = world.ledger.job()
        world.ledger.fail(world.ledger.claim(), retryable=False, code="broken_model")
        (request,) = received(world.receiver, 1)
        delivery = world.wait_for_attempts(webhook, request.headers["webhook-id"], 1)
    message = verified(webhook["secret"], request)
    assert message["type"] == "selection_job.failed"
    assert abs(datetime.now(UTC) - datetime.fromisoformat(message["timestamp"])) < timedelta(seconds=PATIENCE)
    error = message["data"].pop("error")
    assert (error["code"], error["detail"]) == ("broken_model", "It is broken_model.")
    unnamed = {"labels": {}, "metadata": {}}
    assert message["data"] == {"object": "selection_job", "id": job_id, "status": "failed", **unnamed}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("winnow")
    assert delivery["payload"].encode() == request.body
    assert (delivery["state"], delivery["attempts"], delivery["job_id"]) == ("delivered", 1, job_id)
    assert (delivery["type"], delivery["next_attempt_at"]) == ("selection_job.failed", None)
    assert (delivery["log"][0]["status"], delivery["log"][0]["error"]) == (204, None)


def test_a_message_has_what_the_job_is_called_then(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.sending():
        job_id = world.ledger.job()
        with world.ledger.sessions.begin() as session:
            job = session.get_one(SelectionJob, job_id)
            job.name, job.labels = "Größe", {"team": "search"}
        world.ledger.fail(world.ledger.claim(), retryable=False)
        (request,) = received(world.receiver, 1)
    data = verified(webhook["secret"], request)["data"]
    assert (data["name"], data["labels"]) == ("Größe", {"team": "search"})


def test_a_changed_message_a_wrong_secret_and_an_old_timestamp_are_not_verified(world: WebhookWorld) -> None:
    webhook, other = world.create(), world.create()
    with world.sending():
        world.test(webhook)
        (request,) = received(world.receiver, 1)
    verified(webhook["secret"], request)
    body, headers = request.body, request.headers
    old = str(int(headers["webhook-timestamp"]) - 1)
    for secret, changed in (
        (webhook["secret"], {"body": body + b" "}),
        (webhook["secret"], {"headers": {**headers, "webhook-id": new_id("msg")}}),
        (webhook["secret"], {"headers": {**headers, "webhook-timestamp": old}}),
        (other["secret"], {}),
    ):
        with pytest.raises(WebhookVerificationError):
            verified(secret, type(request)(**{"path": "/", "body": body, "headers": headers, **changed}))


def test_each_webhook_gets_its_events_and_no_others(world: WebhookWorld) -> None:
    ends, all_of_it = world.create(), world.create(events=["selection_job.running", "selection_job.phase"])
    publish = unit(Stage.VALIDATE)
    job_id = world.ledger.job()
    world.ledger.finish(world.ledger.claim(), then=[publish])
    world.ledger.finish(world.ledger.claim())
    cancelled = world.ledger.job()
    world.ledger.cancel(cancelled)
    sent = [(d["type"], d["job_id"]) for d in reversed(world.deliveries(ends))]
    assert sent == [("selection_job.succeeded", job_id), ("selection_job.cancelled", cancelled)]
    sent = [(d["type"], d["job_id"]) for d in reversed(world.deliveries(all_of_it))]
    assert sent == [("selection_job.running", job_id), ("selection_job.phase", job_id)]
    (phase, running) = (world.delivery(all_of_it, d["id"]) for d in world.deliveries(all_of_it))
    assert json.loads(phase["payload"])["data"]["stages"]
    assert json.loads(running["payload"])["data"]["status"] == "running"


def test_an_event_that_is_rolled_back_is_not_delivered(world: WebhookWorld) -> None:
    webhook = world.create()
    job_id = world.ledger.job()
    with world.ledger.sessions() as session:
        ledger.add_event(session, job_id, "job.succeeded")
        session.flush()
        written = session.scalar(text("SELECT count(*) FROM webhook_deliveries"))
        session.rollback()
    assert written == 1
    assert world.deliveries(webhook) == []


def test_neither_a_disabled_nor_a_deleted_nor_another_tenants_webhook_gets_an_event(world: WebhookWorld) -> None:
    disabled, deleted = world.create(), world.create()
    theirs = world.other.post(WEBHOOKS, json={"url": world.receiver.url}).json()
    world.client.patch(f"{WEBHOOKS}/{disabled['id']}", json={"enabled": False})
    world.client.delete(f"{WEBHOOKS}/{deleted['id']}")
    world.ledger.cancel(world.ledger.job())
    with world.ledger.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM webhook_deliveries")) == 0
    world.client.patch(f"{WEBHOOKS}/{disabled['id']}", json={"enabled": True})
    world.ledger.cancel(world.ledger.job())
    assert [d["type"] for d in world.deliveries(disabled)] == ["selection_job.cancelled"]
    assert world.other.get(f"{WEBHOOKS}/{theirs['id']}/deliveries").json()["data"] == []


def test_it_is_retried_by_the_schedule_with_the_same_message_and_then_fails(world: WebhookWorld) -> None:
    webhook = world.create()
    world.receiver.answer = status(500)
    with world.sending():
        delivery_id = world.test(webhook)
        for attempt, pause in enumerate(SCHEDULE, 1):
            delivery = world.wait_for_attempts(webhook, delivery_id, attempt)
            assert (delivery["state"], delivery["attempts"]) == ("pending", attempt)
            assert 0.89 * pause < world.seconds_until_due(delivery_id) < 1.11 * pause + 5
            world.make_due(delivery_id)
        delivery = world.wait_for_attempts(webhook, delivery_id, len(SCHEDULE) + 1)
    assert (delivery["state"], delivery["next_attempt_at"]) == ("failed", None)
    (outcome,) = {(a["status"], a["error"]) for a in delivery["log"]}
    assert outcome == (500, "answered 500; only 2xx is taken for delivered")
    requests = received(world.receiver, len(SCHEDULE) + 1)
    assert len({request.body for request in requests}) == 1, "the same bytes"
    assert {request.headers["webhook-id"] for request in requests} == {delivery_id}
    assert 23 * 3600 < sum(SCHEDULE) < 25 * 3600


def test_what_fails_first_is_delivered_later(world: WebhookWorld) -> None:
    webhook = world.create()
    world.receiver.answer = answers(status(502), status(201))
    with world.sending():
        delivery_id = world.test(webhook)
        world.wait_for_attempts(webhook, delivery_id, 1)
        world.make_due(delivery_id)
        delivery = world.wait_for_attempts(webhook, delivery_id, 2)
    assert (delivery["state"], delivery["attempts"]) == ("delivered", 2)
    assert [a["status"] for a in delivery["log"]] == [502, 201]


@pytest.mark.parametrize(
    ("code", "asked", "low", "high"),
    [
        (503, "120", 119, 130),
        (429, "999999999999", 3590, 3610),
        (503, "1", 4, 10),
        (503, "-7", 4, 10),
        (500, "120", 4, 10),
        (503, "in a minute", 4, 10),
        (429, "date", 580, 610),
    ],
)
def test_retry_after_is_kept_to_within_bounds(
    world: WebhookWorld, code: int, asked: str, low: float, high: float
) -> None:
    if asked == "date":
        asked = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    webhook = world.create()
    world.receiver.answer = status(code, Retry_After=asked)
    with world.sending():
        delivery_id = world.test(webhook)
        world.wait_for_attempts(webhook, delivery_id, 1)
    assert low < world.seconds_until_due(delivery_id) < high


def test_a_redirect_is_a_failed_attempt_and_the_other_server_sees_nothing(world: WebhookWorld, tmp_path: Any) -> None:
    webhook = world.create()
    with receiving(tmp_path) as other, world.sending():
        world.receiver.answer = status(302, Location=other.url)
        delivery = world.wait_for_attempts(webhook, world.test(webhook), 1)
        assert other.connections == 0
    assert (delivery["state"], delivery["log"][0]["status"]) == ("pending", 302)
    assert delivery["log"][0]["error"] == "answered 302; redirects are not followed"


def test_410_disables_the_webhook_and_fails_what_waits(world: WebhookWorld) -> None:
    webhook = world.create()
    world.receiver.answer = answers(status(500), status(410))
    with world.sending():
        waiting = world.test(webhook)
        world.wait_for_attempts(webhook, waiting, 1)
        last = world.wait_for_attempts(webhook, world.test(webhook), 1)
    assert (last["state"], world.delivery(webhook, waiting)["state"]) == ("failed", "failed")
    found = world.client.get(f"{WEBHOOKS}/{webhook['id']}").json()
    assert (found["enabled"], found["disabled_reason"]) == (False, "it answered 410 Gone")
    refused = world.client.post(f"{WEBHOOKS}/{webhook['id']}/test")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_disabled")
    with world.ledger.engine.connect() as connection:
        entry = text("SELECT actor FROM audit_log WHERE action = 'webhook.disabled' AND object_id = :id")
        assert connection.scalar(entry, {"id": webhook["id"]}) == "system"


def test_an_event_written_while_its_webhook_is_disabled_does_not_wait_for_ever(world: WebhookWorld) -> None:
    webhook = world.create()
    delivery_id = world.test(webhook)
    with world.ledger.engine.begin() as connection:
        connection.execute(text("UPDATE webhook_endpoints SET disabled_at = now()"))
    with world.sending():
        wait_until(lambda: world.delivery(webhook, delivery_id)["state"] == "failed", PATIENCE, "it has failed")
    assert world.receiver.requests == []


def test_what_a_dead_process_had_claimed_is_sent_when_its_lease_has_ended(world: WebhookWorld) -> None:
    webhook = world.create()
    dead, other = world.test(webhook), world.test(webhook)
    with world.ledger.sessions.begin() as session:
        assert len(repository.claim(session, [dead], lease_seconds=3600)) == 1
        with world.ledger.sessions.begin() as beside:
            beside.execute(text("SET LOCAL lock_timeout = '2s'"))
            assert repository.claim(beside, [dead], lease_seconds=3600) == [], "who is claiming it is not waited for"
    with world.sending():
        world.wait_for_attempts(webhook, other, 1)
        assert world.delivery(webhook, dead)["log"] == [], "its lease holds"
        world.make_due(dead)
        delivery = world.wait_for_attempts(webhook, dead, 1)
    assert (delivery["state"], delivery["attempts"]) == ("delivered", 1)


def test_two_senders_send_each_message_once(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.sending(), world.sending():
        sent = {world.test(webhook) for _ in range(20)}
        wait_until(lambda: len(world.deliveries(webhook, state="delivered", limit=50)) == 20, PATIENCE, "all of them")
    assert sorted(r.headers["webhook-id"] for r in world.receiver.requests) == sorted(sent)


def test_no_transaction_is_open_during_a_request(world: WebhookWorld) -> None:
    webhook, seen = world.create(), []
    open_ones = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND state LIKE 'idle in transaction%'"
    )

    def look(handler: Any) -> None:
        # The sender looks for more meanwhile: a moment without one is enough, since one that held on would go on holding.
        with world.ledger.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            wait_until(lambda: connection.scalar(open_ones) == 0, 5, "no transaction is open")
        seen.append(True)
        status(204)(handler)

    world.receiver.answer = look
    with world.sending():
        world.wait_for_attempts(webhook, world.test(webhook), 1)
    assert seen == [True]


def test_slow_endpoints_hold_up_neither_another_endpoint_nor_another_tenant(world: WebhookWorld) -> None:
    outbound = SlowOutbound("slow")
    slow = [world.create(url=f"{world.receiver.url}&slow={i}") for i in range(6)]
    quick = world.other.post(WEBHOOKS, json={"url": world.receiver.url}).json()
    beside = world.create()
    for _ in range(5):
        world.test(slow[0])
    with world.sending(outbound):
        wait_until(lambda: outbound.hanging == 2, PATIENCE, "it has its places")
        mine = world.test(beside)
        wait_until(lambda: mine in outbound.sent, PATIENCE, "another endpoint's is sent")
        for webhook in slow[1:]:
            for _ in range(AT_ONCE // 4):
                world.test(webhook)
        wait_until(lambda: outbound.hanging == 8, PATIENCE, "the tenant has its places")
        theirs = world.other.post(f"{WEBHOOKS}/{quick['id']}/test").json()["id"]
        wait_until(lambda: theirs in outbound.sent, PATIENCE, "another tenant's is sent")
        assert outbound.hanging == 8
        outbound.go_on.set()


def test_a_fault_of_ours_is_no_loss(world: WebhookWorld, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def post(self, *_: Any) -> Answer:
            raise RuntimeError("broken")

    webhook = world.create()
    with world.sending(Broken()):
        delivery_id = world.test(webhook)
        wait_until(lambda: "was lost" in caplog.text, PATIENCE, "it is logged")
    delivery = world.delivery(webhook, delivery_id)
    assert (delivery["state"], delivery["log"]) == ("pending", [])
    world.make_due(delivery_id)
    with world.sending():
        world.wait_for_attempts(webhook, delivery_id, 1)


def test_a_sender_that_loses_the_database_resumes_when_it_is_back(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.sending():
        world.wait_for_attempts(webhook, world.test(webhook), 1)
        with world.ledger.engine.begin() as connection:
            listeners = "datname = current_database() AND pid <> pg_backend_pid() AND query LIKE 'LISTEN%'"
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {listeners}"))
        world.wait_for_attempts(webhook, world.test(webhook), 1)


def test_an_endpoint_that_came_to_lead_to_our_network_gets_nothing(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.sending(outbound_of(world, allowed_networks=())):
        delivery = world.wait_for_attempts(webhook, world.test(webhook), 1)
    assert delivery["log"][0]["error"] == "not sent: the URL resolves to an address that is not public"
    assert (delivery["state"], world.receiver.connections) == ("pending", 0)


def test_an_unreadable_secret_is_reported_and_a_new_one_helps(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.ledger.engine.begin() as connection:
        secret = {"s": Encryptor("another key").encrypt(b"x" * 32)}
        connection.execute(text("UPDATE webhook_endpoints SET sealed_secret = :s"), secret)
    with world.sending():
        delivery = world.wait_for_attempts(webhook, world.test(webhook), 1)
        assert "rotate it" in delivery["log"][0]["error"]
        secret = world.client.post(f"{WEBHOOKS}/{webhook['id']}/rotate-secret").json()["secret"]
        world.make_due(delivery["id"])
        world.wait_for_attempts(webhook, delivery["id"], 2)
    verified(secret, received(world.receiver, 1)[0])


def test_neither_secrets_nor_urls_nor_messages_are_logged(
    world: WebhookWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    webhook = world.create()
    world.receiver.answer = status(500)
    with world.sending():
        delivery = world.wait_for_attempts(webhook, world.test(webhook), 1)
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("service"))
    assert delivery["id"] in ours
    for hidden in (webhook["secret"], "secret-of-the-receiver", delivery["payload"]):
        assert hidden not in ours


def test_old_deliveries_are_deleted_with_their_log_and_no_others(world: WebhookWorld, tmp_path: Any) -> None:
    webhook = world.create()
    with world.sending():
        old, recent, waiting = (world.test(webhook) for _ in range(3))
        for delivery_id in (old, recent, waiting):
            world.wait_for_attempts(webhook, delivery_id, 1)
    with world.ledger.engine.begin() as connection:
        age = "UPDATE webhook_deliveries SET created_at = now() - interval '31 days'"
        connection.execute(text(f"{age}, finished_at = now() - interval '31 days' WHERE id = '{old}'"))
        connection.execute(
            text(f"{age}, state = 'pending', finished_at = NULL, next_attempt_at = now() WHERE id = '{waiting}'")
        )
        connection.execute(
            text("INSERT INTO idempotency_keys SELECT :t, 'old', '', 200, '{}', '', now() - interval '25 hours'"),
            {"t": world.ledger.owner["tenant_id"]},
        )
    collected = [world.ledger.sessions, ArtifactStore(str(tmp_path)), RetentionSettings()]
    collect(*collected, dry_run=True)
    assert len(world.deliveries(webhook)) == 3
    collect(*collected)
    assert {d["id"] for d in world.deliveries(webhook)} == {recent, waiting}
    with world.ledger.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM webhook_attempts")) == 2
        assert connection.scalar(text("SELECT count(*) FROM idempotency_keys WHERE key = 'old'")) == 0


def test_the_application_sends(world: WebhookWorld) -> None:
    webhook = world.create()
    with TestClient(create_app(world.app.state.settings), headers=world.client.headers) as client:
        world.wait_for_attempts(webhook, world.test(webhook), 1)
        figures = client.get("/metrics").text
    assert 'winnow_webhook_attempts_total{outcome="delivered"} 1.0' in figures


def test_a_sender_that_stops_lets_its_requests_end(world: WebhookWorld) -> None:
    webhook = world.create()
    outbound = SlowOutbound("hook")
    sender = Sender(world.app.state.settings, world.app.state.encryptor, outbound)  # type: ignore[arg-type]
    sender.start()
    delivery_id = world.test(webhook)
    wait_until(lambda: outbound.hanging == 1, PATIENCE, "it is under way")
    stopping = threading.Thread(target=sender.stop)
    stopping.start()
    outbound.go_on.set()
    stopping.join()
    assert len(world.delivery(webhook, delivery_id)["log"]) == 1
