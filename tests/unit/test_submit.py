"""What `winnow submit` sends for each way in which a pool and a target can be named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from support.scripted_server import Server
from typer.testing import CliRunner

from winnow import Winnow
from winnow.cli import jobs
from winnow.cli.console import cli_errors
from winnow.cli.main import app

JOB = httpx.Response(202, json={"id": "job_1"})
IMPORTING = {"id": "ds_9", "status": "importing", "row_count": None, "detected": None, "skipped": 0}
OPTIONS = ["--model", "m", "--budget", "3", "--json"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    @contextmanager
    def connected() -> Iterator[Winnow]:
        with cli_errors(), Winnow("http://winnow.test/", "wnw_key", transport=server) as client:
            yield client

    monkeypatch.setattr(jobs, "connected", connected)
    return server


def submit(*words: str) -> Result:
    return CliRunner().invoke(app, ["submit", *words, *OPTIONS], env={"COLUMNS": "200"})


def run(*words: str) -> Result:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done


def sent(server: Server) -> list[tuple[str, Any]]:
    return [(request.url.path, json.loads(request.content)) for request in server.requests]


@pytest.mark.parametrize(
    ("word", "target"),
    [("preset:gsm8k", {"preset": "gsm8k"}), ("preset:bbh:27", {"preset": "bbh", "count": 27}), ("ds_2", "ds_2")],
)
def test_a_preset_and_a_dataset_are_sent_as_they_are_named(server: Server, word: str, target: Any) -> None:
    server.script = [JOB]
    done = submit("ds_1", word)
    assert done.exit_code == 0, done.output
    assert sent(server) == [("/v1/selection-jobs", {"model": "m", "budget": 3, "pool": "ds_1", "target": target})]


def test_what_to_do_with_repeats_is_sent_where_it_is_said(server: Server) -> None:
    server.script = [JOB]
    done = submit("ds_1", "ds_2", "--duplicates", "one", "--overlap", "exclude")
    assert done.exit_code == 0, done.output
    ((_, request),) = sent(server)
    assert (request["duplicates"], request["overlap"]) == ("one", "exclude")
    assert submit("ds_1", "ds_2", "--overlap", "one").exit_code == 2


def test_what_a_job_is_called_is_sent_and_searched_and_changed(server: Server) -> None:
    name, labels = "Größe [1]", {"team": "search", "example.org/a": "x=y"}
    words = ["--label", "team=search", "--label", "example.org/a=x=y"]
    server.script = [JOB]
    assert submit("ds_1", "ds_2", "--name", name, *words).exit_code == 0
    ((_, request),) = sent(server)
    assert (request["name"], request["labels"]) == (name, labels)
    job = {"id": "job_1", "status": "queued", "name": name, "labels": labels}
    page = httpx.Response(200, json={"data": [job], "has_more": False, "last_id": "job_1"})
    server.script, server.requests[:] = [page], []
    listed = run("jobs", "ls", "--name", "größe", "--status", "queued", *words)
    assert name in listed.output
    assert server.requests[0].url.params.multi_items() == [
        *[("status", "queued"), ("name", "größe")],
        *[("label", "team:search"), ("label", "example.org/a:x=y")],
    ]
    server.script, server.requests[:] = [httpx.Response(200, json=job)] * 2, []
    run("jobs", "change", "job_1", "--no-name", "--label", "team=", "--unlabel", "old")
    run("jobs", "change", "job_1", "--name", "new")
    assert [request.method for request in server.requests] == ["PATCH", "PATCH"]
    assert [body for _, body in sent(server)] == [{"name": None, "labels": {"old": None, "team": ""}}, {"name": "new"}]


@pytest.mark.parametrize("words", [["--label", "team"], ["--label", "a=1", "--label", "a=2"]])
def test_a_label_that_says_nothing_or_two_things_is_refused(server: Server, words: list[str]) -> None:
    assert submit("ds_1", "ds_2", *words).exit_code != 0
    assert server.requests == []


def test_a_dataset_of_the_hub_is_imported_and_the_job_does_not_wait_for_it(server: Server) -> None:
    server.script = [httpx.Response(202, json=IMPORTING), JOB]
    done = submit("org/name@v1:main:train", "preset:mmlu", "--columns", "prompt:q,completion:a")
    assert done.exit_code == 0, done.output
    hub = {"id": "org/name", "revision": "v1", "config": "main", "split": "train"}
    assert sent(server) == [
        ("/v1/datasets", {"hub": {**hub, "columns": {"prompt": "q", "completion": "a"}}, "name": None}),
        ("/v1/selection-jobs", {"model": "m", "budget": 3, "pool": "ds_9", "target": {"preset": "mmlu"}}),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pool.jsonl", "preset:gsm8k"], "No such file"),
        (["HERE", "nowhere.jsonl"], "No such file"),
        (["HERE", "org/name"], "org/name:train"),
        (["HERE", "preset:gsm8k:x"], "preset:gsm8k:48"),
        (["preset:gsm8k", "HERE"], "presets are targets"),
        (["HERE", "preset:gsm8k", "--target-template", "{}"], "--target-template"),
        (["HERE", "ds_1", "--target-columns", "prompt:q"], "--target-columns"),
        (["ds_1", "preset:gsm8k", "--format", "text"], "--format"),
    ],
)
def test_a_slip_is_refused_before_anything_is_sent(
    server: Server, tmp_path: Path, words: list[str], message: str
) -> None:
    here = tmp_path / "pool.jsonl"
    here.write_text('{"text": "a"}\n')
    done = submit(*(str(here) if word == "HERE" else word for word in words))
    assert (done.exit_code, server.requests) == (1, [])
    assert done.stderr.startswith("winnow: ")
    assert message in done.stderr
