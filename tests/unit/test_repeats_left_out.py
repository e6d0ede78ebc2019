"""Whole jobs on a pool with planted repeats: what the options leave out takes no part, and is counted, named and explained."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.duplicates import random_row, varied
from support.local_job import Ran, run
from support.tiny import write_jsonl
from typer.testing import CliRunner

from service.plan import shards
from service.plan.stages import Stage
from worker.commands import select
from worker.errors import ParameterError
from worker.text import token_files

DRAW = np.random.default_rng(0)
TARGET = [random_row(DRAW, f"t{i}", words=15) for i in range(3)]
OTHERS = [random_row(DRAW, f"o{i}", words=15) for i in range(24)]
AGAIN = [varied(OTHERS[i], f"again{i}", how) for i, how in enumerate(("same", "spaced", "changed", "case"), 3)]
TAKEN = [varied(TARGET[0], "taken", "changed"), varied(TARGET[2], "taken too", "same")]
POOL = [*OTHERS[:20], *AGAIN, *TAKEN, *OTHERS[20:]]
DUPLICATES, OVERLAP = [20, 21, 22, 23], [24, 25]
BOTH = {"duplicates": "one", "overlap": "exclude"}
METHODS: list[dict[str, Any]] = [
    {"refine": {"size": 4, "rounds": 2}, "landmarks": {"count": 8}},
    {"landmarks": {"count": 100}, "selection": "top_k"},
    {"method": "exact_influence", "selection": "weighted"},
    {"method": "rds_plus"},
    {"method": "random", "warmup": None},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return write_jsonl(folder / "pool.jsonl", POOL), write_jsonl(folder / "target.jsonl", TARGET)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def left_out(ran: Ran) -> dict[int, str]:
    """By row why it took no part."""
    arrays, reasons = ran.arrays, ran.done[Stage.SELECT][0].result["reasons"]
    return {row: reasons[arrays["reason"][row] - 1] for row in np.flatnonzero(~arrays["eligible"]).tolist()}


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_they_take_no_part_whatever_the_method(
    tiny_llama: Path, files: tuple[Path, Path], store: Path, changes: dict[str, Any]
) -> None:
    ran = run(tiny_llama, *files, store, budget=10, **{"validate": False, **changes}, **BOTH)
    where, arrays = [*DUPLICATES, *OVERLAP], ran.arrays
    assert left_out(ran) == {**dict.fromkeys(DUPLICATES, "duplicate"), **dict.fromkeys(OVERLAP, "overlap")}
    assert np.flatnonzero(np.isnan(arrays["influence"])).tolist() == where
    assert not arrays["weight"][where].any()
    assert not arrays["exact"][where].any()
    assert not np.isin(ran.selected, where).any()
    assert len(ran.selected) == 10 or changes.get("selection") == "weighted"
    assert ran.prepared["usable"] == len(POOL) - 6
    if "landmark_order" in ran.prepared:
        assert not np.isin(token_files.read_indices(ran.compute.store, ran.prepared["landmarks"]), where).any()
    (note,) = [note for note in ran.summary["notes"] if "listed in excluded" in note]
    assert "4 repeat another sample of the pool, 2 repeat one of the target" in note


def test_the_warm_up_and_the_validation_do_without_them(
    tiny_llama: Path, files: tuple[Path, Path], store: Path
) -> None:
    warmup = {"samples": 100, "batch_size": 8, "learning_rate": 1e-3}
    ran = run(tiny_llama, *files, store, budget=10, refine=0, warmup=warmup, validate=True, **BOTH)
    assert ran.summary["warmup"]["samples"] == len(POOL) - 6
    assert ran.summary["validation"]["samples"] == 10


@pytest.mark.parametrize(
    ("options", "where"), [({"duplicates": "one"}, DUPLICATES), ({"overlap": "exclude"}, OVERLAP), ({}, [])], ids=str
)
def test_an_option_leaves_out_what_it_names_alone(
    tiny_llama: Path, files: tuple[Path, Path], store: Path, options: dict[str, str], where: list[int]
) -> None:
    ran = run(tiny_llama, *files, store, method="random", budget=10, validate=False, **options)
    assert list(left_out(ran)) == where
    repeats = {kind: ran.prepared["repeats"][kind] for kind in ("duplicates", "overlap")}
    assert repeats == {
        "duplicates": {"exact": 3, "near": 1, "repeated": 4},
        "overlap": {"exact": 1, "near": 1, "repeated": 2},
    }


def test_where_nothing_is_left_out_an_option_makes_nothing_anew(
    tiny_llama: Path, files: tuple[Path, Path], store: Path, tmp_path: Path
) -> None:
    pool = write_jsonl(tmp_path / "pool.jsonl", OTHERS)
    kept, one = (
        run(tiny_llama, pool, files[1], store, budget=5, refine=0, validate=False, **options) for options in ({}, BOTH)
    )
    for stage in kept.done.keys() - {Stage.PREPARE}:
        assert kept.keys(stage) == one.keys(stage)
    with_repeats = [run(tiny_llama, *files, store, budget=5, refine=0, validate=False, **o) for o in ({}, BOTH)]
    for stage, is_same in ((Stage.TARGET_GRADIENTS, True), (Stage.PROPAGATE, False), (Stage.SELECT, False)):
        assert (with_repeats[0].keys(stage) == with_repeats[1].keys(stage)) == is_same, stage


@pytest.mark.parametrize("method", ["rds_plus", "random"])
def test_a_choice_among_other_rows_has_another_name(
    tiny_llama: Path, files: tuple[Path, Path], store: Path, method: str
) -> None:
    """Where no landmark tells the jobs apart."""
    all_rows, some = (run(tiny_llama, *files, store, budget=5, validate=False, method=method, **o) for o in ({}, BOTH))
    assert all_rows.keys(Stage.SELECT) != some.keys(Stage.SELECT)


def test_a_budget_beyond_what_is_left_says_what_was_left_out(
    tiny_llama: Path, files: tuple[Path, Path], store: Path
) -> None:
    said = "budget is 25, but only 30 samples of the pool can be used; of these 4 repeat .* and 2 repeat .* leaves 24"
    with pytest.raises(ParameterError, match=said):
        run(tiny_llama, *files, store, method="random", budget=25, **BOTH)
    run(tiny_llama, *files, store, method="random", budget=24, validate=False, **BOTH)


def test_a_pool_in_shards_has_their_signatures_from_the_units_that_tokenised_them(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PREPARE_SHARD_BYTES", 1500)
    ran = run(tiny_llama, *files, tmp_path / "store", method="random", budget=10, validate=False, **BOTH)
    units = ran.done[Stage.PREPARE]
    of_pool = [unit.result["signatures"] for unit in units if unit.spec.get("dataset") == "pool"]
    assert len(of_pool) > 2
    assert ran.prepared["signatures"] == of_pool
    assert list(left_out(ran)) == [*DUPLICATES, *OVERLAP]


def test_winnow_select_takes_the_options_and_names_what_it_left_out(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ["--model", str(tiny_llama), "--pool", str(files[0]), "--target", str(files[1]), "--budget", "10"]
    words += ["--out", str(tmp_path / "out.jsonl"), "--set", "method=random", "--device", "cpu"]
    done = CliRunner().invoke(select, [*words, "--duplicates", "one", "--overlap", "exclude", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(re.sub(r"(?s)^[^{]*", "", done.stdout))
    assert found["excluded"]["by_reason"] == {"duplicate": 4, "overlap": 2}
    named = {row["id"]: row["same_as"] for row in found["excluded"]["first"]}
    assert named == {**{f"again{i}": f"o{i}" for i in range(3, 7)}, "taken": "t0", "taken too": "t2"}
    levels = {each["about"]: each["level"] for each in found["verdict"]}
    assert (levels["duplicates"], levels["overlap"]) == ("ok", "ok")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows if row["influence"] is None] == [*DUPLICATES, *OVERLAP]
