"""`/v1/webhooks`: what can be created, changed, read and replayed, and by whom."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from standardwebhooks import Webhook, WebhookVerificationError
from support.ledger_world import at_once
from support.webhook_receiver import status
from support.webhooks import PATIENCE, WEBHOOKS, WebhookWorld, verified
from support.world import SECRET, serving

from service.auth.principal import Scope
from service.ids import new_id
from service.keys.service import create_key
from service.webhooks import repository
from winnow.client import Winnow

TERMINAL = ["selection_job.succeeded", "selection_job.failed", "selection_job.cancelled"]


def path(webhook: Any, *rest: str) -> str:
    return "/".join([WEBHOOKS, webhook["id"], *rest])


def stored(world: WebhookWorld, what: str = "*") -> Any:
    with world.ledger.engine.connect() as connection:
        return connection.execute(text(f"SELECT {what} FROM webhook_endpoints")).one()


def test_a_webhook_is_made_read_listed_changed_and_deleted(world: WebhookWorld) -> None:
    response = world.client.post(WEBHOOKS, json={"url": world.receiver.url, "description": "ours"})
    made = response.json()
    secret = made.pop("secret")
    assert (response.status_code, response.headers["location"]) == (201, path(made))
    assert (made["events"], made["description"], made["enabled"]) == (TERMINAL, "ours", True)
    assert secret.startswith("whsec_")
    assert len(Webhook(secret)._whsecret) == 32
    assert world.client.get(path(made)).json() == made
    assert world.client.get(WEBHOOKS).json()["data"] == [made]
    change = {"events": ["selection_job.phase", "selection_job.phase"], "url": world.receiver.url + "2"}
    changed = world.client.patch(path(made), json=change)
    assert changed.status_code == 200
    assert changed.json() == {**made, "events": ["selection_job.phase"], "url": world.receiver.url + "2"}
    assert world.client.get(path(made)).json() == changed.json()
    assert world.client.patch(path(made), json={"description": None}).json() == changed.json()
    assert world.client.delete(path(made)).status_code == 204
    assert world.client.get(path(made)).status_code == 404
    assert world.client.delete(path(made)).status_code == 404
    assert world.client.get(WEBHOOKS).json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "http://example.com/"}, "url"),
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/latest/meta-data/"}, "url"),
        ({"url": "https://[::ffff:127.0.0.1]/"}, "url"),
        ({"url": "https://0x7f000001/"}, "url"),
        ({"url": "https://nothing.invalid/"}, "url"),
        ({"url": 7}, "url"),
        ({"events": []}, "events"),
        ({"events": ["selection_job.exploded"]}, "events.0"),
        ({"description": "x" * 501}, "description"),
        ({"description": "\0"}, "description"),
        ({"secret": "whsec_mine"}, "secret"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_made_or_changed(world: WebhookWorld, fields: Any, param: str) -> None:
    refused = world.client.post(WEBHOOKS, json={"url": world.receiver.url, **fields})
    assert (refused.status_code, refused.json()["param"]) == (422, param), refused.text
    assert world.client.get(WEBHOOKS).json()["data"] == []
    made = world.create()
    refused = world.client.patch(path(made), json=fields)
    assert (refused.status_code, refused.json()["param"]) == (422, param), refused.text
    del made["secret"]
    assert world.client.get(path(made)).json() == made


def test_there_are_at_most_ten_of_a_tenant_even_at_once(world: WebhookWorld) -> None:
    for _ in range(8):
        world.create()
    body = {"url": world.receiver.url}
    answers = at_once([lambda: world.client.post(WEBHOOKS, json=body)] * 4)
    assert sorted(a.status_code for a in answers) == [201, 201, 409, 409]
    refused = next(a for a in answers if a.status_code == 409)
    assert (refused.json()["code"], refused.headers["x-should-retry"]) == ("too_many_webhooks", "false")
    assert world.other.post(WEBHOOKS, json=body).status_code == 201, "another tenant has its own ten"
    assert world.client.delete(path(world.client.get(WEBHOOKS).json()["data"][0])).status_code == 204
    assert world.client.post(WEBHOOKS, json=body).status_code == 201


def test_the_secret_is_shown_once_and_sealed(world: WebhookWorld) -> None:
    made = world.create()
    rotated = world.client.post(path(made, "rotate-secret")).json()["secret"]
    delivery = world.test(made)
    with world.ledger.engine.connect() as connection:
        rows = connection.execute(text("SELECT detail::text FROM audit_log WHERE object_id = :id"), made).all()
    shown = [world.client.get(p).text for p in (WEBHOOKS, path(made), path(made, "deliveries", delivery))]
    shown += [str(rows), world.client.patch(path(made), json={"description": "x"}).text]
    row = stored(world)
    shown += [repr(bytes(row.sealed_secret)), repr(bytes(row.sealed_previous_secret))]
    for secret in (made["secret"], rotated):
        key = Webhook(secret)._whsecret
        assert not any(secret in text or secret.removeprefix("whsec_") in text for text in shown)
        assert key not in bytes(row.sealed_secret) + bytes(row.sealed_previous_secret)
    decrypt = world.app.state.encryptor.decrypt
    assert decrypt(row.sealed_secret) == Webhook(rotated)._whsecret


def test_after_a_rotation_both_secrets_verify_for_a_day(world: WebhookWorld) -> None:
    first = world.create()
    second = world.client.post(path(first, "rotate-secret"))
    assert second.status_code == 200
    until = datetime.fromisoformat(second.json()["previous_secret_until"])
    assert timedelta(hours=23) < until - datetime.now(UTC) <= timedelta(hours=24)
    with world.sending():
        world.wait_for_attempts(first, world.test(first), 1)
        with world.ledger.engine.begin() as connection:
            connection.execute(text("UPDATE webhook_endpoints SET previous_secret_until = now()"))
        world.wait_for_attempts(first, world.test(first), 1)
    during, after = world.receiver.requests
    for secret in (first["secret"], second.json()["secret"]):
        verified(secret, during)
    verified(second.json()["secret"], after)
    with pytest.raises(WebhookVerificationError):
        verified(first["secret"], after)


def test_a_test_message_is_verified_whatever_the_events_are(world: WebhookWorld) -> None:
    webhook = world.create(events=["selection_job.failed"])
    with world.sending():
        delivery = world.wait_for_attempts(webhook, world.test(webhook), 1)
    message = verified(webhook["secret"], world.receiver.requests[0])
    assert (message["type"], message["data"]) == ("webhook.test", {"object": "webhook", "id": webhook["id"]})
    assert (delivery["type"], delivery["job_id"]) == ("webhook.test", None)


@pytest.mark.parametrize(("code", "state"), [(204, "delivered"), (410, "failed")])
def test_a_replay_is_the_same_message_with_the_same_id(world: WebhookWorld, code: int, state: str) -> None:
    webhook = world.create()
    world.receiver.answer = status(code)
    with world.sending():
        delivery_id = world.test(webhook)
        assert world.wait_for_attempts(webhook, delivery_id, 1)["state"] == state
        world.receiver.answer = status(200)
        replay = path(webhook, "deliveries", delivery_id, "replay")
        if code == 410:
            assert world.client.post(replay).json()["code"] == "webhook_disabled"
            assert world.client.patch(path(webhook), json={"enabled": True}).json()["disabled_reason"] is None
        again = world.client.post(replay)
        assert (again.status_code, again.json()["id"], again.json()["state"]) == (202, delivery_id, "pending")
        delivery = world.wait_for_attempts(webhook, delivery_id, 2)
    assert (delivery["state"], delivery["attempts"]) == ("delivered", 1)
    assert [a["status"] for a in delivery["log"]] == [code, 200]
    first, second = world.receiver.requests
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery_id
    verified(webhook["secret"], second)


def test_a_replay_while_an_attempt_is_under_way_is_not_undone_by_it(world: WebhookWorld) -> None:
    webhook = world.create()
    delivery_id = world.test(webhook)
    with world.ledger.sessions.begin() as session:
        ((claimed, _),) = repository.claim(session, [delivery_id], lease_seconds=PATIENCE)
    assert world.client.post(path(webhook, "deliveries", delivery_id, "replay")).status_code == 202
    with world.ledger.sessions.begin() as session:
        outcome = {"status": 500, "seconds": 1.0, "error": "answered 500", "again_seconds": None}
        assert not repository.record_attempt(session, claimed, **outcome)
    delivery = world.delivery(webhook, delivery_id)
    assert (delivery["state"], len(delivery["log"])) == ("pending", 1)
    with world.sending():
        assert world.wait_for_attempts(webhook, delivery_id, 2)["state"] == "delivered"


def test_disabling_and_deleting_fail_what_waits(world: WebhookWorld) -> None:
    disabled, deleted, beside = world.create(), world.create(), world.create()
    waiting = {webhook["id"]: world.test(webhook) for webhook in (disabled, deleted, beside)}
    found = world.client.patch(path(disabled), json={"enabled": False}).json()
    assert (found["enabled"], found["disabled_reason"]) == (False, "disabled by its owner")
    assert world.client.delete(path(deleted)).status_code == 204
    with world.ledger.engine.connect() as connection:
        states = dict(connection.execute(text("SELECT id, state FROM webhook_deliveries")).all())
    assert [states[waiting[w["id"]]] for w in (disabled, deleted, beside)] == ["failed", "failed", "pending"]
    assert world.client.post(path(disabled, "test")).status_code == 409


def test_lists_are_paged_and_deliveries_found_by_state(world: WebhookWorld) -> None:
    webhooks = [world.create() for _ in range(3)]
    webhook = webhooks[0]
    sent = [world.test(webhook) for _ in range(5)]
    first = world.client.get(WEBHOOKS, params={"limit": 2}).json()
    rest = world.client.get(WEBHOOKS, params={"limit": 2, "after": first["last_id"]}).json()
    assert [w["id"] for w in first["data"] + rest["data"]] == [w["id"] for w in reversed(webhooks)]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    found: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = world.client.get(path(webhook, "deliveries"), params=query).json()
        found += [d["id"] for d in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert found == sorted(sent, reverse=True)
    assert len(world.deliveries(webhook, state="pending")) == 5
    assert world.deliveries(webhook, state="failed") == []
    for bad in (WEBHOOKS, path(webhook, "deliveries")):
        refused = world.client.get(bad, params={"after": "job_1"})
        assert (refused.status_code, refused.json()["param"]) == (422, "after")


def test_the_ids_of_another_tenant_and_of_another_webhook_do_not_exist(world: WebhookWorld) -> None:
    mine, beside = world.create(), world.create()
    delivery = world.test(mine)
    for webhook, client in ((mine, world.other), ({"id": new_id("whk")}, world.client), ({"id": "x"}, world.client)):
        calls = [
            client.get(path(webhook)),
            client.patch(path(webhook), json={"enabled": False}),
            client.delete(path(webhook)),
            client.post(path(webhook, "rotate-secret")),
            client.post(path(webhook, "test")),
            client.get(path(webhook, "deliveries")),
            client.get(path(webhook, "deliveries", delivery)),
            client.post(path(webhook, "deliveries", delivery, "replay")),
        ]
        assert {(c.status_code, c.json()["code"]) for c in calls} == {(404, "not_found")}
        assert len({c.json()["detail"] for c in calls}) == 1
    for wrong in (path(beside, "deliveries", delivery), path(mine, "deliveries", new_id("msg"))):
        assert world.client.get(wrong).status_code == 404
        assert world.client.post(wrong + "/replay").status_code == 404
    assert world.other.get(WEBHOOKS).json()["data"] == []
    assert (stored(world, "count(*), count(disabled_at), count(deleted_at)")) == (2, 0, 0)


def test_reading_needs_one_scope_and_changing_another(world: WebhookWorld) -> None:
    webhook = world.create()
    delivery = world.test(webhook)
    with world.app.state.sessions.begin() as session:
        scopes = {
            scope: create_key(session, tenant_name="other", key_name="k", secret_key=SECRET, scopes=[scope])
            for scope in (Scope.READ, Scope.SUBMIT)
        }
    reads = [("GET", WEBHOOKS), ("GET", path(webhook)), ("GET", path(webhook, "deliveries", delivery))]
    changes = [("POST", WEBHOOKS), ("PATCH", path(webhook)), ("DELETE", path(webhook))]
    changes += [("POST", path(webhook, *p)) for p in (["test"], ["rotate-secret"], ["deliveries", delivery, "replay"])]
    for scope, refused in ((Scope.READ, changes), (Scope.SUBMIT, reads)):
        for method, url in refused:
            headers = {"Authorization": f"Bearer {scopes[scope]}"}
            body = {"url": world.receiver.url} if method in ("POST", "PATCH") else None
            answer = world.client.request(method, url, headers=headers, json=body)
            assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope"), (method, url)


def test_every_post_is_done_once_under_its_key(world: WebhookWorld) -> None:
    body = {"url": world.receiver.url}
    first, again = (world.client.post(WEBHOOKS, json=body, headers={"Idempotency-Key": "make"}) for _ in range(2))
    assert (first.status_code, first.content) == (201, again.content), "with its secret"
    assert again.headers["idempotent-replayed"] == "true"
    webhook = first.json()
    delivery = world.test(webhook)
    for rest in (["test"], ["rotate-secret"], ["deliveries", delivery, "replay"]):
        headers = {"Idempotency-Key": "-".join(rest)}
        answers = [world.client.post(path(webhook, *rest), headers=headers) for _ in range(2)]
        assert answers[0].is_success
        assert answers[0].content == answers[1].content
    assert len(world.deliveries(webhook)) == 2
    assert stored(world, "count(*)").count == 1


def test_every_change_is_in_the_audit_log_without_what_is_secret(world: WebhookWorld) -> None:
    webhook = world.create(description="private words")
    delivery = world.test(webhook)
    world.client.post(path(webhook, "rotate-secret"))
    world.client.post(path(webhook, "deliveries", delivery, "replay"))
    world.client.patch(path(webhook), json={"url": world.receiver.url, "description": "private words", "enabled": True})
    world.client.delete(path(webhook))
    with world.ledger.engine.connect() as connection:
        log = text("SELECT action, tenant_id, detail FROM audit_log WHERE object_id = :id ORDER BY id")
        entries = connection.execute(log, webhook).all()
    actions = ["created", "tested", "secret_rotated", "replayed", "updated", "deleted"]
    assert [e.action for e in entries] == [f"webhook.{action}" for action in actions]
    assert {e.tenant_id for e in entries} == {world.ledger.owner["tenant_id"]}
    assert entries[0].detail == {"host": "127.0.0.1", "events": TERMINAL}
    assert entries[4].detail == {"url": "127.0.0.1", "enabled": True}
    written = json.dumps([e.detail for e in entries])
    assert not any(hidden in written for hidden in ("whsec_", "secret-of-the-receiver", "private words"))


def test_the_client_makes_every_call(world: WebhookWorld) -> None:
    key = world.client.headers["Authorization"].removeprefix("Bearer ")
    with serving(world.app) as url, Winnow(url, key) as winnow:
        webhook = winnow.create_webhook(world.receiver.url, events=["selection_job.failed"])
        assert winnow.change_webhook(webhook["id"], description="ours")["description"] == "ours"
        assert winnow.rotate_webhook_secret(webhook["id"])["secret"] != webhook["secret"]
        delivery = winnow.test_webhook(webhook["id"])
        assert [w["id"] for w in winnow.webhooks()] == [webhook["id"]]
        assert list(winnow.deliveries(webhook["id"], state="pending")) == [delivery]
        assert winnow.delivery(webhook["id"], delivery["id"])["log"] == []
        assert winnow.replay(webhook["id"], delivery["id"])["id"] == delivery["id"]
        winnow.delete_webhook(webhook["id"])
        assert list(winnow.webhooks()) == []


def test_the_receiver_of_the_documentation_verifies(world: WebhookWorld) -> None:
    webhook = world.create()
    with world.sending():
        world.wait_for_attempts(webhook, world.test(webhook), 1)
    (request,) = world.receiver.requests
    section = (Path(__file__).parents[3] / "docs" / "webhooks.md").read_text()
    example: dict[str, Any] = {}
    exec(section.split("```python\n")[1].split("```")[0].replace("whsec_...", webhook["secret"]), example)
    with TestClient(example["app"]) as receiver:
        bodies = (request.body, b"{}", b"")
        answers = [receiver.post("/winnow", content=body, headers=request.headers) for body in bodies]
    assert [a.status_code for a in answers] == [204, 401, 401]
    assert example["seen"] == {request.headers["webhook-id"]}
