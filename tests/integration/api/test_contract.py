"""The whole OpenAPI document against the API, by schemathesis: no answer that the document does not tell of, and no 5xx.

Every operation is called with what its schema allows and with what it does not, over a real server. Ids of things that are there
take the place of those that are made up, so that the calls get beyond 404.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from support.jobs import add_job, published, write_pool
from support.openapi_document import document
from support.world import World, make_settings, pair, register_model, serving

from service.auth.principal import Scope
from service.ids import new_id
from service.ledger.state import JobStatus
from service.plan.parameters import JobParameters

# Too long a parameter may make too long an address, which is refused before its parameters are looked at.
REFUSALS = ["400", "401", "403", "404", "405", "406", "409", "414", "415", "422", "428", "429", "5xx"]
config = schemathesis.Config.from_dict(
    {
        "generation": {"allow-extra-parameters": False},
        "checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}},
    }
)
schema = schemathesis.openapi.from_dict(document(), config=config)
UPLOAD = "POST /v1/datasets"
# What the schema alone cannot say, and is refused with the field's name: which fields go together, what a file must hold, where a
# webhook's name leads, which scopes the caller may give, how large a file or a part may be, how many labels a job has.
SAYS_MORE = {
    "POST /v1/selection-jobs",
    UPLOAD,
    "PATCH /v1/selection-jobs/{job_id}",
    "POST /v1/webhooks",
    "PATCH /v1/webhooks/{webhook_id}",
    "POST /v1/keys",
    "POST /v1/uploads",
    "PUT /v1/uploads/{upload_id}/parts/{number}",
    "GET /v1/datasets/{dataset_id}/rows",
    "GET /v1/selection-jobs/{job_id}/weights",
    "GET /v1/selection-jobs/{job_id}/export",
    "GET /v1/selection-jobs/{job_id}/samples/{index}",
    "GET /v1/selection-jobs/{job_id}/samples",
}


@schemathesis.serializer(
    "application/jsonl",
    "application/gzip",
    "application/zstd",
    "application/vnd.apache.parquet",
    "application/vnd.apache.arrow.file",
    "application/vnd.apache.arrow.stream",
)
def serialize(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")


class Live:
    """The API behind a server, and a fresh object of each kind for each test, which may change or delete it."""

    def __init__(self, world: World, url: str, session: requests.Session, content: Any) -> None:
        self.world, self.url, self.session, self.content = world, url, session, content
        self.headers = {"Authorization": f"Bearer {world.key}"}

    def post(self, path: str, **options: Any) -> dict[str, Any]:
        answer = self.session.post(f"{self.url}/v1{path}", headers=self.headers, **options)
        assert answer.ok, answer.text
        return dict(answer.json())

    def provenance(self) -> dict[str, Any]:
        """As much of a record as a reproduction needs."""
        data = {"id": new_id("ds"), "fingerprint": self.content.fingerprint, "rows": self.content.row_count}
        return {
            "pool": data,
            "target": data,
            "model": {"kind": "registered", "name": "small"},
            "parameters": JobParameters().model_dump(mode="json"),
            "dtype": "float32",
            "budget": 1,
        }

    def objects(self) -> dict[str, list[str]]:
        world = self.world
        statuses = (JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED)
        # Of another model than new ones, which are planned from what earlier jobs of theirs have counted: it has no units.
        succeeded = published(world.sessions, world.key, self.content, model="other", provenance=self.provenance())
        webhook = self.post("/webhooks", json={"url": "https://127.0.0.1:8443/"})["id"]
        return {
            "dataset_id": [self.post("/datasets?name=d", data=b'{"text": "a"}\n{"text": "b"}\n')["id"]],
            "job_id": [
                succeeded,
                *(add_job(world.sessions, world.key, self.content, status) for status in statuses),
            ],
            "key_id": [self.post("/keys", json={"name": "k", "scopes": ["read"]})["id"]],
            "webhook_id": [webhook],
            "delivery_id": [self.post(f"/webhooks/{webhook}/test")["id"]],
            "index": ["0", "1"],
            "upload_id": [self.post("/uploads", json={"bytes": 7, "sha256": new_id("x")[2:].rjust(64, "0")})["id"]],
            "number": ["0", "1"],
        }


@pytest.fixture(scope="module")
def live(postgres_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("contract")
    settings = make_settings(
        postgres_url,
        folder,
        broker_url=broker_url,
        webhooks={"allowed_networks": ["127.0.0.0/8"]},
        limits={"requests_per_minute": 0, "concurrent_jobs": 0, "open_uploads": 0},
    )
    register_model(settings)
    pair(settings)
    with (
        World.made(settings, scopes=Scope) as world,
        serving(world.app) as url,
        requests.Session() as session,
    ):
        content = write_pool(world.store, folder / "content", [(f"{i}", None, {"text": "x"}) for i in range(5)])
        yield Live(world, url, session, content)


@pytest.fixture
def objects(live: Live) -> Iterator[dict[str, Iterator[str]]]:
    objects = live.objects()
    yield {name: itertools.cycle(ids) for name, ids in objects.items()}
    for webhook in live.session.get(f"{live.url}/v1/webhooks", headers=live.headers).json()["data"]:  # there may be ten
        live.session.delete(f"{live.url}/v1/webhooks/{webhook['id']}", headers=live.headers)


def put_in(case: Any, objects: dict[str, Iterator[str]]) -> None:
    parameters = case.path_parameters or {}
    for name, value in parameters.items():
        if name not in ("index", "number") or str(value).isdigit():
            parameters[name] = next(objects[name])
    wait = str((case.query or {}).get("wait", ""))
    if wait.isdigit() and int(wait) <= 60:
        case.query["wait"] = 0
    if isinstance((case.query or {}).get("model"), str):
        case.query["model"] = "small"
    if re.fullmatch("[!-~]{1,255}", str((case.headers or {}).get("Idempotency-Key", ""))):
        case.headers["Idempotency-Key"] = new_id("k")
    if isinstance(case.body, dict):
        for name in ("pool", "target"):
            if isinstance(case.body.get(name), str):
                case.body[name] = next(objects["dataset_id"])
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "small"


@schema.parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_contract(case: Any, live: Live, objects: dict[str, Iterator[str]]) -> None:
    put_in(case, objects)
    excluded = [schemathesis.checks.positive_data_acceptance] if case.operation.label in SAYS_MORE else []
    if case.operation.label == UPLOAD and not isinstance(
        case.body, str | bytes
    ):  # it is sent as JSON, which may be a good file
        excluded.append(schemathesis.checks.negative_data_rejection)
    case.call_and_validate(live.url, session=live.session, headers=live.headers, excluded_checks=excluded)
