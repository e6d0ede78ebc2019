"""Logging in and out of the pages: cookies, sessions, links that work once, and forms of other sites."""

import re
from datetime import timedelta
from http.cookies import SimpleCookie
from typing import Any

import pytest
from sqlalchemy import text
from support.web import Visitor, visitor
from support.world import SECRET, World

from service.auth import browsers
from service.auth.authentication import key_digest


def link(world: World) -> str:
    with world.sessions.begin() as session:
        return browsers.make_link(session, world.key, SECRET)


def execute(world: World, statement: str, **values: Any) -> None:
    with world.engine.begin() as connection:
        connection.execute(text(statement), values)


def cookie(answer: Any) -> Any:
    (morsel,) = SimpleCookie(answer.headers["set-cookie"]).values()
    return morsel


@pytest.mark.parametrize(("scheme", "name", "is_secure"), [("http", "winnow", False), ("https", "__Host-winnow", True)])
def test_the_cookie_is_for_this_host_and_no_script(world: World, scheme: str, name: str, is_secure: bool) -> None:
    answer = Visitor(world, scheme).login(world.key)
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs")
    found = cookie(answer)
    assert found.key == name
    assert found["httponly"]
    assert found["samesite"] == "strict"
    assert bool(found["secure"]) == is_secure
    assert (found["path"], found["domain"]) == ("/", "")
    assert int(found["max-age"]) == 12 * 3600


def test_neither_cookie_nor_database_hold_the_key_or_the_cookie(world: World) -> None:
    one = visitor(world)
    token = one.cookies["winnow"]
    assert world.key not in token
    assert token not in world.key
    with world.engine.connect() as connection:
        kept = connection.execute(text("SELECT digest FROM browser_sessions")).scalars().all()
    assert key_digest(SECRET, token) in kept
    assert token.encode() not in kept


@pytest.mark.parametrize("key", ["", "wnw_", "wnw_0123456789ab_" + "x" * 43, "x" * 3000])
def test_a_wrong_key_logs_nobody_in(world: World, key: str) -> None:
    one = Visitor(world)
    answer = one.login(key)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert one.get("/jobs").headers["location"] == "/login?next=%2Fjobs"


def test_a_login_of_more_than_a_small_form_is_not_read(world: World) -> None:
    assert Visitor(world).login("x" * 5000).status_code == 413


@pytest.mark.parametrize(
    ("next", "location"),
    [
        ("/jobs/new?model=a", "/jobs/new?model=a"),
        ("//elsewhere.example", "/jobs"),
        ("/\\elsewhere.example", "/jobs"),
        ("https://elsewhere.example", "/jobs"),
        ("/\t/elsewhere.example", "/jobs"),
    ],
)
def test_a_login_leads_back_to_a_page_of_ours_alone(world: World, next: str, location: str) -> None:
    assert Visitor(world).post("/login", {"key": world.key, "next": next}).headers["location"] == location


def test_a_session_ends_with_its_keys_revocation(world: World) -> None:
    one = visitor(world)
    assert one.get("/jobs").status_code == 200
    execute(world, "UPDATE api_keys SET revoked_at = now() WHERE prefix = :prefix", prefix=world.key.split("_")[1])
    assert one.get("/jobs").headers["location"].startswith("/login")


def test_a_session_ends_with_its_time(world: World) -> None:
    one = visitor(world)
    execute(world, "UPDATE browser_sessions SET expires_at = now() WHERE digest = :digest", digest=digest(one))
    assert one.get("/jobs").headers["location"].startswith("/login")


def digest(one: Visitor) -> bytes:
    return key_digest(SECRET, one.cookies["winnow"])


def test_a_logout_ends_the_session_also_for_a_copy_of_the_cookie(world: World) -> None:
    one = visitor(world)
    token = one.cookies["winnow"]
    assert one.send("/logout").headers["location"] == "/login"
    assert "winnow" not in one.cookies
    one.cookies.set("winnow", token)
    assert one.get("/jobs").status_code == 303


def test_a_link_logs_in_once(world: World) -> None:
    token = link(world)
    first, second = Visitor(world), Visitor(world)
    for one in (first, second):  # looking at the address does not use it
        assert one.get("/login", params={"link": token}).status_code == 200
    assert first.post("/login", {"link": token}).status_code == 303
    assert first.get("/jobs").status_code == 200
    answer = second.post("/login", {"link": token})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("is_revoked", [True, False])
def test_a_link_that_has_expired_or_lost_its_key_logs_nobody_in(world: World, is_revoked: bool) -> None:
    token = link(world)
    if is_revoked:
        execute(world, "UPDATE api_keys SET revoked_at = now() WHERE prefix = :prefix", prefix=world.key.split("_")[1])
    else:
        expired = key_digest(SECRET, token)
        execute(world, "UPDATE login_links SET expires_at = now() WHERE digest = :digest", digest=expired)
    assert Visitor(world).post("/login", {"link": token}).status_code == 401


def test_links_are_kept_as_hashes_and_for_minutes(world: World) -> None:
    token = link(world)
    with world.engine.connect() as connection:
        rows = connection.execute(text("SELECT digest, expires_at - now() FROM login_links")).all()
    (left,) = (left for kept, left in rows if kept == key_digest(SECRET, token))
    assert timedelta(0) < left <= timedelta(minutes=15)


def test_what_has_expired_is_removed_by_the_next_login(world: World) -> None:
    one = visitor(world)
    execute(world, "UPDATE browser_sessions SET expires_at = now() WHERE digest = :digest", digest=digest(one))
    visitor(world)
    with world.engine.connect() as connection:
        kept = connection.execute(text("SELECT digest FROM browser_sessions")).scalars().all()
    assert digest(one) not in kept


def test_a_key_has_a_hundred_sessions_at_most(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsers, "_MOST", 2)
    first, second, third = (visitor(world) for _ in range(3))
    assert [one.get("/jobs").status_code for one in (first, second, third)] == [303, 200, 200]


def test_a_form_without_the_sessions_token_changes_nothing(world: World) -> None:
    one, other = visitor(world), visitor(world)
    for sent in ({}, {"form_token": "0" * 64}, {"form_token": other.form_token()}):
        assert one.post("/logout", sent).status_code == 403
    assert one.get("/jobs").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "https://elsewhere.example"}],
)
def test_a_form_of_another_site_changes_nothing_and_logs_nobody_in(world: World, headers: dict[str, str]) -> None:
    one = visitor(world)
    assert one.post("/logout", {"form_token": one.form_token()}, headers=headers).status_code == 403
    assert one.get("/jobs").status_code == 200
    assert Visitor(world).post("/login", {"key": world.key}, headers=headers).status_code == 403


def test_the_api_knows_no_cookie(world: World) -> None:
    one = visitor(world)
    for path in ("/v1/selection-jobs", "/v1/datasets", "/v1/keys", "/v1/usage"):
        assert one.get(path).status_code == 401


def test_no_page_takes_a_bearer_key(world: World) -> None:
    assert world.client.get("/jobs", headers={"accept": "text/html"}, follow_redirects=False).status_code == 303


def test_logins_and_logouts_are_in_the_audit_log(world: World) -> None:
    one = visitor(world)
    one.send("/logout")
    Visitor(world).post("/login", {"link": link(world)})
    entries = world.client.get("/v1/audit-log").json()["data"]
    found = [(entry["action"], entry["detail"]) for entry in entries if entry["action"].startswith("session.")]
    opened = "session.opened"
    assert found == [(opened, {"by": "link"}), ("session.ended", {}), (opened, {"by": "key"})]


def test_pages_count_against_the_keys_rate(world: World) -> None:
    one = visitor(world)
    execute(
        world,
        """UPDATE api_keys SET limits = '{"requests_per_minute": 1}' WHERE prefix = :prefix""",
        prefix=world.key.split("_")[1],
    )
    answers = [one.get("/jobs") for _ in range(3)]
    assert answers[-1].status_code == 429
    assert "retry-after" in answers[-1].headers
    assert answers[-1].headers["content-type"].startswith("text/html")


def test_every_page_forbids_what_is_not_from_here(world: World) -> None:
    for answer in (visitor(world).get("/jobs"), Visitor(world).get("/login"), Visitor(world).get("/nowhere")):
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src", "form-action")} == {
            "'self'"
        }
        assert (policy["frame-ancestors"], policy["base-uri"]) == ("'none'", "'none'")
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?! src=)", answer.text) is None


def test_errors_are_pages_for_browsers_and_problems_for_programs(world: World) -> None:
    one = visitor(world)
    answer = one.get("/nowhere")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert one.get("/v1/nowhere").headers["content-type"] == "application/problem+json"
    plain = one.get("/nowhere", headers={"accept": "*/*"})
    assert plain.headers["content-type"] == "application/problem+json"
    assert one.get("/jobs", headers={"accept": "*/*"}).status_code == 200


def test_the_document_of_the_api_has_no_page(world: World) -> None:
    assert [
        path
        for path in world.app.openapi()["paths"]
        if not path.startswith(("/v1/", "/healthz", "/readyz", "/metrics"))
    ] == []


def test_static_files_are_kept_by_their_content(world: World) -> None:
    page = Visitor(world).get("/login").text
    addresses = [part.split('"')[0] for part in page.split('="') if part.startswith("/static/")]
    assert len({address.rsplit("/")[-1] for address in addresses}) == 3
    for address in addresses:
        answer = Visitor(world).get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    other = addresses[0].split("/")
    other[2] = "0" * 16
    assert Visitor(world).get("/".join(other)).headers["cache-control"] == "no-store"
    assert Visitor(world).get("/static/0/..%2F..%2Frouter.py").status_code == 404
