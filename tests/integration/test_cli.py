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
from typer.testing import CliRunner, Result
from worker_world import until

from service.cli import app
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


def typed(*words: str, home: Path | None = None) -> Result:
    """As `winnow`, in this process: a new one takes a second to start."""
    environment = {"COLUMNS": "200", "WINNOW_HOME": None if home is None else str(home)}
    return CliRunner().invoke(app, words, env=environment)


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


def test_a_job_is_reproduced_bit_for_bit_and_computes_everything_anew(home: Path, job: str) -> None:
    done = typed("reproduce", job, "--json", home=home)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["equal"], found["is_same"], found["shared_artifacts"], found["differs"]) == (True, True, 0, {})
    again = found["second"]
    record = json.loads(typed("provenance", again, home=home).stdout)["record"]
    assert record["reproduces"] == job
    assert not any(unit["reused"] for unit in record["units"])
    of_first = json.loads(typed("provenance", job, home=home).stdout)["record"]
    for of in (record, of_first):
        assert {"all_packages_sha256", "torch"} <= of["versions"].keys()
        assert of["model"]["tokenizer_fingerprint"] == record["model"]["tokenizer_fingerprint"] is not None
        assert (of["seed"], len(of["landmarks"])) == (0, 12)
    told = [
        event
        for event in json.loads(typed("events", again, "--json", home=home).stdout)
        if "differences" in event["data"]
    ]
    assert [(event["type"], event["data"]) for event in told] == [("job.reproduction", {"differences": {}})]
    assert "bit for bit" in typed("compare", job, again, home=home).stdout
    entries = json.loads(typed("audit", "--object", again, "--json", home=home).stdout)
    assert entries[-1]["action"] == "selection_job.reproduced"
    assert entries[-1]["detail"] == {"reproduces": job}


def test_with_another_model_under_its_name_a_job_is_not_reproduced(home: Path, job: str) -> None:
    config = home / "models" / "tiny" / "config.json"
    kept = config.read_bytes()
    config.write_bytes(kept + b"\n")
    try:
        done = typed("reproduce", job, home=home)
    finally:
        config.write_bytes(kept)
    assert done.exit_code == 1
    assert "config.json differs" in done.stderr


def test_a_download_is_verified(home: Path, job: str, tmp_path: Path) -> None:
    for words in (["all.parquet"], ["selection.parquet", "--selected-only", "--messages"], ["all.csv"], ["all.jsonl"]):
        path = str(tmp_path / words[0])
        assert typed("export", job, path, *words[1:], home=home).exit_code == 0
        of_job = [] if path.endswith(".parquet") else ["--job", job]
        done = typed("verify", path, *of_job, "--json", home=home)
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["verified"]
    record = tmp_path / "provenance.json"
    record.write_text(typed("provenance", job, home=home).stdout)
    away = ["verify", str(tmp_path / "all.csv"), "--provenance", str(record)]
    assert "all 40 samples" in typed(*away).stdout
    altered = (tmp_path / "all.csv").read_bytes().replace(b"false,false", b"true,false", 1)
    (tmp_path / "all.csv").write_bytes(altered)
    for words in (away, ["verify", str(tmp_path / "all.csv"), "--job", job]):
        done = typed(*words, home=home)
        assert done.exit_code == 3
        assert "is not what the job has found" in done.stderr
    assert "in the rows 0 to 39" in done.stderr
    done = typed("verify", str(tmp_path / "all.jsonl"), home=home)
    assert (done.exit_code, "--job" in done.stderr) == (1, True)


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
