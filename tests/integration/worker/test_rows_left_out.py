"""Rows that cannot be used, from the upload to every form of the result: null, never selected, and with the reason."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.duplicates import random_row, varied
from support.tiny import pool_rows, save_model, target_rows
from support.worker_jobs import MODEL, Datasets, SharedWorker, post
from support.world import JOBS, Json, World

from winnow.verify import Record, verify

TEMPLATE = (
    "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('it was asked to') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)
ROWS, REFUSED, EMPTY, LONG = 60, (0, 31), (30, 59), 7
UNUSABLE = sorted((*REFUSED, *EMPTY))
SMALL: Json = {"budget": 12, "landmarks": {"count": 20}}


@pytest.fixture(scope="module")
def pool(world: World) -> str:
    save_model(world.settings.models.folder / "refusing", template=TEMPLATE)
    rows = pool_rows(ROWS)
    for i in REFUSED:
        rows[i]["messages"][0]["content"] = "refuse"
    for i in EMPTY:
        rows[i]["messages"][-1]["content"] = ""
    rows[LONG]["messages"][0]["content"] = "word " * 500  # loses its beginning, not its reply
    return world.upload(rows)


@pytest.fixture(scope="module")
def job_id(world: World, pool: str, datasets: Datasets, shared: SharedWorker) -> str:
    shared.running()
    warmup = {"samples": ROWS, "batch_size": 8}
    job_id = post(world, pool, datasets.target, model="refusing", warmup=warmup, **SMALL)
    world.succeeded(job_id)
    return job_id


def content(world: World, job_id: str, **params: Any) -> bytes:
    return bytes(world.call("GET", f"{JOBS}/{job_id}/export", params=params).content)


@pytest.mark.usefixtures("worker")
class TestJob:
    def test_the_result_counts_them_by_reason_and_names_them(self, world: World, job_id: str) -> None:
        summary = world.get(f"{job_id}/results")
        found = summary["unusable"]["pool"]
        assert (found["count"], found["by_reason"]) == (4, {"no_reply": 2, "template_refuses": 2})
        assert [(row["index"], row["id"]) for row in found["first"]] == [(i, f"row-{i}") for i in UNUSABLE]
        assert summary["unusable"]["target"]["count"] == 0
        assert any("(listed in unusable): 4 of the pool" in sentence for sentence in summary["sentences"])
        assert sum(summary["influence"]["histogram"]["counts"]) == ROWS - 4
        assert world.events(job_id, "job.unusable") == [summary["unusable"]]
        assert summary["warmup"]["samples"] == ROWS - 4
        assert not set(world.get(f"{job_id}/provenance")["record"]["landmarks"]) & set(UNUSABLE)
        assert not {row["index"] for row in world.selected(job_id)} & set(UNUSABLE)

    def test_their_influence_is_null_in_every_form(self, world: World, job_id: str, tmp_path: Path) -> None:
        rows = world.get(f"{job_id}/weights")["data"]
        assert [row["index"] for row in rows if row["influence"] is None] == UNUSABLE
        assert all((row["weight"], row["exact"]) == (0, False) for row in rows if row["influence"] is None)
        streamed = world.call("GET", f"{JOBS}/{job_id}/weights", params={"stream": True}).text.splitlines()
        assert [json.loads(line) for line in streamed] == rows
        lines = [json.loads(line) for line in content(world, job_id, format="jsonl").splitlines()]
        assert [row["influence"] for row in lines] == [row["influence"] for row in rows]
        cells = list(csv.DictReader(io.StringIO(content(world, job_id, format="csv").decode(), newline="")))
        assert [row["index"] for row in cells if row["influence"] == ""] == [str(i) for i in UNUSABLE]
        table = pq.read_table(io.BytesIO(content(world, job_id, format="parquet", include="messages")))
        assert [i for i, value in enumerate(table["influence"].to_pylist()) if value is None] == UNUSABLE
        record = Record.of_provenance(world.get(f"{job_id}/provenance"))
        for format in ("jsonl", "csv", "parquet"):
            path = tmp_path / f"export.{format}"
            path.write_bytes(content(world, job_id, format=format))
            assert verify(path, record).samples == ROWS

    def test_an_explanation_says_why(self, world: World, job_id: str) -> None:
        for index, reason in ((REFUSED[0], "template_refuses"), (EMPTY[0], "no_reply")):
            sample = world.get(f"{job_id}/samples/{index}")
            explanation = sample["explanation"]
            assert (sample["influence"], sample["selected"], sample["exact"]) == (None, False, False)
            assert (explanation["explained_by"], explanation["reason"]) == ("none", reason)
            assert (explanation["influence"], explanation["targets"]) == (None, None)
            assert ("it was asked to" in explanation["sentence"]) == (reason != "no_reply")
        assert world.get(f"{job_id}/samples/{LONG}")["explanation"]["reason"] is None

    @pytest.mark.parametrize("method", ["exact_influence", "rds_plus", "random"])
    def test_with_the_other_methods_too(self, world: World, pool: str, datasets: Datasets, method: str) -> None:
        request = {"model": "refusing", "pool": pool, "target": datasets.target, "budget": 12, "max_length": 128}
        job_id = world.post(**request, method=method)
        world.succeeded(job_id)
        rows = world.get(f"{job_id}/weights")["data"]
        assert [row["index"] for row in rows if row["influence"] is None] == UNUSABLE
        assert not {row["index"] for row in world.selected(job_id)} & set(UNUSABLE)
        assert world.get(f"{job_id}/samples/{EMPTY[1]}")["explanation"]["reason"] == "no_reply"

    def test_more_than_max_unusable_fail_the_job_early(self, world: World, pool: str, datasets: Datasets) -> None:
        job = world.ended(post(world, pool, datasets.target, model="refusing", max_unusable=0.05, **SMALL))
        error = job["error"]
        assert (job["status"], error["code"], error["stage"]) == ("failed", "too_many_unusable", "prepare")
        assert error["unusable"]["pool"]["by_reason"] == {"no_reply": 2, "template_refuses": 2}
        assert [row["id"] for row in error["unusable"]["pool"]["first"]] == [f"row-{i}" for i in UNUSABLE]


@pytest.mark.usefixtures("worker")
def test_a_target_that_cannot_be_used_fails_early_too(world: World, pool: str) -> None:
    rows = target_rows(5, "python_function")
    rows[0]["messages"][0]["content"] = "refuse"
    job = world.ended(post(world, pool, world.upload(rows), model="refusing", **SMALL))
    assert job["error"]["unusable"]["target"]["count"] == 1


@pytest.mark.usefixtures("worker")
def test_repeats_are_found_left_out_and_explained_and_the_job_is_reproduced(world: World, datasets: Datasets) -> None:
    """Planted: rows of the pool once more, as they are, in capitals and with a changed word; and one of the target."""
    rows = pool_rows(ROWS)
    for number, how in enumerate(("same", "case", "changed")):
        rows.append(random_row(np.random.default_rng(number), f"new-{number}"))
        rows.append(varied(rows[-1], f"again-{number}", how))
    rows.append({**target_rows(1, "python_function")[0], "id": "taken"})
    pool, again, taken = world.upload(rows), [ROWS + 1, ROWS + 3, ROWS + 5], ROWS + 6
    kept = world.post(model=MODEL, pool=pool, target=datasets.target, method="random", budget=40, max_length=128)
    job_id = post(world, pool, datasets.target, duplicates="one", overlap="exclude", **SMALL)
    world.succeeded(kept)
    world.succeeded(job_id)
    of_pool = world.get(f"{kept}/results")
    found = {kind: each["pool"] for kind, each in of_pool["repeats"].items()}
    assert found["duplicates"]["exact"] >= 2
    assert found["duplicates"]["near"] >= 1
    assert found["overlap"]["exact"] >= 1
    assert of_pool["excluded"] is None
    summary = world.get(f"{job_id}/results")
    assert {kind: each["pool"] for kind, each in summary["repeats"].items()} == found
    excluded = {row["index"]: row for row in summary["excluded"]["first"]}
    assert len(excluded) == summary["excluded"]["count"] == sum(summary["excluded"]["by_reason"].values())
    assert [excluded[row]["same_as"] for row in again] == ["new-0", "new-1", "new-2"]
    assert excluded[taken]["reason"] == "overlap"
    weights = world.get(f"{job_id}/weights")["data"]
    assert {row["index"] for row in weights if row["influence"] is None} == excluded.keys()
    assert world.get(f"{job_id}/samples/{taken}")["explanation"]["reason"] == "overlap"
    assert world.get(f"{job_id}/samples/{again[0]}")["explanation"]["reason"] == "duplicate"
    assert {each["level"] for each in summary["verdict"] if each["about"] in ("duplicates", "overlap")} == {"ok"}
    reproduced = world.call("POST", f"{JOBS}/{job_id}/reproduce").json()["id"]
    world.succeeded(reproduced)
    assert world.get(f"{reproduced}/weights")["data"] == weights
    assert world.get(f"{reproduced}/results")["excluded"] == summary["excluded"]
    assert not any(unit["reused"] for unit in world.get(f"{reproduced}/provenance")["record"]["units"])
