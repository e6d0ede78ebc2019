"""How the commands are called and what they print: lists, options, exit statuses, progress."""

import io
import json
from typing import Any

import httpx
import pytest
from click.testing import Result
from rich.console import Console
from support.scripted_server import Chunks, Server, page, problem
from typer.testing import CliRunner

from winnow import Winnow, answers, progress
from winnow.cli import console, jobs, records
from winnow.cli.main import app
from winnow.version import client_version

AT = "2026-01-31T12:00:00.250000Z"
JOB_ID = "job_0193a1b2c3d4e5f60718293a4b5c6d7e"
STAGE = {"stage": "embed", "units": 3, "units_done": 1, "units_reused": 0, "done": 120, "total": 600, "started_at": AT}
JOB = {
    "id": JOB_ID,
    "status": "running",
    "phase": "landmark_gradients",
    "budget": 1_000_000,
    "created_at": AT,
    "stages": [STAGE],
    "progress": {"phase": "embed", "done": 120, "total": 600, "unit": "samples"},
}
DATASET = {
    "id": "ds_" + "0" * 32,
    "name": "a name\twith " + "many words " * 9,
    "status": "ready",
    "row_count": 9_999_999,
    "created_at": AT,
}
KEY = {
    "id": "key_" + "0" * 32,
    "name": "ci",
    "scopes": ["read", "submit", "admin"],
    "expires_at": None,
    "revoked_at": AT,
}
WEBHOOK = {"id": "wh_" + "0" * 32, "url": "https://example.com/" + "path/" * 30, "enabled": True}
DELIVERY = {
    "id": "msg_" + "0" * 32,
    "type": "selection_job.succeeded",
    "state": "pending",
    "attempts": 2,
    "created_at": AT,
}
MODEL = {"name": "smollm2-135m-instruct", "model_type": "llama", "blocks": 30, "base": None, "problem": "p" * 90}
LISTS: list[tuple[list[str], dict[str, Any]]] = [
    (["jobs", "ls"], JOB),
    (["jobs"], JOB),
    (["datasets", "ls"], DATASET),
    (["keys", "ls"], KEY),
    (["webhooks", "ls"], WEBHOOK),
    (["webhooks", "deliveries", "wh_1"], DELIVERY),
    (["models"], MODEL),
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    def connected(url: str, api_key: str) -> Winnow:
        return Winnow(url, api_key, transport=server, retries=0)

    monkeypatch.setattr(console, "Winnow", connected)
    return server


def run(*words: str, **environment: str) -> Result:
    given = {"WINNOW_URL": "http://winnow.test", "WINNOW_API_KEY": "wnw_key", "COLUMNS": "80", **environment}
    return CliRunner().invoke(app, words, env=given)


def listed(*entries: Any) -> httpx.Response:
    return page(list(entries), "last", False)


@pytest.mark.parametrize(("words", "entry"), LISTS, ids=lambda each: " ".join(each) if isinstance(each, list) else "")
def test_a_list_is_json_a_record_a_line_or_a_table_of_80_columns(
    server: Server, monkeypatch: pytest.MonkeyPatch, words: list[str], entry: dict[str, Any]
) -> None:
    server.script = [listed(entry, entry) for _ in range(4)]
    for given in ([*words, "--json"], ["--json", *words], [words[0], "--json", *words[1:]]):
        assert json.loads(run(*given).stdout) == [entry, entry]
    lines = run(*words).stdout.splitlines()
    first = next(iter(entry.values()))
    assert len(lines) == 2
    assert [line.split("\t")[0] for line in lines] == [first, first]
    assert {line.count("\t") for line in lines} == {lines[0].count("\t")} != {0}
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(records, "out", terminal)
    server.script = [listed(entry)]
    assert run(*words).exit_code == 0
    assert isinstance(terminal.file, io.StringIO)
    head, row = terminal.file.getvalue().splitlines()
    assert max(len(head.rstrip()), len(row.rstrip())) <= 80
    assert row.split()[0] == first, "the id is whole, to be copied"
    assert head.split()[0] in ("ID", "NAME")


def test_a_job_is_shown_by_its_id_and_under_its_former_names(server: Server) -> None:
    server.script = [httpx.Response(200, json=JOB) for _ in range(4)]
    shown = {run(*words, JOB_ID).stdout for words in (["status"], ["jobs", "get"], ["jobs"])}
    assert len(shown) == 1
    assert f"{JOB_ID}: running" in shown.pop()
    assert json.loads(run("jobs", "inspect", JOB_ID).stdout) == JOB


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"winnow-select {client_version()}\n"


FAILED = JOB | {"status": "failed", "error": {"code": "out_of_memory", "detail": "no memory"}}


@pytest.mark.parametrize(
    ("words", "answer", "status"),
    [
        (["jobs", "get", "job_1"], problem(404, code="not_found"), 1),
        (["jobs", "get", "job_1"], httpx.ConnectError("refused"), 1),
        (["jobs", "get", "job_1"], httpx.Response(200, text="<html>"), 1),
        (["jobs", "nothing", "job_1"], None, 2),
        (["jobs", "ls", "--limit", "0"], None, 2),
        (["jobs", "wait", "job_1"], httpx.Response(200, json=FAILED), 4),
        (["status", "job_1", "--wait"], httpx.Response(200, json=FAILED), 4),
        (["jobs", "wait", "job_1", "--timeout", "0"], httpx.Response(200, json=JOB), 5),
        (["jobs", "wait", "job_1"], httpx.Response(200, json=JOB | {"status": "succeeded"}), 0),
        (["keys", "rm", "key_1"], httpx.Response(204), 0),
    ],
)
def test_the_exit_status_says_what_happened(server: Server, words: list[str], answer: Any, status: int) -> None:
    server.script = [] if answer is None else [answer]
    done = run(*words)
    assert done.exit_code == status, done.output
    assert server.script == []
    assert "Traceback" not in done.output
    assert "validation error" not in done.output


def test_events_are_printed_as_they_happen(server: Server) -> None:
    events = [
        {"id": n, "type": kind, "created_at": AT, "data": {"n": n}}
        for n, kind in ((1, "job.queued"), (2, "job.failed"))
    ]
    for words, read in ((["-f"], None), (["--follow", "--json"], json.loads)):
        server.script = [httpx.Response(200, stream=Chunks(*(f"data: {json.dumps(e)}\n\n".encode() for e in events)))]
        lines = run("jobs", "logs", "job_1", *words).stdout.splitlines()
        assert (
            [read(line) for line in lines] == events
            if read
            else [line.split()[1] for line in lines] == ["job.queued", "job.failed"]
        )


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("winnow.progress.time.monotonic", lambda: clock[0])
    written = io.StringIO()
    with progress.showing(Console(file=written, force_terminal=False, width=80)) as watch:
        for seconds, change in (
            (0, {"status": "queued", "progress": None}),
            (1, {}),
            (2, {}),
            (6.5, {}),
            (7, {"status": "succeeded"}),
        ):
            clock[0] = seconds
            watch(answers.SelectionJob.model_validate(JOB | change))
    assert written.getvalue().splitlines() == [
        f"{JOB_ID}: queued",
        f"{JOB_ID}: running, embed 120/600 samples",
        f"{JOB_ID}: running, embed 120/600 samples",
        f"{JOB_ID}: succeeded, embed 120/600 samples",
    ]


def test_progress_in_a_terminal_is_a_bar_for_each_stage() -> None:
    written = io.StringIO()
    with progress.showing(Console(file=written, force_terminal=True, width=80)) as watch:
        watch(answers.SelectionJob.model_validate(JOB))
    assert "embed" in written.getvalue()
    assert "120/600" in written.getvalue()


def test_what_the_client_shows_by_itself_is_nothing_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(httpx.Response(200, json=JOB), httpx.Response(200, json=JOB | {"status": "succeeded"}))
    with Winnow("http://winnow.test", "wnw_key", transport=server) as winnow:
        job = winnow.job("job_1")
        assert job.wait() is job
    assert job.status == "succeeded"
    assert capfd.readouterr() == ("", "")


def test_a_notebook_shows_what_it_is_sent_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    job = answers.SelectionJob.model_validate(JOB | {"error": {"code": "x", "detail": "<script>"}})
    shown: list[str] = []

    class Display:
        def __call__(self, job: Any, display_id: bool) -> "Display":
            shown.append(job._repr_html_())
            return self

        def update(self, job: Any) -> None:
            shown.append(job._repr_html_())

    monkeypatch.setattr(progress, "_notebook_display", lambda: Display())
    server = Server(
        httpx.Response(200, json=job.to_dict()),
        httpx.Response(200, json=JOB),
        httpx.Response(200, json=JOB | {"status": "succeeded"}),
    )
    with Winnow("http://winnow.test", "wnw_key", transport=server) as winnow:
        handle = winnow.job("job_1")
        assert "<script>" not in handle._repr_html_()
        assert "&lt;script&gt;" in handle._repr_html_()
        handle.wait()
    assert [text.count('value="120" max="600"') for text in shown] == [1, 1]
    assert "succeeded" in shown[-1]


@pytest.mark.parametrize("source", ["HERE", "org/name:train"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_dry_run_sends_nothing_of_what_is_not_there_yet(
    server: Server, tmp_path: Any, source: str, place: int
) -> None:
    here = tmp_path / "rows.jsonl"
    here.write_text('{"text": "a"}\n')
    words = ["ds_1", "ds_2"]
    words[place] = str(here) if source == "HERE" else source
    for given in (["--dry-run"], ["--set", "dry_run=true"]):
        done = run("submit", *words, "--model", "m", "--budget", "3", *given)
        assert (done.exit_code, server.requests) == (1, []), done.output
        assert "winnow upload" in done.stderr if source == "HERE" else "winnow import" in done.stderr


def test_a_dry_run_of_datasets_is_planned_by_the_service(server: Server) -> None:
    server.script = [httpx.Response(200, json={"object": "selection_plan", "budget": 3})]
    done = run("submit", "ds_1", "ds_2", "--model", "m", "--budget", "3", "--dry-run", "--json")
    assert json.loads(done.stdout)["budget"] == 3
    assert json.loads(server.requests[0].content)["dry_run"] is True


def test_the_console_of_the_program_is_that_of_its_lists() -> None:
    assert records.out is console.out is jobs.out
