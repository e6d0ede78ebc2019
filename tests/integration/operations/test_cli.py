"""The commands against a stack that runs, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.tiny import pool_rows, target_rows, write_jsonl
from support.waiting import until
from typer.testing import CliRunner, Result

from service.local.stack import StackProcess
from winnow import marked_text
from winnow.cli.main import app

WINNOW = Path(sys.executable).with_name("winnow")
SMALL = ["landmarks.count=12", "gradient.projection_dim=512", "max_length=128"]
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


def winnow(*words: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed program in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    environment |= {"COLUMNS": "200"} | ({} if home is None else {"WINNOW_HOME": str(home)})
    return subprocess.run([WINNOW, *words], capture_output=True, text=True, env=environment, timeout=200, check=False)


def typed(*words: str, home: Path | None = None, columns: int = 200) -> Result:
    """The same in this process, which is faster."""
    environment = {"COLUMNS": str(columns), "WINNOW_HOME": None if home is None else str(home)}
    return CliRunner().invoke(app, words, env=environment)


def answer(*words: str, home: Path | None = None) -> Any:
    done = typed(*words, "--json", home=home)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def job(home: Path, files: tuple[str, str]) -> str:
    """The id of a job that was posted with --wait and has succeeded."""
    options = ["--model", "tiny", "--budget", "6", *SET, "--wait", "--json"]
    done = winnow("submit", *files, *options, home=home)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["status"] == "succeeded"
    return str(job["id"])


def test_the_options_of_the_program_are_accepted_before_and_after_the_command(home: Path, job: str) -> None:
    stack = json.loads((home / "stack.json").read_text())
    for options in (["--home", str(home)], ["--url", stack["url"], "--api-key", stack["api_key"]]):
        for words in ([*options, "--json", "status", job], ["status", job, *options, "--json"]):
            assert json.loads(typed(*words).stdout)["id"] == job
    elsewhere = typed("--home", str(home), "status", job, "--home", str(home / "models"))
    assert elsewhere.exit_code == 1  # the one after the command wins


def test_status_jobs_and_results(home: Path, job: str) -> None:
    assert answer("status", job, home=home)["id"] == job
    assert job in [each["id"] for each in answer("jobs", home=home)]
    assert answer("results", job, home=home)["selected_count"] == 6
    assert f"{job}: succeeded" in typed("status", job, home=home).stdout
    shown = typed("results", job, home=home).stdout
    assert "The first 6 selected" in shown
    assert "row-" in shown
    assert job in typed("jobs", home=home, columns=80).stdout  # complete, to be copied


def test_a_sample_is_explained(home: Path, job: str) -> None:
    rows = [answer("explain", job, str(index), home=home) for index in (0, 1)]
    assert [row["index"] for row in rows] == [0, 1]
    shown = typed("explain", job, "0", "--target", "2", home=home).stdout
    assert rows[0]["id"] in shown
    assert f"on target 2 {rows[0]['explanation']['targets']['data'][2]['influence']:.4f}" in shown
    beyond = typed("explain", job, "40", home=home)
    assert (beyond.exit_code, beyond.stdout) == (1, "")
    assert "0 to 39" in beyond.stderr


def test_samples_are_listed_in_an_order_and_searched(home: Path, job: str) -> None:
    rows = answer("samples", job, "--all", "--sort", "influence", "--limit", "40", home=home)
    influence = [row["influence"] for row in rows]
    assert (len(influence), influence) == (40, sorted(influence, reverse=True))
    said = rows[7]["text"].split(": ", 1)[1][:40]
    assert rows[7]["id"] in [row["id"] for row in answer("samples", job, "--all", "--text", said.upper(), home=home)]
    listed = typed("samples", job, "--limit", "2", home=home).stdout.splitlines()
    assert [len(line.split("\t")) for line in listed] == [6, 6]


def test_rows_are_shown_as_the_model_sees_them(home: Path, job: str) -> None:
    pool = answer("status", job, home=home)["pool"]
    words = ("rows", pool, "--model", "tiny", "--limit", "2", "--max-length", "64")
    rows = [json.loads(line) for line in typed(*words, "--json", home=home).stdout.splitlines()]
    assert [row["index"] for row in rows] == [0, 1]
    shown = typed(*words, home=home).stdout
    for row in rows:
        assert row["rendered"]["tokens"]["kept"] <= 64
        assert "\n".join(marked_text.lines(row, row["rendered"])) in shown
    plain = typed("rows", pool, "--limit", "1", home=home).stdout
    assert plain.strip() == "\n".join(marked_text.lines(rows[0], None)).strip()
    assert typed("rows", pool, "--model", "tiny", "--set", "seed=1", home=home).exit_code == 2
    assert typed("rows", pool, "--model", "absent", home=home).exit_code == 1


def test_a_job_is_reproduced_bit_for_bit_and_recomputes_everything(home: Path, job: str) -> None:
    found = answer("reproduce", job, home=home)
    assert (found["equal"], found["is_same"], found["shared_artifacts"], found["differs"]) == (True, True, 0, {})
    copy = found["second"]
    record, of_first = (answer("provenance", each, home=home)["record"] for each in (copy, job))
    assert record["reproduces"] == job
    assert not any(unit["reused"] for unit in record["units"])
    for of in (record, of_first):
        assert {"all_packages_sha256", "torch"} <= of["versions"].keys()
        assert of["model"]["tokenizer_fingerprint"] == record["model"]["tokenizer_fingerprint"] is not None
        assert (of["seed"], len(of["landmarks"])) == (0, 12)
    rounds = [sum(unit["stage"] == "refine" for unit in of["units"]) for of in (record, of_first)]
    assert rounds[0] == rounds[1] > 2, "the default refines until it is promised enough, or may not go on"
    reported = [event for event in answer("events", copy, home=home) if "differences" in event["data"]]
    assert [(event["type"], event["data"]) for event in reported] == [("job.reproduction", {"differences": {}})]
    assert answer("compare", job, copy, home=home)["equal"]
    entries = answer("audit", "--object", copy, home=home)
    assert entries[-1]["action"] == "selection_job.reproduced"
    assert entries[-1]["detail"] == {"reproduces": job}


@pytest.mark.slow
def test_with_another_model_under_its_name_a_job_is_not_reproduced(home: Path, job: str) -> None:
    config = home / "models" / "tiny" / "config.json"
    kept = config.read_bytes()
    config.write_bytes(kept + b"\n")
    try:
        done = typed("reproduce", job, home=home)
    finally:
        config.write_bytes(kept)
    assert done.exit_code == 4
    assert "config.json. Register" in done.stderr


def test_a_download_is_verified(home: Path, job: str, tmp_path: Path) -> None:
    whole = ["--all", "--no-messages"]
    for words in (["all.parquet", *whole], ["selection.parquet"], ["all.csv", *whole], ["all.jsonl", *whole]):
        path = str(tmp_path / words[0])
        assert typed("export", job, path, *words[1:], home=home).exit_code == 0
        of_job = [] if path.endswith(".parquet") else ["--job", job]
        assert answer("verify", path, *of_job, home=home)["verified"]
    record = tmp_path / "provenance.json"
    record.write_text(typed("provenance", job, home=home).stdout)
    by_file = ["verify", str(tmp_path / "all.csv"), "--provenance", str(record)]
    assert "all 40 samples" in typed(*by_file).stdout
    altered = (tmp_path / "all.csv").read_bytes().replace(b"false,false", b"true,false", 1)
    (tmp_path / "all.csv").write_bytes(altered)
    for words in (by_file, ["verify", str(tmp_path / "all.csv"), "--job", job]):
        done = typed(*words, home=home)
        assert (done.exit_code, "all.csv" in done.stderr) == (3, True)
    assert "in the rows 0 to 39" in done.stderr
    done = typed("verify", str(tmp_path / "all.jsonl"), home=home)
    assert (done.exit_code, "--job" in done.stderr) == (1, True)


def test_events_are_listed(home: Path, job: str) -> None:
    events = [line.split()[1] for line in typed("events", job, home=home).stdout.splitlines()]
    assert events[:2] == ["job.queued", "job.planned"]
    assert events[-1] == "job.succeeded"
    assert answer("events", job, home=home)[1]["data"]["stages"]


def test_export_writes_what_the_name_says(home: Path, job: str, tmp_path: Path) -> None:
    path = tmp_path / "[out].parquet"
    done = typed("export", job, str(path), home=home)
    assert (done.exit_code, done.stdout) == (0, f"Wrote {path}\n")
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 6
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_a_job_is_cancelled_retried_and_deleted(home: Path, files: tuple[str, str]) -> None:
    posted = answer("submit", *files, "--model", "tiny", "--budget", "6", *SET, "--set", "seed=7", home=home)["id"]
    assert answer("cancel", posted, home=home)["id"] == posted
    over = ("cancelled", "succeeded")
    until("it ended", lambda: answer("status", posted, home=home)["status"] in over)
    if answer("status", posted, home=home)["status"] == "cancelled":
        assert answer("retry", posted, home=home)["id"] != posted
    assert typed("delete", posted, home=home).stdout == f"{posted}: deleted\n"
    assert typed("status", posted, home=home).exit_code == 1


def test_a_failed_job_is_reported(home: Path, files: tuple[str, str]) -> None:
    (home / "models" / "empty").mkdir()
    shutil.copy(home / "models" / "tiny" / "config.json", home / "models" / "empty")
    done = typed("submit", *files, "--model", "empty", "--budget", "6", *SET, "--wait", home=home)
    assert done.exit_code == 4
    assert done.stderr.startswith("winnow: model_not_usable: ")


POST = ["submit", "POOL", "TARGET", "--budget", "6", "--model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "job_none"], "not_found: "),
        (["results", "job_none"], "not_found: "),
        (["cancel", "job_none"], "not_found: "),
        ([*POST, "[/red]"], "'[/red]'"),
        ([*POST, "absent"], "'absent'"),
        ([*POST, "tiny", "--set", "model.revision=x"], "--set model.revision=x: "),
        ([*POST, "tiny", "--set", "seed"], "--set seed: "),
        (["submit", "POOL", "TARGET", "--model", "tiny", "--budget", "x"], "--budget x: "),
        (["submit", "/nowhere", "/nowhere", "--model", "tiny", "--budget", "6"], "No such file"),
        (["export", "job_none", "out.txt"], "path: out.txt"),
    ],
)
def test_a_mistake_is_reported_in_a_line(home: Path, files: tuple[str, str], words: list[str], message: str) -> None:
    done = typed(*({"POOL": files[0], "TARGET": files[1]}.get(word, word) for word in words), home=home)
    assert done.exit_code == 1
    assert done.stderr.startswith("winnow: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_file_is_uploaded_as_it_is_told_and_what_was_left_out_is_listed(home: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pool.jsonl", [{"q": "a", "a": "b", "level": 3}, {"q": "a"}])
    words = ["upload", str(path), "--columns", "prompt:q,completion:a", "--on-bad-row", "skip"]
    shown = typed(*words, home=home)
    assert (shown.exit_code, shown.stderr) == (0, ""), shown.output
    assert "1 row of prompt_completion: prompt from q, completion from a" in shown.stdout
    assert "left alone: level" in shown.stdout
    dataset = answer(*words, "--name", "other", home=home)
    assert (dataset["name"], dataset["row_count"], dataset["skipped"]) == ("other", 1, 1)
    (line,) = typed("skipped", dataset["id"], home=home).stdout.splitlines()
    assert (json.loads(line)["unit"], json.loads(line)["number"]) == ("line", 2)
    refused = typed(*words[:-2], home=home)
    assert refused.exit_code == 1
    assert "line 2: " in refused.stderr


def test_the_ready_made_targets_are_listed_and_each_is_shown_with_its_template(home: Path) -> None:
    found = {each["name"]: each for each in answer("targets", home=home)}
    shown = typed("targets", home=home)
    assert (shown.exit_code, shown.stderr) == (0, "")
    for name, each in found.items():
        assert name in shown.stdout
        one = typed("targets", name, home=home).stdout
        assert f"{each['hub']['id']}:{each['hub']['config']}:{each['hub']['split']} ({each['licence']}" in one
        assert each["why"] in one
        assert all(line in one for text in each["template"].values() for line in text.splitlines())
        assert answer("targets", name, home=home) == each
    refused = typed("targets", "gsm9k", home=home)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "there are gsm8k, " in refused.stderr


@pytest.mark.parametrize("command", ["jobs", "down"])
def test_a_missing_stack_is_named(tmp_path: Path, command: str) -> None:
    done = winnow(command, home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"winnow: no stack is running from {tmp_path}")


@pytest.mark.slow
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
