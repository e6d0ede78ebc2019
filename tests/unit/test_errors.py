"""Every error leaves as problem details with a code, the field at fault and the id of the request."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Query
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict

from service.http import errors
from service.http.errors import (
    ApiError,
    BadRequest,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unprocessable,
)
from service.http.middleware import EveryAnswer

FINAL = [BadRequest, Unauthorized, Forbidden, NotFound, Conflict, Gone, TooLarge, Unprocessable]
PASSING = [TooManyRequests, Unavailable, ApiError]
KINDS = [*FINAL, *PASSING]


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    blocks: int


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    embedding: Inner
    name: str = ""


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.add_middleware(EveryAnswer)
    errors.install(app)

    @app.get("/raise/{name}")
    def raise_kind(name: str) -> None:
        raise {kind.__name__: kind for kind in KINDS}[name]("What to do.", param="field")

    @app.get("/custom")
    def custom() -> None:
        raise Conflict(
            "It runs.",
            errors=[{"param": "line 17", "message": "is no JSON"}],
            code="job_not_finished",
            headers={"Retry-After": "5"},
        )

    @app.post("/body")
    def take(body: Body, limit: int = Query(default=1, ge=1)) -> None:
        pass

    @app.get("/both")
    def read() -> None: ...

    @app.post("/both")
    def write() -> None: ...

    @app.get("/crash")
    def crash() -> None:
        raise RuntimeError("password=hunter2")

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_whether_the_same_request_may_succeed_later(client: TestClient, kind: type[ApiError]) -> None:
    assert client.get(f"/raise/{kind.__name__}").headers["x-should-retry"] == str(kind in PASSING).lower()
    assert kind("", retry=kind in FINAL).headers["x-should-retry"] == str(kind in FINAL).lower()


def test_a_method_not_allowed_is_answered_with_those_that_are(client: TestClient) -> None:
    for path, allowed in (("/both", "GET, POST"), ("/body", "POST"), ("/raise/x", "GET")):
        answer = client.request("PUT", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["code"] == "method_not_allowed"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_a_problem_with_its_status_and_code(client: TestClient, kind: type[ApiError]) -> None:
    response = client.get(f"/raise/{kind.__name__}", headers={"X-Request-Id": "mine-1"})
    assert response.status_code == kind.status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "type": "about:blank",
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": "What to do.",
        "param": "field",
        "request_id": "mine-1",
    }


def test_an_error_may_have_a_code_details_and_headers_of_its_own(client: TestClient) -> None:
    response = client.get("/custom")
    assert response.headers["retry-after"] == "5"
    assert response.json()["code"] == "job_not_finished"
    assert response.json()["errors"] == [{"param": "line 17", "message": "is no JSON"}]
    assert "param" not in response.json()


def test_no_two_kinds_share_a_code() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({}, {"embedding"}),
        ({"embedding": {}}, {"embedding.blocks"}),
        ({"embedding": {"blocks": "x"}}, {"embedding.blocks"}),
        ({"embedding": {"blocks": 1, "color": 2}}, {"embedding.color"}),
        ({"embedding": {"blocks": 1}, "more": 1, "name": 3}, {"more", "name"}),
        ([], {"body"}),
    ],
)
def test_a_field_at_fault_is_named_as_the_client_knows_it(client: TestClient, body: object, params: set[str]) -> None:
    response = client.post("/body", json=body)
    problem = response.json()
    assert response.status_code == problem["status"] == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["code"] == "invalid_request"
    assert {error["param"] for error in problem["errors"]} == params
    assert problem["param"] in params
    assert problem["detail"].startswith(problem["param"])


def test_an_unknown_field_is_named(client: TestClient) -> None:
    problem = client.post("/body", json={"embedding": {"blocks": 1, "color": 2}}).json()
    assert problem["detail"] == "embedding.color: unknown field"


def test_a_query_parameter_at_fault_is_named(client: TestClient) -> None:
    problem = client.post("/body", params={"limit": 0}, json={"embedding": {"blocks": 1}}).json()
    assert (problem["status"], problem["param"]) == (422, "limit")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_body_that_is_no_json_is_a_problem_too(client: TestClient, content: bytes) -> None:
    response = client.post("/body", content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/body", 405)])
def test_what_the_router_refuses_is_a_problem_too(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == response.json()["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_a_crash_is_a_problem_that_reveals_nothing_internal(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.get("/crash", headers={"X-Request-Id": "mine-2"})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "internal_error"
    assert response.json()["request_id"] == response.headers["x-request-id"] == "mine-2"
    assert "hunter2" not in response.text
    assert "hunter2" in caplog.text


def test_a_field_name_that_is_no_text_is_refused_without_a_crash(client: TestClient) -> None:
    body = b'{"embedding": {"blocks": 1}, "\\ud800": 1}'
    assert client.post("/body", content=body, headers={"content-type": "application/json"}).status_code == 422


@pytest.mark.parametrize("sent", ["abc", "A.b_c-9", "x" * 64])
def test_a_sensible_request_id_comes_back(client: TestClient, sent: str) -> None:
    response = client.get("/nowhere", headers={"X-Request-Id": sent})
    assert response.headers["x-request-id"] == response.json()["request_id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\tb", "<script>", "{}"])
def test_another_request_id_is_replaced(client: TestClient, sent: str) -> None:
    made = client.get("/nowhere", headers={"X-Request-Id": sent}).headers["x-request-id"]
    assert made.startswith("req_")
    assert made != client.get("/nowhere").headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'{"name": }', "line 1, column 10"),
        (b'{\n  "name": "a",\n  "embedding": [1, 2}\n', "line 3, column 21"),
        (b"", "body"),
        (b'{\n"name": "\xff"}', "line 2, column 10"),
        (b" " * 5000 + b"x", "line 1, column 5001"),
        (b"[" * 100_000, "body"),
    ],
    ids=["a value", "a bracket", "nothing", "a byte", "far away", "nested"],
)
def test_a_body_that_is_no_json_is_named_by_the_place(client: TestClient, content: bytes, place: str) -> None:
    problem = client.post("/body", content=content, headers={"content-type": "application/json"}).json()
    assert (problem["status"], problem["param"]) == (422, place)
