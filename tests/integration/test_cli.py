"""The commands against a stack that runs, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import pool_rows, target_rows, write_jsonl
from worker_world import until

from service.local import StackProcess

Run = Callable[..., subprocess.CompletedProcess[str]]
WINNOW = Path(sys.executable).with_name("winnow")
SMALL = ["landmarks.count=12", "embedding.blocks=2", "gradient.projection_dim=512", "max_length=128"]
SET = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Path]:
    """The home of a running stack."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_llama, folder / "models" / "tiny")
    process = StackProcess(folder, port=0, workers=1)
    try:
        process.wait_ready()
        yield folder
    finally:
        process.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    pool = write_jsonl(folder / "pool.jsonl", pool_rows(40))
    return str(pool), str(write_jsonl(folder / "target.jsonl", target_rows(4, "python_function")))


def winnow(*words: str, home: Path | None = None, columns: int = 200) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    environment |= {"COLUMNS": str(columns)} | ({} if home is None else {"WINNOW_HOME": str(home)})
    return subprocess.run([WINNOW, *words], capture_output=True, text=True, env=environment, timeout=200, check=False)


@pytest.fixture(scope="module")
def job(home: Path, files: tuple[str, str]) -> str:
    """The id of a job that was posted with --wait and has succeeded."""
    options = ["--model", "tiny", "--budget", "6", *SET, "--wait", "--json"]
    done = winnow("submit", *files, *options, home=home)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["status"] == "succeeded"
    return str(job["id"])


def test_status_jobs_and_results_print_json(home: Path, job: str) -> None:
    assert json.loads(winnow("status", job, "--json", home=home).stdout)["id"] == job
    assert job in [each["id"] for each in json.loads(winnow("jobs", "--json", home=home).stdout)]
    assert json.loads(winnow("results", job, "--json", home=home).stdout)["selected_count"] == 6


def test_status_and_results_for_people(home: Path, job: str) -> None:
    assert f"{job}: succeeded" in winnow("status", job, home=home).stdout
    shown = winnow("results", job, home=home).stdout
    assert "The first 6 selected" in shown
    assert "row-" in shown


def test_a_sample_is_explained(home: Path, job: str) -> None:
    rows = [json.loads(winnow("explain", job, str(index), "--json", home=home).stdout) for index in (0, 1)]
    assert [row["index"] for row in rows] == [0, 1]
    shown = winnow("explain", job, "0", "--target", "2", home=home).stdout
    assert rows[0]["id"] in shown
    assert f"on target 2 {rows[0]['explanation']['targets']['data'][2]['influence']:.4f}" in shown
    beyond = winnow("explain", job, "40", home=home)
    assert (beyond.returncode, beyond.stdout) == (1, "")
    assert "of index 0 to 39" in beyond.stderr


def test_events_and_jobs_for_people(home: Path, job: str) -> None:
    events = [line.split()[1] for line in winnow("events", job, home=home).stdout.splitlines()]
    assert events[:2] == ["job.queued", "job.planned"]
    assert events[-1] == "job.succeeded"
    assert json.loads(winnow("events", job, "--json", home=home).stdout)[1]["data"]["stages"]
    assert job in winnow("jobs", home=home, columns=80).stdout  # whole, to be copied


def test_export_writes_what_the_name_says(home: Path, job: str, tmp_path: Path) -> None:
    path = tmp_path / "[out].parquet"
    done = winnow("export", job, str(path), "--selected-only", "--messages", home=home)
    assert (done.returncode, done.stdout) == (0, f"Wrote {path}\n")
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 6
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_a_job_is_cancelled(home: Path, files: tuple[str, str]) -> None:
    done = winnow("submit", *files, "--model", "tiny", "--budget", "6", *SET, "--set", "seed=7", "--json", home=home)
    posted = json.loads(done.stdout)["id"]
    assert json.loads(winnow("cancel", posted, "--json", home=home).stdout)["id"] == posted
    over = ("cancelled", "succeeded")
    until("it ended", lambda: json.loads(winnow("status", posted, "--json", home=home).stdout)["status"] in over)


def test_a_failed_job_is_told(home: Path, files: tuple[str, str]) -> None:
    (home / "models" / "empty").mkdir()
    shutil.copy(home / "models" / "tiny" / "config.json", home / "models" / "empty")
    done = winnow("submit", *files, "--model", "empty", "--budget", "6", *SET, "--wait", home=home)
    assert done.returncode == 1
    assert done.stderr.startswith("winnow: model_not_usable: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "job_none"], "No selection job"),
        (["submit", "POOL", "TARGET", "--model", "[/red]", "--budget", "6"], "'[/red]' is not a hub id"),
        (["results", "job_none"], "No selection job"),
        (["cancel", "job_none"], "No selection job"),
        (["export", "job_none", "out.txt"], "out.txt ends in none of"),
        (["submit", "/nowhere", "/nowhere", "--model", "tiny", "--budget", "6"], "No such file"),
        (["submit", "POOL", "TARGET", "--model", "absent", "--budget", "6"], "No model is registered as 'absent'"),
        (["submit", "POOL", "TARGET", "--model", "tiny", "--budget", "x"], "--budget x: a number of samples"),
        (
            ["submit", "POOL", "TARGET", "--model", "tiny", "--budget", "6", "--set", "model.revision=x"],
            "model is set to",
        ),
        (["submit", "POOL", "TARGET", "--model", "tiny", "--budget", "6", "--set", "seed"], "write NAME=VALUE"),
    ],
)
def test_a_mistake_is_told_in_a_line(home: Path, files: tuple[str, str], words: list[str], message: str) -> None:
    done = winnow(*({"POOL": files[0], "TARGET": files[1]}.get(word, word) for word in words), home=home)
    assert done.returncode == 1
    assert done.stderr.startswith("winnow: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("command", ["jobs", "down"])
def test_without_a_stack_it_is_said(tmp_path: Path, command: str) -> None:
    done = winnow(command, home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"winnow: no stack runs from {tmp_path}")


def test_select_runs_without_a_stack_and_reuses_its_cache(
    tiny_llama: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    outputs = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.jsonl"
        words = ["--model", str(tiny_llama), "--pool", files[0], "--target", files[1], "--budget", "6"]
        done = winnow("select", *words, *SET, "--cache", str(tmp_path / "cache"), "--out", str(out), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["budget"] == 6
        outputs.append((out.read_bytes(), sorted((tmp_path / "cache").rglob("*.safetensors"))))
    assert outputs[0] == outputs[1]
    assert sum(json.loads(line)["selected"] for line in outputs[0][0].splitlines()) == 6
