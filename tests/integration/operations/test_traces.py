"""Traces as a collector receives them: a request and the units of its job in one trace; an unavailable collector, or none."""

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support.servers import Servers
from support.tiny import pool_rows
from support.world import SECRET, own_settings, pair

from service.app import create_app
from service.datasets.convert import convert
from service.db.engine import make_engine, make_sessions
from service.ids import new_id
from service.jobs import repository
from service.keys.service import create_key
from service.observability import logs
from service.settings import (
    ApiSettings,
    TelemetrySettings,
)
from worker.supervisor import Supervisor

PATIENCE = 120.0

Json = dict[str, Any]


class Collector:
    """Receives spans over OTLP/HTTP, as (service, span)."""

    def __init__(self) -> None:
        received: list[tuple[str, Span]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                    attributes = {a.key: a.value.string_value for a in part.resource.attributes}
                    for scope in part.scope_spans:
                        received.extend((attributes["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spans(self, service: str) -> list[Span]:
        return [span for found, span in self.received if found == service]


@pytest.fixture
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.close()


@pytest.fixture
def settings(servers: Servers, tmp_path: Path, tiny_llama: Path) -> Iterator[ApiSettings]:
    """A database of its own: the supervisor takes whatever unit there is."""
    groups = {"models": {"folder": tiny_llama.parent}, "ledger": {"sweep_seconds": 600}, "log": {"format": "json"}}
    with own_settings(servers, tmp_path, **groups) as settings:
        yield settings


@contextmanager
def client_of(settings: ApiSettings) -> Iterator[TestClient]:
    engine = make_engine(settings.database)  # not the application's: what that does is traced
    with make_sessions(engine).begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="test", secret_key=SECRET)
    engine.dispose()
    pair(settings)
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def traced(settings: ApiSettings, endpoint: str) -> ApiSettings:
    return settings.model_copy(update={"telemetry": TelemetrySettings(endpoint=endpoint)})


def post(client: TestClient, **headers: str) -> str:
    """A job that no model is computed for."""
    ids = {}
    for name, rows in (("pool", pool_rows(12)), ("target", pool_rows(3))):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        uploaded = client.post("/v1/datasets", params={"name": name}, content=content)
        assert uploaded.status_code == 201, uploaded.text
        ids[name] = uploaded.json()["id"]
    request = {**ids, "model": "tiny-llama", "budget": 3, "method": "random", "max_length": 64}
    answer = client.post("/v1/selection-jobs", json=request, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def attributes(span: Span) -> Json:
    return {
        a.key: a.value.int_value if a.value.HasField("int_value") else a.value.string_value for a in span.attributes
    }


def test_a_request_and_the_units_of_its_job_are_one_trace(settings: ApiSettings, collector: Collector) -> None:
    settings = traced(settings, collector.endpoint)
    callers = "0af7651916cd43dd8448eb211c80319c"
    with client_of(settings) as client:
        job_id = post(client, traceparent=f"00-{callers}-b7ad6b7169203331-01")
        supervisor = Supervisor(settings)
        assert supervisor.run_until_idle() > 2
        supervisor.close()
        assert client.get(f"/v1/selection-jobs/{job_id}").json()["status"] == "succeeded"
        assert client.get("/metrics").status_code == 200

    requests = {span.name: span for span in collector.spans("winnow-api") if span.kind == Span.SPAN_KIND_SERVER}
    posted = requests["POST /v1/selection-jobs"]
    assert posted.trace_id.hex() == callers
    assert "GET /v1/selection-jobs/{job_id}" in requests
    assert not any("metrics" in name for name in requests)
    statements = [span for span in collector.spans("winnow-api") if span.parent_span_id == posted.span_id]
    assert any(attributes(span).get("db.system") == "postgresql" for span in statements)
    roots = [
        attributes(span).get("db.statement", "") for span in collector.spans("winnow-api") if not span.parent_span_id
    ]
    assert not any("job_units" in statement for statement in roots), (
        "the dispatcher's passes and scrapes make no traces"
    )

    units = collector.spans("winnow-worker")
    assert {span.name for span in units} >= {"unit prepare", "unit select", "unit validate"}
    for span in units:
        assert (span.trace_id.hex(), span.parent_span_id) == (callers, posted.span_id)
        found = attributes(span)
        assert (found["winnow.job_id"], found["winnow.shard"], found["winnow.attempt"]) == (job_id, 0, 1)
        assert (f"unit {found['winnow.stage']}", found["winnow.outcome"]) == (span.name, "succeeded")
        assert span.status.code != Status.STATUS_CODE_ERROR


@pytest.mark.slow
def test_a_unit_that_fails_says_so_in_its_span_and_the_child_in_its_log(
    settings: ApiSettings, collector: Collector, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = traced(settings, collector.endpoint)
    with client_of(settings) as client:
        job_id = post(client)
        Path(settings.artifacts.url, "tokens").write_text("where a folder should be")
        supervisor = Supervisor(settings)
        assert supervisor.run_until_idle() == 1
        supervisor.close()
    [span] = collector.spans("winnow-worker")
    assert (attributes(span)["winnow.outcome"], attributes(span)["error.type"]) == ("failed", "internal_error")
    assert span.status.code == Status.STATUS_CODE_ERROR

    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line["service"] == "compute" and "unit failed" in line["message"]]
    unit = {"job_id": job_id, "stage": "prepare", "shard": 0, "attempt": 1, "worker_id": supervisor.worker_id}
    # It came to the child through the pipe.
    assert {name: line.get(name) for name in (*unit, "trace_id")} == {**unit, "trace_id": span.trace_id.hex()}


def test_what_an_upload_does_in_its_thread_is_of_its_request(
    settings: ApiSettings, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []

    def noting(*arguments: Any, **options: Any) -> Any:
        logged.append(logs.context())
        return convert(*arguments, **options)

    monkeypatch.setattr("service.datasets.router.convert", noting)
    with client_of(traced(settings, collector.endpoint)) as client:
        content = json.dumps({"text": "Seven."})
        answer = client.post("/v1/datasets", params={"name": "pool"}, content=content, headers={"X-Request-Id": "mine"})
        assert answer.status_code == 201, answer.text
    spans = collector.spans("winnow-api")
    [request] = [span for span in spans if span.name == "POST /v1/datasets"]
    assert logged == [{"request_id": "mine", "trace_id": request.trace_id.hex()}]
    [kept] = [span for span in spans if attributes(span).get("db.statement", "").startswith("INSERT INTO datasets")]
    assert (kept.trace_id, kept.parent_span_id) == (request.trace_id, request.span_id)


@pytest.mark.parametrize(
    "listening", [pytest.param(False, id="refuses"), pytest.param(True, id="never answers", marks=pytest.mark.slow)]
)
def test_a_collector_that_is_away_breaks_nothing(settings: ApiSettings, listening: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        with client_of(traced(settings, f"http://127.0.0.1:{silent.getsockname()[1]}")) as client:
            job_id, deadline = post(client), time.monotonic() + PATIENCE
            for _ in range(
                600
            ):  # more than a batch, which is sent at once; were each sent in its request, it took half an hour
                assert time.monotonic() < deadline, "requests wait for the collector"
                assert client.get("/v1/selection-jobs/none").status_code == 404
            assert client.get(f"/v1/selection-jobs/{job_id}").json()["status"] == "queued"


def test_without_an_endpoint_a_job_has_no_trace(settings: ApiSettings) -> None:
    with client_of(settings) as client:
        job_id = post(client, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        with client.app.state.sessions() as session:
            assert repository.trace(session, job_id) is None


@pytest.mark.parametrize(
    ("endpoint", "loaded"), [("", False), ("http://127.0.0.1:1", True)], ids=["without an endpoint", "with one"]
)
def test_nothing_that_makes_traces_is_loaded_without_an_endpoint(tmp_path: Path, endpoint: str, loaded: bool) -> None:
    environment = {
        **os.environ,
        "WINNOW_DATABASE__URL": "postgresql://nobody@127.0.0.1:1/none",
        "WINNOW_BROKER__URL": "redis://127.0.0.1:1/0",
        "WINNOW_ARTIFACTS__URL": str(tmp_path),
        "WINNOW_MODELS__FOLDER": str(tmp_path),
        "WINNOW_SECRET_KEY": SECRET,
        "WINNOW_TELEMETRY__ENDPOINT": endpoint,
    }
    program = (
        "import sys, service.app, worker.celery_app\nservice.app.create_app()\n"
        "print(any(name.startswith(('opentelemetry.sdk.trace', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == [str(loaded)]
