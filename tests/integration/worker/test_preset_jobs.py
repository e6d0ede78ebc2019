"""Jobs that name a ready-made target: real workers import it from a hub on loopback, and the record says what it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from support import preset_rows
from support.dataset_hub import DatasetHub
from support.imports import ended
from support.servers import Servers
from support.tiny import pool_rows
from support.worker_jobs import BUDGET, MODEL, PARAMETERS, computing_world
from support.world import DATASETS, Json, World

from service.datasets.presets import PRESETS

COUNT = 12
ALLOWED = sorted({preset.hub.id for preset in PRESETS.values()} - {PRESETS["squad"].hub.id})


@pytest.fixture(scope="module")
def hub() -> Iterator[DatasetHub]:
    with DatasetHub.running() as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
        for name, preset in PRESETS.items():
            made.put(preset.hub.id, preset_rows.repository(name, preset_rows.rows(name, 60)))
        yield made


@pytest.fixture(scope="module")
def world(
    hub: DatasetHub, servers: Servers, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("presets")
    with (
        computing_world(servers, folder, tiny_llama, datasets={"hub": ALLOWED}) as made,
        made.worker("importer", HF_ENDPOINT=hub.url, HF_HOME=str(made.folder / "hf")),
    ):
        yield made


@pytest.fixture(scope="module")
def pool(world: World) -> str:
    return world.upload(pool_rows(BUDGET + 20))


def asked(world: World, pool: str, status: int = 202, **changes: Any) -> Json:
    body = {"model": MODEL, "pool": pool, "budget": BUDGET, **PARAMETERS, **changes}
    answer = world.client.post("/v1/selection-jobs", json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def ready(world: World, dataset_id: str) -> Json:
    dataset = ended(world, dataset_id)
    assert dataset["status"] == "ready", dataset["error"]
    return dataset


def test_a_job_waits_for_its_target_and_its_record_names_preset_dataset_and_commit(
    world: World, hub: DatasetHub, pool: str
) -> None:
    target = {"preset": "gsm8k", "count": COUNT}
    first = asked(world, pool, target=target)
    again = asked(world, pool, target=target)
    assert first["target"] == again["target"]  # whether its import has ended or not
    for job in (first, again):
        now = world.client.get(f"/v1/selection-jobs/{job['id']}", params={"wait": 60}).json()
        assert world.until("the job ends", lambda job=job: _ended(world, job["id"]))["status"] == "succeeded", now
    record = world.client.get(f"/v1/selection-jobs/{first['id']}/provenance").json()["record"]["target"]
    commit = hub.branches["openai/gsm8k", "main"]
    assert (record["id"], record["rows"]) == (first["target"], COUNT)
    assert record["hub"]["preset"] == {"name": "gsm8k", "count": COUNT, "seed": 0}
    assert (record["hub"]["id"], record["hub"]["commit"]) == ("openai/gsm8k", commit)
    assert record["hub"]["template"] == PRESETS["gsm8k"].template
    dataset = ready(world, first["target"])
    assert (dataset["name"], dataset["row_count"], dataset["skipped"]) == (f"preset:gsm8k:{COUNT}", COUNT, 0)
    assert dataset["hub"]["preset"] == record["hub"]["preset"]
    for row in world.client.get(f"{DATASETS}/{first['target']}/rows").json()["data"]:
        number = int(row["id"].removeprefix("gsm8k-")) - 1
        assert [message["content"] for message in row["messages"]] == [
            f"{number} boxes of 3?",
            f"It is {number}*3 = {3 * number}.\n#### {3 * number}",
        ]


def _ended(world: World, job_id: str) -> Json | None:
    job = world.client.get(f"/v1/selection-jobs/{job_id}", params={"wait": 5}).json()
    return dict(job) if job["status"] in ("succeeded", "failed", "cancelled") else None


def test_another_count_seed_or_commit_is_another_dataset(world: World, hub: DatasetHub, pool: str) -> None:
    def target(**more: Any) -> str:
        job = asked(world, pool, target={"preset": "codex", "count": COUNT, **more})
        world.call("POST", f"/v1/selection-jobs/{job['id']}/cancel")
        return str(job["target"])

    old = hub.branches[PRESETS["codex"].hub.id, "main"]
    found = [target(), target(count=9), target(seed=1)]
    hub.put(PRESETS["codex"].hub.id, preset_rows.repository("codex", preset_rows.rows("codex", 61)))
    found.append(target())
    assert len(set(found)) == 4
    assert target(revision=old, count=9) not in found  # asked otherwise, though of the same commit
    assert (target(), target(seed=1, count=9)) == (found[3], target(seed=1, count=9))


@pytest.mark.parametrize("name", ["mmlu", "bbh", "tydiqa", "codex"])
def test_each_preset_is_imported_from_the_split_that_it_names(world: World, pool: str, name: str) -> None:
    job = asked(world, pool, target={"preset": name, "count": COUNT})
    world.call("POST", f"/v1/selection-jobs/{job['id']}/cancel")
    dataset = ready(world, job["target"])
    assert (dataset["row_count"], dataset["skipped"], len(dataset["hub"]["read"]["files"])) == (COUNT, 0, 2)
    groups = 1 if PRESETS[name].spread is None else 3
    assert sorted(dataset["sources"].values()) == [COUNT // groups] * groups


def test_a_plan_is_made_without_an_import(world: World, hub: DatasetHub, pool: str) -> None:
    before, files = world.client.get(DATASETS).json(), list(hub.asked)
    plan = asked(world, pool, 200, target={"preset": "mmlu", "seed": 77}, dry_run=True)
    assert (plan["target"], plan["estimated"]) == ("preset:mmlu:57", True)
    assert plan["tokens"]["target"] > 57
    assert (world.client.get(DATASETS).json(), hub.asked) == (before, files)


@pytest.mark.parametrize(
    ("target", "status", "param", "code"),
    [
        ({"preset": "squad"}, 422, "target.preset", "dataset_not_allowed"),
        ({"preset": "gsm8k", "revision": "nowhere"}, 422, "target.revision", "invalid_request"),
        ({"preset": "gsm8k", "revision": "../x"}, 422, "target.revision", "invalid_request"),
    ],
)
def test_what_cannot_be_imported_is_refused_when_the_job_is_posted(
    world: World, pool: str, target: Json, status: int, param: str, code: str
) -> None:
    found = asked(world, pool, status, target=target)
    assert (found["param"], found["code"]) == (param, code)


def test_rows_of_another_form_fail_the_job_with_what_is_wrong(world: World, hub: DatasetHub, pool: str) -> None:
    id = PRESETS["tydiqa"].hub.id
    made = preset_rows.repository("tydiqa", [{**row, "id": None} for row in preset_rows.rows("tydiqa", 4)])
    commit = hub.put(id, made, branch="other")
    job = asked(world, pool, target={"preset": "tydiqa", "count": 4, "revision": "other"})
    failed = world.until("the job fails", lambda: _ended(world, job["id"]))
    assert failed["status"] == "failed"
    assert f"row 1 of {id} has no id" in failed["error"]["detail"], commit
    again = asked(world, pool, target={"preset": "tydiqa", "count": 4, "revision": "other"})
    assert again["target"] != job["target"]  # a failed import is none to wait for
