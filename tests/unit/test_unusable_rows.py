"""Whole jobs on pools and targets of which some rows cannot be used: the others are as if those were not there."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.local_job import Ran, run
from support.tiny import pool_rows, read_jsonl, save_model, target_rows, write_jsonl
from typer.main import get_command

from service.plan import shards
from service.plan.stages import Stage
from service.storage.artifacts import ArtifactStore
from worker import commands
from worker.errors import DataError, TooManyUnusable
from worker.text import token_files, tokenization

# It refuses a row that asks for it, and has no token that ends a turn: an empty reply leaves nothing to learn.
TEMPLATE = (
    "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('it was asked to') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)
REFUSED, EMPTY = "template_refuses", "no_reply"
POOL, GROUP = 40, 8
LAYOUTS = {
    "the first group": range(GROUP),
    "the last group": range(POOL - GROUP, POOL),
    "here and there": (0, 3, 9, 10, 11, 21, 22, 39),
}
METHODS: list[dict[str, Any]] = [
    {"method": "exact_influence"},
    {"method": "rds_plus"},
    {"landmarks": {"count": 12}},
    {"landmarks": {"count": 12}, "embedding": {"kind": "auto"}, "refine": 0, "selection": "top_k"},
    {"landmarks": {"count": 12, "choice": "stratified"}, "min_fidelity": 0.9},
    {"landmarks": {"count": 32}},
    {"method": "random"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "refusing", template=TEMPLATE)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("target") / "target.jsonl", target_rows(5, "python_function"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row groups and several shards."""
    for module in (tokenization, token_files):
        monkeypatch.setattr(module, "ROW_GROUP", GROUP)
    for name in ("EMBED_SHARD_TOKENS", "GRADIENT_SHARD_TOKENS", "PREPARE_SHARD_BYTES"):
        monkeypatch.setattr(shards, name, 500)


def spoilt(rows: list[dict[str, Any]], where: Collection[int]) -> list[dict[str, Any]]:
    """Refused and empty in turn."""
    for number, i in enumerate(where):
        first, *_, last = rows[i]["messages"]
        if number % 2:
            last["content"] = ""
        else:
            first["content"] = "refuse"
    return rows


def pool_file(folder: Path, where: Collection[int]) -> Path:
    return write_jsonl(folder / "pool.jsonl", spoilt(pool_rows(POOL), where))


def took_no_part(ran: Ran, where: Sequence[int]) -> None:
    """In no result and in nothing that was computed."""
    arrays = ran.arrays
    assert np.flatnonzero(np.isnan(arrays["influence"])).tolist() == list(where)
    assert not arrays["weight"][list(where)].any()
    assert not arrays["exact"][list(where)].any()
    reasons = ran.done[Stage.SELECT][0].result["reasons"]
    assert [reasons[code - 1] for code in arrays["reason"][list(where)]] == [
        (REFUSED, EMPTY)[number % 2] for number in range(len(where))
    ]
    assert not np.isin(ran.selected, where).any()
    assert not np.isin(arrays["held_out_selected"], where).any()
    tokens = [unit.spec["tokens"] for unit in ran.done.get(Stage.LANDMARK_GRADIENTS, [])]
    if ran.prepared["landmark_count"] and ran.prepared["landmarks"] != ran.prepared["pool_tokens"]:
        for key in {*tokens, ran.prepared["landmarks"]}:
            assert not np.isin(token_files.read_indices(ran.compute.store, key), where).any()
    for unit in (unit for units in ran.done.values() for unit in units if {"tokens", "stop"} <= unit.spec.keys()):
        lengths = token_files.read_counts(ran.compute.store, unit.spec["tokens"]).length
        assert lengths[unit.spec["start"] : unit.spec["stop"]].any()  # no unit without work


def tokens_of(store: ArtifactStore, counts: Sequence[str]) -> list[str]:
    """The files of the rows."""
    return [part for key in counts for part, _ in token_files.About.of(store, key).parts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_they_take_no_part_whatever_the_method(
    model: Path, target: Path, tmp_path: Path, layout: str, changes: dict[str, Any]
) -> None:
    where = list(LAYOUTS[layout])
    how = {"max_unusable": 0.2, "validate": True, **changes}
    ran = run(model, pool_file(tmp_path, where), target, tmp_path / "store", budget=7, **how)
    took_no_part(ran, where)
    found = ran.prepared["unusable"]["pool"]
    assert (found["count"], found["by_reason"]) == (GROUP, {EMPTY: GROUP // 2, REFUSED: GROUP // 2})
    assert [(row["index"], row["id"]) for row in found["first"]] == [(i, f"row-{i}") for i in where]
    assert "it was asked to" in found["first"][0]["detail"]
    assert ran.prepared["unusable"]["target"] == {"count": 0, "by_reason": {}, "first": []}
    assert any("unusable): 8 of the pool" in note for note in ran.summary["notes"])
    if changes.get("method") in ("exact_influence", "rds_plus"):  # nothing of the others' depends on them
        rows = [row for i, row in enumerate(pool_rows(POOL)) if i not in where]
        rest = write_jsonl(tmp_path / "rest.jsonl", rows)
        without = run(model, rest, target, tmp_path / "store", budget=7, **how)
        kept = np.setdiff1d(np.arange(POOL), where)
        assert ran.arrays["influence"][kept] == pytest.approx(without.arrays["influence"], abs=1e-5)
        assert ran.selected == kept[without.selected].tolist()


def test_the_warm_up_trains_on_the_others(model: Path, target: Path, tmp_path: Path) -> None:
    where = list(LAYOUTS["here and there"])
    warmup = {"samples": POOL, "batch_size": 8, "learning_rate": 1e-3}
    ran = run(
        model, pool_file(tmp_path, where), target, tmp_path / "store", max_unusable=0.2, warmup=warmup, validate=False
    )
    assert ran.summary["warmup"]["samples"] == POOL - GROUP
    assert all(np.isfinite(ran.summary["warmup"]["losses"]))
    took_no_part(ran, where)


@pytest.mark.parametrize("method", ["influence_distillation", "exact_influence", "rds_plus"])
def test_target_rows_that_cannot_be_used_change_nothing(model: Path, target: Path, tmp_path: Path, method: str) -> None:
    rows = target_rows(7, "python_function")
    spoilt_target = write_jsonl(tmp_path / "target.jsonl", spoilt(rows[:1] + rows[2:] + rows[1:2], [0, 6]))
    pool = write_jsonl(tmp_path / "pool.jsonl", pool_rows(20))
    plain = write_jsonl(tmp_path / "plain.jsonl", read_jsonl(spoilt_target)[1:6])
    how = {"method": method, "selection": "top_k", "max_unusable": 0.3, "validate": False}
    ran, without = (run(model, pool, file, tmp_path / "store", **how) for file in (spoilt_target, plain))
    assert ran.prepared["unusable"]["target"]["by_reason"] == {EMPTY: 1, REFUSED: 1}
    assert ran.done[Stage.SELECT][0].result["excluded_targets"] == [0, 6]
    assert ran.arrays["influence"] == pytest.approx(without.arrays["influence"], rel=1e-3, abs=1e-6)
    assert ran.selected == without.selected


class TestTooMany:
    def test_it_is_known_before_all_shards_are_done(self, model: Path, target: Path, tmp_path: Path) -> None:
        """Eight of forty rows may be unusable; the first twelve are, so that the shards after them are never made."""
        pool = pool_file(tmp_path, range(12))
        with pytest.raises(TooManyUnusable) as caught:
            run(model, pool, target, tmp_path / "store", max_unusable=0.2, method="random")
        found = caught.value.as_dict()["unusable"]["pool"]
        assert 8 < found["count"] == sum(found["by_reason"].values()) <= 12
        assert [row["index"] for row in found["first"]] == list(range(min(10, found["count"])))
        store = ArtifactStore(str(tmp_path / "store"))
        done = [key for file in store.files("tokens") if (key := file.key).endswith(".counts.parquet")]
        rows = max(int(token_files.read_indices(store, key)[-1]) for key in tokens_of(store, done))
        assert 8 <= rows < POOL - 1

    def test_a_pool_or_a_target_beyond_the_share_fails_early(self, model: Path, target: Path, tmp_path: Path) -> None:
        pool = pool_file(tmp_path, range(5))
        for files, name, count in (((pool, target), "pool", 5), ((target, pool), "target", 5)):
            with pytest.raises(TooManyUnusable) as caught:
                run(model, *files, tmp_path / "store", budget=2)
            error = caught.value.as_dict()
            assert (error["code"], error["unusable"].keys()) == ("too_many_unusable", {name})
            assert error["unusable"][name]["count"] == count
            assert error["unusable"][name]["by_reason"] == {REFUSED: 3, EMPTY: 2}
            assert "'row-0' (template_refuses: " in error["detail"]
            assert "max_unusable" in error["detail"]

    def test_at_the_share_itself_it_succeeds(self, model: Path, target: Path, tmp_path: Path) -> None:
        pool = pool_file(tmp_path, range(4))
        took_no_part(run(model, pool, target, tmp_path / "store", method="random", validate=False), range(4))
        with pytest.raises(TooManyUnusable):
            run(model, pool, target, tmp_path / "store", method="random", max_unusable=0)

    def test_with_any_share_one_must_be_left(self, model: Path, target: Path, tmp_path: Path) -> None:
        pool = pool_file(tmp_path, range(POOL - 1))
        with pytest.raises(DataError) as caught:
            run(model, pool, target, tmp_path / "store", budget=1, max_unusable=1)
        assert caught.value.code == "data_not_usable"


def test_winnow_select_writes_nulls_and_names_them(
    model: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, out = pool_file(tmp_path, [0, 39]), tmp_path / "out.jsonl"
    options = {"model": model, "pool": pool, "target": target, "budget": 6, "out": out, "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--set", "method=rds_plus", "--set", "validate=false"]
    get_command(commands.select)(words, standalone_mode=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows if row["influence"] is None] == [0, 39]
    shown = capsys.readouterr().out
    assert "Unusable in the pool: row-0: " in shown
    assert "Unusable in the pool: row-39: " in shown
