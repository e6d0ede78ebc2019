"""Whole jobs in this process: every supported family, both dtypes, and the command `winnow select`."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.local_job import Ran, run
from support.templates import THINKING
from support.tiny import FAMILIES, pool_rows, save_model, target_rows, write_jsonl
from typer.main import get_command

from service.models.registry import MODEL_TYPES
from worker import commands
from worker.errors import DataError, ModelError, ParameterError

POOL, TARGET, BUDGET = 40, 4, 6
UNREFINED: dict[str, Any] = {"refine": 0, "validate": False}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", pool_rows(POOL))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tests for which it is no matter that equal work is done once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("target") / "target.jsonl", target_rows(TARGET, "python_function"))


def check(ran: Ran, *, count: int = POOL, budget: int = BUDGET) -> None:
    """What holds of every selection."""
    arrays, summary = ran.arrays, ran.summary
    assert len(arrays["influence"]) == len(arrays["weight"]) == len(arrays["exact"]) == count
    assert np.isfinite(arrays["influence"]).sum() == ran.prepared["usable"]
    assert len(set(arrays["selected"].tolist())) == len(arrays["selected"]) == budget
    assert set(np.flatnonzero(arrays["weight"]).tolist()) == set(arrays["selected"].tolist())
    assert arrays["weight"].sum() == pytest.approx(budget, rel=1e-5)
    assert arrays["exact"].sum() == summary["landmark_count"] + summary["refined_count"]
    json.dumps(summary, allow_nan=False)


def test_all_supported_families_are_tested() -> None:
    assert set(FAMILIES) == MODEL_TYPES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_through_a_job(family: str, dtype: str, pool: Path, target: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / family, family)
    done = run(model, pool, target, tmp_path / "store", dtype=dtype, embedding={"kind": "jvp"})
    check(done)
    assert done.prepared["model_type"] == family
    assert done.prepared["dtype"] == dtype
    assert np.ptp(done.arrays["influence"]) > 0


@pytest.mark.parametrize("selection", ["round_robin", "top_k", "weighted"])
@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_every_selection_and_embedding(
    selection: str, kind: str, tiny_llama: Path, pool: Path, target: Path, store: Path
) -> None:
    ran = run(tiny_llama, pool, target, store, selection=selection, embedding={"kind": kind}, **UNREFINED)
    check(ran)
    arrays = ran.arrays
    assert arrays["exact"].sum() == 12
    if selection != "weighted":
        assert set(arrays["weight"].tolist()) == {0.0, 1.0}
    if selection != "round_robin":
        ranked = arrays["influence"][arrays["selected"]]
        assert (np.diff(ranked) <= 0).all()
        assert ranked[-1] >= np.delete(arrays["influence"], arrays["selected"]).max()


def test_another_seed_takes_other_landmarks(tiny_llama: Path, pool: Path, target: Path, store: Path) -> None:
    one, other = (run(tiny_llama, pool, target, store, seed=seed, **UNREFINED).arrays for seed in (0, 1))
    assert one["exact"].tolist() != other["exact"].tolist()


def test_smaller_batches_change_nothing_but_rounding(
    tiny_llama: Path, pool: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(tiny_llama, pool, target, tmp_path / "one", **UNREFINED).arrays
    monkeypatch.setattr("worker.process.main.default_token_budget", lambda _: 1)
    two = run(tiny_llama, pool, target, tmp_path / "two", **UNREFINED).arrays
    assert one["influence"] == pytest.approx(two["influence"], abs=2e-3)
    assert one["influence"][one["exact"]] == pytest.approx(two["influence"][two["exact"]], abs=1e-5)


# Templates without a token that ends a turn: an empty reply has nothing to predict.
BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "bare", template=BARE)


class TestEmptyReplies:
    def emptied(self, path: Path, rows: list[dict[str, Any]], where: Callable[[int], bool]) -> Path:
        for i, row in enumerate(rows):
            if where(i):
                row["messages"][-1]["content"] = ""
        return write_jsonl(path, rows)

    def test_they_are_never_selected_and_have_no_influence(self, bare: Path, target: Path, tmp_path: Path) -> None:
        pool = self.emptied(tmp_path / "pool.jsonl", pool_rows(POOL), lambda i: i % 2 == 0)
        done = run(bare, pool, target, tmp_path / "store", max_unusable=0.5)
        check(done)
        assert done.prepared["unusable"]["pool"]["by_reason"] == {"no_reply": POOL // 2}
        assert np.isnan(done.arrays["influence"][::2]).all()
        assert all(index % 2 for index in done.arrays["selected"].tolist())
        assert not done.arrays["exact"][::2].any()

    def test_a_target_sample_without_reply_takes_no_turn(self, bare: Path, pool: Path, tmp_path: Path) -> None:
        rows = target_rows(TARGET, "python_function")
        alone = write_jsonl(tmp_path / "alone.jsonl", rows[1:2])
        beside = self.emptied(tmp_path / "beside.jsonl", rows, lambda i: i != 1)
        weighted = {"selection": "weighted", "curvature": {"type": "hessian", "rank": 2}, "optimizer": {"type": "sgd"}}
        how = {**weighted, "gradient": {"normalize": False}}
        one = run(bare, pool, alone, tmp_path / "one", **how)
        two = run(bare, pool, beside, tmp_path / "two", max_unusable=1, **how)
        assert two.prepared["unusable"]["target"]["count"] == TARGET - 1
        assert one.arrays["selected"].tolist() == two.arrays["selected"].tolist()
        assert one.arrays["influence"] == pytest.approx(two.arrays["influence"], abs=1e-5)
        assert one.arrays["weight"] == pytest.approx(two.arrays["weight"], rel=1e-3)
        for name in ("measured", "predicted", "predicted_second_order"):
            before, after = (ran.summary["validation"]["selection"][name] for ran in (one, two))
            assert before == pytest.approx(after, rel=1e-2)

    def test_exact_influence_selects_none_of_them(self, bare: Path, target: Path, tmp_path: Path) -> None:
        pool = self.emptied(tmp_path / "pool.jsonl", pool_rows(POOL), lambda i: i % 2 == 0)
        for method in ("exact_influence", "rds_plus", "random"):
            ran = run(bare, pool, target, tmp_path / "store", method=method, budget=20, max_unusable=0.5)
            assert sorted(ran.selected) == list(range(1, POOL, 2))
            assert np.isnan(ran.arrays["influence"]).tolist() == [True, False] * (POOL // 2)
            if method == "exact_influence":
                check(ran, budget=20)

    def test_a_target_without_any_reply_is_an_error(self, bare: Path, pool: Path, tmp_path: Path) -> None:
        target = self.emptied(tmp_path / "t.jsonl", target_rows(TARGET, "python_function"), lambda _: True)
        with pytest.raises(DataError, match=r"target has no sample that can be used \(no_reply: "):
            run(bare, pool, target, tmp_path / "store", max_unusable=1)

    def test_a_budget_above_the_usable_samples_is_an_error(self, bare: Path, target: Path, tmp_path: Path) -> None:
        pool = self.emptied(tmp_path / "pool.jsonl", pool_rows(POOL), lambda i: i % 2 == 0)
        with pytest.raises(ParameterError, match=r"budget is 21, but only 20 samples"):
            run(bare, pool, target, tmp_path / "store", budget=21, max_unusable=0.5)

    def test_a_pool_with_one_usable_sample_is_an_error(self, bare: Path, target: Path, tmp_path: Path) -> None:
        pool = self.emptied(tmp_path / "pool.jsonl", pool_rows(POOL), lambda i: i > 0)
        with pytest.raises(DataError, match="fewer than two samples"):
            run(bare, pool, target, tmp_path / "store", max_unusable=1, budget=1)


def test_reasoning_and_calls_take_part_as_the_job_says(pool: Path, target: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "thinking", template=THINKING.plain)
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    function = {"name": "look", "arguments": {"x": 1}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    for i, row in enumerate(rows):
        *before, reply = row["messages"]
        if i % 4 == 0:  # reasoning in two turns: that of the first one is not rendered
            row["messages"] = 2 * [*before, {**reply, "reasoning_content": "Let me see."}]
        if i % 4 == 1:
            row["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
            row["messages"] = [*before, call, {"role": "tool", "content": "sun"}, reply]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    keys = set()
    for reasoning, notes in (("keep", {"reasoning_not_rendered": POOL // 4}), ("strip", {})):
        ran = run(model, mixed, target, tmp_path / "store", reasoning=reasoning, **UNREFINED)
        check(ran)
        assert ran.prepared["usable"] == POOL
        assert ran.prepared["rendering"] == {"pool": notes, "target": {}}
        keys.add(ran.prepared["pool_tokens"])
    assert len(keys) == 2


def test_more_blocks_than_the_model_has_are_an_error(
    tiny_llama: Path, pool: Path, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match=r"embedding.blocks is 4; the model has 3"):
        run(tiny_llama, pool, target, tmp_path, embedding={"blocks": 4})


def test_modules_that_match_nothing_are_an_error_that_lists_those_there_are(
    tiny_llama: Path, pool: Path, target: Path, store: Path
) -> None:
    with pytest.raises(ParameterError, match=r"modules='gate' matches no linear layer; .*mlp\.gate_proj"):
        run(tiny_llama, pool, target, store, gradient={"modules": "gate"})


def test_a_model_that_cannot_be_used_is_an_error(tmp_path: Path, pool: Path, target: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no safetensors"):
        run(tmp_path / "m", pool, target, tmp_path / "store")


class TestCommand:
    """`winnow select`."""

    @pytest.fixture
    def select(self, tiny_llama: Path, pool: Path, target: Path) -> Callable[..., None]:
        def call(out: Path, *more: str, **replaced: str) -> None:
            options = {"model": tiny_llama, "pool": pool, "target": target, "budget": "6", "out": out, **replaced}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            small = ["landmarks.count=12", "gradient.projection_dim=512", "max_length=128"]
            words += [word for setting in small for word in ("--set", setting)]
            get_command(commands.select)([*words, "--device", "cpu", *more], standalone_mode=False)

        return call

    def test_formats_agree(self, select: Callable[..., None], tmp_path: Path) -> None:
        cache = ("--cache", str(tmp_path / "cache"))
        for suffix in ("jsonl", "csv", "parquet"):
            select(tmp_path / f"out.{suffix}", *cache)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"row-{i}" for i in range(POOL)]
        assert sorted(row["rank"] for row in rows if row["selected"]) == list(range(6))
        assert all((row["weight"] > 0) == row["selected"] == (row["rank"] is not None) for row in rows)
        table = pq.read_table(tmp_path / "out.parquet").to_pylist()
        one, other = ([(row["id"], row["selected"], row["rank"]) for row in each] for each in (table, rows))
        assert one == other
        with (tmp_path / "out.csv").open() as file:
            assert [row["id"] for row in csv.DictReader(file)] == [row["id"] for row in rows]

    def test_the_selection_alone(self, select: Callable[..., None], tmp_path: Path) -> None:
        select(tmp_path / "out.jsonl", "--selected-only", budget="0.1")
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert len(rows) == 4
        assert all(row["selected"] for row in rows)

    def test_the_cache_is_used_by_the_next_run(
        self, select: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = ("--cache", str(tmp_path / "cache"))
        select(tmp_path / "one.jsonl", *cache)
        monkeypatch.setattr("worker.stages.embed.run", lambda *_, **__: pytest.fail("embedded again"))
        monkeypatch.setattr("worker.stages.gradients.run", lambda *_, **__: pytest.fail("gradients again"))
        select(tmp_path / "two.jsonl", *cache)
        assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()

    def test_what_a_killed_run_left_is_removed_and_nothing_is_left(
        self, select: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "temporary"
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        killed = "from service.storage.tempdirs import *\nwith temporary_directory():\n    os.kill(os.getpid(), 9)"
        ended = subprocess.run([sys.executable, "-c", killed], env={**os.environ, "TMPDIR": str(folder)})
        assert ended.returncode == -signal.SIGKILL
        assert len(list(folder.iterdir())) == 1
        with pytest.raises(SystemExit, match="the pool has 40 samples"):  # found out once the pool is read
            select(tmp_path / "out.jsonl", budget="41")
        assert list(folder.iterdir()) == []

    def test_its_temporary_folders_name_their_owner(
        self, select: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        used: list[str] = []

        def fail(*_: Any, **__: Any) -> None:
            used.extend(path.name for path in tmp_path.iterdir())
            raise ParameterError("half-way")

        monkeypatch.setattr("worker.local_run.convert", fail)
        with pytest.raises(SystemExit, match="half-way"):
            select(tmp_path / "out.jsonl")
        assert len(used) == 2, "the store's and the conversion's"
        assert all(name.startswith("winnow.") for name in used)

    def test_files_are_read_as_they_are_told_and_what_is_left_out_is_named(
        self, select: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [json.dumps({"talk": row["messages"], "level": 1}) for row in pool_rows(POOL)]
        (tmp_path / "named.jsonl").write_text("\n".join(["{}", *rows]))
        named = ("--columns", "messages:talk", "--target-columns", "messages:messages", "--on-bad-row", "skip")
        select(tmp_path / "out.jsonl", *named, pool=str(tmp_path / "named.jsonl"))
        (line,) = (tmp_path / "out.jsonl.pool-skipped.jsonl").read_text().splitlines()
        assert (json.loads(line)["unit"], json.loads(line)["number"]) == ("line", 1)
        assert not (tmp_path / "out.jsonl.target-skipped.jsonl").exists()
        told = " ".join(capsys.readouterr().out.split())
        assert f"{POOL} rows of messages: messages from talk left alone: level" in told
        found = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(row)["id"] for row in found] == [str(i + 1) for i in range(POOL)]

    def test_json_output(self, select: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        select(tmp_path / "out.jsonl", "--json")
        printed = json.loads(capsys.readouterr().out)
        assert printed["budget"] == 6
        assert -1 <= printed["fidelity"]["mean_spearman"] <= 1
        said = {each["about"] for each in printed["verdict"]}
        assert said >= {"choice", "fidelity", "step", "rows", "duplicates", "overlap"}

    def test_a_pool_that_holds_the_target_three_times_is_told_apart(
        self, select: Callable[..., None], target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [
            {**row, "id": f"{row['id']}-{copy}"} for copy in range(3) for row in target_rows(TARGET, "python_function")
        ]
        pool = write_jsonl(tmp_path / "pool.jsonl", [*rows, *pool_rows(POOL)])
        select(tmp_path / "out.jsonl", "--json", pool=str(pool))
        printed = json.loads(capsys.readouterr().out)
        repeats = {name: found["count"] for name, found in printed["repeats"].items()}
        assert repeats["overlap"] == 6 > repeats["duplicates"] >= 2
        bad = [each["about"] for each in printed["verdict"] if each["level"] == "bad"]
        assert set(bad) == {"duplicates", "overlap"} == {each["about"] for each in printed["verdict"][: len(bad)]}
        select(tmp_path / "out.jsonl", pool=str(pool))
        assert re.search(r"^bad +overlap ", capsys.readouterr().out, re.MULTILINE)

    @pytest.mark.parametrize(
        ("replaced", "more", "message"),
        [
            ({"budget": "41"}, [], "--budget 41: the pool has 40 samples"),
            ({"budget": "0"}, [], "--budget 0: expected a number of samples, or a fraction"),
            ({"budget": "nan"}, [], "--budget nan: expected a number of samples, or a fraction"),
            ({"budget": "inf"}, [], "--budget inf: expected a number of samples, or a fraction"),
            ({"budget": "1.5"}, [], "--budget 1.5: expected a number of samples, or a fraction"),
            ({"budget": "many"}, [], "--budget many: expected a number of samples, or a fraction"),
            ({"model": "/nowhere"}, [], "--model /nowhere: no folder with a config.json"),
            ({"pool": "/nowhere.jsonl"}, [], "No such file"),
            ({}, ["--set", "landmarks.count=1"], "--set landmarks.count: Input should be greater than or equal to 2"),
            ({}, ["--set", "landmarks"], "expected NAME=VALUE"),
            ({}, ["--format", "csv"], "--format csv: expected one of auto, messages"),
            ({}, ["--target-columns", "promt:q"], 'columns: "promt" is no slot'),
            ({}, ["--set", "unknown=1"], "--set unknown: unknown field"),
            ({}, ["--set", "seed=1", "--set", "seed.more=2"], "seed already has a value"),
        ],
    )
    def test_a_mistake_is_reported_in_a_line(
        self, select: Callable[..., None], tmp_path: Path, replaced: dict[str, str], more: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            select(tmp_path / "out.jsonl", *more, **replaced)
        assert str(caught.value).startswith("winnow select: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_a_pool_that_cannot_be_read_is_refused_with_its_lines(
        self, select: Callable[..., None], tmp_path: Path
    ) -> None:
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"nothing": 1}\n')
        with pytest.raises(SystemExit, match=r"(?s)winnow select: 1 row is invalid.*line 2"):
            select(tmp_path / "out.jsonl", pool=str(tmp_path / "bad.jsonl"))

    def test_another_name_of_the_output_is_refused_before_any_work(
        self, select: Callable[..., None], tmp_path: Path
    ) -> None:
        with pytest.raises(SystemExit, match=r"must end in one of .jsonl, .csv, .parquet"):
            select(tmp_path / "out.txt")
