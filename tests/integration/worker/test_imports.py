"""Imports from a hub on loopback, by real workers: the same rows as an upload of the files, from a commit that is pinned."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from sqlalchemy import update
from support.dataset_hub import DatasetHub
from support.imports import ask, card, ended, get, lines, parquet
from support.processes import Process
from support.servers import Servers
from support.tiny import pool_rows, target_rows
from support.worker_jobs import computing_world, post
from support.world import DATASETS, Json, World, serving
from typer.testing import CliRunner

from service.auth.tables import ApiKey
from winnow import ImportFailed, Winnow
from winnow.cli.main import app as program

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}", "source": f"s{i % 3}"} for i in range(60)]
UPLOADS = {"max_rows": 500, "max_bytes": 2**20}


@pytest.fixture(scope="module")
def hub() -> Iterator[DatasetHub]:
    with DatasetHub.running() as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_TOKEN", "hf_of_the_operator")
        patch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
        yield made


@pytest.fixture(scope="module")
def world(
    hub: DatasetHub, servers: Servers, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("imports")
    with computing_world(servers, folder, tiny_llama, datasets={"hub": ["org/*"]}, uploads=UPLOADS) as made:
        yield made


def importer(world: World, hub: DatasetHub, name: str) -> Any:
    """A context in which a worker runs that finds the hub."""
    return world.worker(name, HF_ENDPOINT=hub.url, HF_HOME=str(world.folder / f"{name}-hf"))


@pytest.fixture(scope="module")
def importers(world: World, hub: DatasetHub) -> Iterator[ExitStack]:
    """Holds the worker of all tests that leave it alive; the others close it, and who needs it next starts another."""
    with ExitStack() as running:
        yield running


@pytest.fixture
def worker(world: World, hub: DatasetHub, importers: ExitStack, running: list[Process]) -> Process:
    if not running:
        running.append(importers.enter_context(importer(world, hub, "importer")))
    return running[0]


@pytest.fixture(scope="module")
def running() -> list[Process]:
    return []


@pytest.fixture
def _no_worker(importers: ExitStack, running: list[Process]) -> None:
    importers.close()
    running.clear()


def imported(world: World, **source: Any) -> Json:
    dataset = ended(world, ask(world, **source)["id"])
    assert dataset["status"] == "ready", dataset["error"]
    return dataset


def refused(world: World, **source: Any) -> Json:
    dataset = ended(world, ask(world, **source)["id"])
    assert dataset["status"] == "failed"
    assert dataset["fingerprint"] is dataset["row_count"] is dataset["progress"] is None
    return dict(dataset["error"])


def uploaded(world: World, rows: list[Json], **params: Any) -> Json:
    answer = world.call("POST", DATASETS, params={"name": "same", **params}, content=lines(rows))
    return dict(answer.json())


SAME = ("fingerprint", "row_count", "byte_count", "sources", "skipped")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("jsonl", {"train.jsonl": lines(ROWS)}),
        ("parquet-in-parts", {"data/train-0.parquet": parquet(ROWS[:25]), "data/train-1.parquet": parquet(ROWS[25:])}),
        (
            "gzip-in-parts",
            {"train/a.jsonl.gz": gzip.compress(lines(ROWS[:40])), "train/b.jsonl.gz": gzip.compress(lines(ROWS[40:]))},
        ),
    ],
)
def test_an_import_has_the_rows_and_the_fingerprint_of_an_upload(
    world: World, hub: DatasetHub, worker: Process, name: str, files: dict[str, bytes]
) -> None:
    commit = hub.put(f"org/{name}", {**files, "README.md": card(license="mit"), "loader.py": b"raise SystemExit"})
    asked = ask(world, id=f"org/{name}", split="train")
    assert (asked["status"], asked["row_count"], asked["hub"]["commit"]) == ("importing", None, commit)
    dataset, same = ended(world, asked["id"]), uploaded(world, ROWS)
    assert {key: dataset[key] for key in SAME} == {key: same[key] for key in SAME}
    assert dataset["detected"]["forms"] == same["detected"]["forms"]
    assert dataset["hub"]["read"]["config"] == "default"
    assert [file["path"] for file in dataset["hub"]["read"]["files"]] == sorted(files)
    rows = world.call("GET", f"{DATASETS}/{dataset['id']}/rows", params={"limit": 2}).json()["data"]
    assert rows[1]["messages"][0]["content"] == "question 1"
    assert "loader.py" not in hub.asked


def test_columns_template_and_limit_are_those_of_an_upload(world: World, hub: DatasetHub, worker: Process) -> None:
    rows = [{"frage": f"f{i}", "antwort": f"a{i}", "wahl": ["x", "y"]} for i in range(30)]
    hub.put("org/named", {"train/1.jsonl": lines(rows[:20]), "train/2.jsonl": lines(rows[20:])})
    columns, template = (
        {"prompt": "frage", "completion": "antwort"},
        {"user": "{{ frage }}", "assistant": "{{ wahl[1] }}"},
    )
    taken = [
        imported(world, id="org/named", split="train", columns=columns, limit=25),
        imported(world, id="org/named", split="train", template=template, limit=7),
    ]
    same = [
        uploaded(world, rows[:25], columns=json.dumps(columns)),
        uploaded(world, rows[:7], template=json.dumps(template)),
    ]
    assert [each["fingerprint"] for each in taken] == [each["fingerprint"] for each in same]


def test_rows_are_skipped_and_reported_by_their_number_in_all_files(
    world: World, hub: DatasetHub, worker: Process
) -> None:
    hub.put(
        "org/bad", {"train/a.jsonl": lines(ROWS[:5]), "train/b.jsonl": lines([{"prompt": "no answer"}, *ROWS[5:9]])}
    )
    error = refused(world, id="org/bad", split="train")
    assert (error["code"], [fault["param"] for fault in error["errors"]]) == ("invalid_rows", ["row 6"])
    dataset = imported(world, id="org/bad", split="train", on_bad_row="skip")
    assert (dataset["row_count"], dataset["skipped"]) == (9, 1)
    report = world.call("GET", f"{DATASETS}/{dataset['id']}/skipped").text
    assert [json.loads(line)["number"] for line in report.splitlines()] == [6]


@pytest.mark.usefixtures("_no_worker")
def test_the_revision_is_pinned_while_the_branch_moves(world: World, hub: DatasetHub) -> None:
    first = hub.put("org/moving", {"train.jsonl": lines(ROWS[:10])})
    asked = ask(world, id="org/moving", split="train")
    second = hub.put("org/moving", {"train.jsonl": lines(ROWS[:20])})
    with importer(world, hub, "pinned"):
        dataset = ended(world, asked["id"])
        assert (dataset["row_count"], dataset["hub"]["commit"]) == (10, first)
        assert imported(world, id="org/moving", split="train")["hub"]["commit"] == second
        assert imported(world, id="org/moving", revision=first)["fingerprint"] == dataset["fingerprint"]


SPLITS = [{"split": "train", "path": "s/train.jsonl"}, {"split": "test", "path": "s/test.jsonl"}]
CONFIGS = [{"config_name": "small", "data_files": SPLITS}, {"config_name": "large", "data_files": "l/*.jsonl"}]


def test_what_is_not_there_is_told_with_what_is(world: World, hub: DatasetHub, worker: Process) -> None:
    files = {"s/train.jsonl": lines(ROWS[:3]), "s/test.jsonl": lines(ROWS[3:5]), "l/all.jsonl": lines(ROWS)}
    hub.put("org/configs", {**files, "README.md": card(configs=CONFIGS)})
    for source, code, told in (
        ({}, "config_not_found", ("'small'", "'large'")),
        ({"config": "none"}, "config_not_found", ("'none'", "'small'", "'large'")),
        ({"config": "small"}, "split_not_found", ("'train'", "'test'")),
        ({"config": "small", "split": "none"}, "split_not_found", ("'none'", "'train'", "'test'")),
    ):
        error = refused(world, id="org/configs", **source)
        assert error["code"] == code
        assert all(name in error["detail"] for name in told), error["detail"]
    assert imported(world, id="org/configs", config="small", split="test")["row_count"] == 2
    assert imported(world, id="org/configs", config="large")["row_count"] == len(ROWS)


def configured(**config: Any) -> bytes:
    return card(configs=[{"config_name": "x", **config}])


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "an archive": ({"a.zip": b"PK", "run.py": b""}, "no_data_files"),
    "a file elsewhere": (
        {"train.jsonl": b"", "README.md": configured(data_files="https://example.com/a.jsonl")},
        "dataset_not_usable",
    ),
    "a file above": ({"train.jsonl": b"", "README.md": configured(data_files="../../*.jsonl")}, "dataset_not_usable"),
    "a field": (
        {"train.json": b"{}", "README.md": configured(data_files="*.json", field="data")},
        "dataset_not_usable",
    ),
    "no rows": ({"train.jsonl": b"not json\n"}, "invalid_rows"),
    "too many rows": ({"train/a.jsonl": lines(ROWS * 4), "train/b.jsonl": lines(ROWS * 5)}, "upload_too_large"),
    "too many bytes": ({"train.jsonl": b" " * (UPLOADS["max_bytes"] + 1)}, "upload_too_large"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_imported_says_why(world: World, hub: DatasetHub, worker: Process, what: str) -> None:
    files, code = REFUSED[what]
    id = f"org/{what.replace(' ', '-')}"
    hub.put(id, files)
    assert refused(world, id=id)["code"] == code


def test_a_hub_that_delivers_something_else_or_nothing_is_asked_again_and_told_of(
    world: World, hub: DatasetHub, worker: Process
) -> None:
    hub.put("org/lies", {"lies.parquet": parquet(ROWS)})
    hub.lies["lies.parquet"] = parquet(ROWS)[::-1]
    assert refused(world, id="org/lies")["code"] == "hub_unavailable"
    assert hub.asked.count("lies.parquet") == world.settings.ledger.max_attempts


@pytest.mark.usefixtures("_no_worker")
def test_a_killed_worker_costs_an_attempt_and_changes_nothing(world: World, hub: DatasetHub) -> None:
    hub.put("org/killed", {"train/first.jsonl": lines(ROWS[:30]), "train/slow.jsonl": lines(ROWS[30:])})
    hub.held["train/slow.jsonl"] = threading.Event()
    dataset_id = ask(world, id="org/killed", split="train")["id"]
    with importer(world, hub, "killed") as first:
        world.until("the second file is being downloaded", lambda: "train/slow.jsonl" in hub.asked)
        progress = world.until("it reports", lambda: (get(world, dataset_id)["progress"] or {}).get("bytes"))
        assert progress >= len(lines(ROWS[:30]))
        first.kill()
    hub.held["train/slow.jsonl"].set()
    with importer(world, hub, "second"):
        dataset = ended(world, dataset_id)
    assert dataset["status"] == "ready", dataset["error"]
    assert dataset["fingerprint"] == uploaded(world, ROWS)["fingerprint"]
    assert hub.asked.count("train/first.jsonl") == 2


def test_a_deleted_import_ends(world: World, hub: DatasetHub, worker: Process) -> None:
    hub.put("org/deleted", {"deleted.jsonl": lines(ROWS)})
    hub.held["deleted.jsonl"] = threading.Event()
    dataset_id = ask(world, id="org/deleted")["id"]
    world.until("it is being downloaded", lambda: "deleted.jsonl" in hub.asked)
    process = next(
        pid for pid in worker.children() if "worker.tasks.process" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    world.call("DELETE", f"{DATASETS}/{dataset_id}")
    world.until("its process has gone", lambda: process not in worker.children())
    assert world.client.get(f"{DATASETS}/{dataset_id}").status_code == 404
    hub.held["deleted.jsonl"].set()
    hub.put("org/after", {"a.jsonl": lines(ROWS[:4])})
    assert imported(world, id="org/after")["row_count"] == 4


def test_a_job_on_datasets_that_are_being_imported_waits_for_them(
    world: World, hub: DatasetHub, worker: Process
) -> None:
    pool, target = pool_rows(60), target_rows(8, "python_function")
    hub.put("org/pool", {"pool.jsonl": lines(pool)})
    hub.put("org/target", {"target.jsonl": lines(target)})
    hub.held["pool.jsonl"] = threading.Event()
    pool_id, target_id = (ask(world, id=f"org/{name}")["id"] for name in ("pool", "target"))
    job_id = post(world, pool_id, target_id, budget=0.25, landmarks={"count": 20})
    job = world.get(job_id)
    assert (job["status"], job["budget"], job["stages"]) == ("queued", None, [])
    assert set(world.events(job_id, "job.waiting")[0]["datasets"]) >= {pool_id}
    dry = world.client.post("/v1/selection-jobs", json={**_request(pool_id, target_id), "dry_run": True})
    assert (dry.status_code, dry.json()["code"]) == (409, "dataset_not_ready")
    assert world.client.get(f"{DATASETS}/{pool_id}/rows").status_code == 409
    assert world.client.delete(f"{DATASETS}/{pool_id}").json()["code"] == "dataset_in_use"
    hub.held["pool.jsonl"].set()
    job = world.succeeded(job_id)
    assert job["budget"] == len(world.selected(job_id)) == 15
    assert len(world.events(job_id, "job.planned")) == 2
    record = world.get(f"{job_id}/provenance")["record"]
    assert record["pool"]["hub"]["commit"] == hub.branches["org/pool", "main"]
    assert record["pool"]["hub"]["read"]["files"][0]["path"] == "pool.jsonl"
    assert record["target"]["fingerprint"] == uploaded(world, target)["fingerprint"]


def _request(pool: str, target: str) -> Json:
    return {"model": "tiny-llama", "pool": pool, "target": target, "budget": 0.25}


def test_a_job_fails_with_the_import_that_it_waits_for(world: World, hub: DatasetHub, worker: Process) -> None:
    target_id = uploaded(world, target_rows(8, "python_function"))["id"]
    hub.put("org/few", {"few.jsonl": lines(ROWS[:3])})
    hub.put("org/broken", {"broken.jsonl": b"nothing\n"})
    for name in ("few", "broken"):
        hub.held[f"{name}.jsonl"] = threading.Event()
    few, broken = (ask(world, id=f"org/{name}")["id"] for name in ("few", "broken"))
    too_large, failing = post(world, few, target_id, budget=40), post(world, broken, target_id)
    cancelled = post(world, broken, target_id)
    assert world.cancel(cancelled)["status"] == "cancelled"
    for name in ("few", "broken"):
        hub.held[f"{name}.jsonl"].set()
    job = world.ended(failing)
    assert (job["status"], job["error"]["code"], job["started_at"]) == ("failed", "dataset_failed", None)
    assert broken in job["error"]["detail"]
    job = world.ended(too_large)
    assert job["status"] == "failed"
    assert "40" in job["error"]["detail"]
    answer = world.client.post("/v1/selection-jobs", json=_request(broken, target_id))
    assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (422, "dataset_failed", "pool")
    world.call("DELETE", f"{DATASETS}/{broken}")


def test_what_is_asked_amiss_is_refused_at_once(world: World, hub: DatasetHub) -> None:
    hub.put("org/there", {"a.jsonl": lines(ROWS)})
    hub.put("other/there", {"a.jsonl": lines(ROWS)})
    for source, param in (
        ({"id": "other/there"}, "hub.id"),
        ({"id": "org/absent"}, "hub.id"),
        ({"id": "org/there", "revision": "absent"}, "hub.revision"),
        ({"id": "org/there", "revision": "../x"}, "hub.revision"),
        ({"id": "nothing"}, "hub.id"),
        ({"id": "org/there", "limit": 0}, "hub.limit"),
        ({"id": "org/there", "nonsense": 1}, "hub.nonsense"),
        ({"id": "org/there", "columns": {"nonsense": "a"}}, "columns"),
        ({"id": "org/there", "template": {"user": "{{ a"}}, "template"),
    ):
        assert ask(world, 422, **source)["param"].startswith(param), source
    missing = world.client.post(DATASETS, content=lines(ROWS))
    assert (missing.status_code, missing.json()["param"]) == (422, "name")
    not_json = world.client.post(DATASETS, content=b"{", headers={"Content-Type": "application/json"})
    assert not_json.status_code == 422


def test_another_tenant_sees_nothing_and_a_repeated_request_imports_once(
    world: World, hub: DatasetHub, worker: Process
) -> None:
    hub.put("org/mine", {"a.jsonl": lines(ROWS)})
    key = {"Idempotency-Key": "import-once"}
    first, again = (world.client.post(DATASETS, json={"hub": {"id": "org/mine"}}, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    dataset_id = first.json()["id"]
    assert world.other.get(f"{DATASETS}/{dataset_id}").status_code == 404
    assert world.other.delete(f"{DATASETS}/{dataset_id}").status_code == 404
    assert ended(world, dataset_id)["status"] == "ready"
    listed = world.client.get(DATASETS).json()["data"]
    assert [each["hub"]["id"] for each in listed if each["id"] == dataset_id] == ["org/mine"]


def test_the_hub_alone_sees_its_token(world: World, hub: DatasetHub, worker: Process) -> None:
    hub.put("org/token", {"a.jsonl": lines(ROWS[:2])})
    hub.tokens.clear()
    dataset = imported(world, id="org/token")
    assert hub.tokens.keys() - {None} == {"Bearer hf_of_the_operator"}
    assert "hf_of" not in json.dumps(dataset)
    assert "hf_of" not in worker.log.read_text()


def test_a_key_that_may_store_no_more_imports_no_more(world: World, hub: DatasetHub, worker: Process) -> None:

    hub.put("org/quota", {"a.jsonl": lines(ROWS)})
    size = uploaded(world, ROWS)["byte_count"]
    stored = sum(each["byte_count"] or 0 for each in world.client.get(DATASETS, params={"limit": 100}).json()["data"])
    prefix = world.key.split("_")[1]
    with world.sessions.begin() as session:
        limit = {"stored_bytes": stored + size // 2}
        assert session.execute(update(ApiKey).where(ApiKey.prefix == prefix).values(limits=limit)).rowcount == 1
    try:
        assert refused(world, id="org/quota")["code"] == "quota_exceeded"
    finally:
        with world.sessions.begin() as session:
            session.execute(update(ApiKey).where(ApiKey.prefix == prefix).values(limits={}))


def test_client_and_command_line_import_and_wait(world: World, hub: DatasetHub, worker: Process) -> None:
    hub.put("org/client", {"a.jsonl": lines([{"frage": f"f{i}", "antwort": "a"} for i in range(9)])})
    seen: list[Json] = []
    with serving(world.app) as url, Winnow(url, world.key) as client:
        asked = client.import_dataset("org/client", columns="prompt:frage,completion:antwort", limit=5, name="mine")
        dataset = client.imported(asked["id"], on_update=seen.append)
        assert (dataset["name"], dataset["row_count"], seen[-1]) == ("mine", 5, dataset)
        broken = client.import_dataset("org/client")
        with pytest.raises(ImportFailed) as caught:
            client.imported(broken["id"])
        assert (caught.value.code, caught.value.errors[0]["param"]) == ("invalid_rows", "row 1")
        command = ["import", "org/client", "--columns", "prompt:frage,completion:antwort", "--json"]
        told = CliRunner().invoke(program, ["--url", url, "--api-key", world.key, *command])
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["row_count"] == 9
        refused = CliRunner().invoke(program, ["--url", url, "--api-key", world.key, "import", "org/client"])
        assert refused.exit_code == 1
        assert "row 1" in refused.stderr
