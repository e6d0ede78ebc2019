"""Samples whose loss, gradient or embedding is not finite: left out and reported, or too many."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.local_job import run, write_files
from support.tiny import pool_rows, read_jsonl, save_model, target_rows, write_jsonl
from typer.main import get_command

from service.plan import shards
from service.plan.artifact_keys import result_key
from service.plan.stages import Stage
from worker import commands
from worker.errors import DataError
from worker.stages.exact_rows import Measure, check_nonfinite, exact_rows
from worker.text import token_files

POOL, TARGET = 40, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_files(tmp_path_factory.mktemp("files"), POOL, TARGET)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("broken") / "m")
    tensors = load_file(folder / "model.safetensors")
    token = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestNotFinite:
    """A model whose embedding of one character, which few samples hold, is no number."""

    ROWS = 120

    def pool(self, path: Path, *marked: int) -> Path:
        rows = pool_rows(self.ROWS)
        for row in rows:
            for message in row["messages"]:
                message["content"] = message["content"].replace("~", "-")
        for i in marked:
            rows[i]["messages"][-1]["content"] += " ~ ~"
        return write_jsonl(path, rows)

    @pytest.mark.parametrize(
        "changes",
        [
            {"method": "exact_influence"},
            {"method": "rds_plus"},
            {"landmarks": {"count": 12}, "refine": 0.2},
            {"landmarks": {"count": 12}, "embedding": {"kind": "jvp"}, "refine": 0},
            {"landmarks": {"count": 119}, "selection": "weighted", "embedding": {"kind": "auto"}},
        ],
    )
    def test_one_in_a_hundred_is_left_out_and_reported(
        self, broken: Path, files: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        ran = run(
            broken, self.pool(tmp_path / "pool.jsonl", 7), files[1], tmp_path / "store", seed=3, budget=60, **changes
        )
        result = ran.done[Stage.SELECT][0].result
        assert result["nonfinite"] == [7]
        assert any("(listed in nonfinite): 1 of the pool" in sentence for sentence in ran.summary["sentences"])
        assert 7 not in ran.selected
        assert not ran.arrays["exact"][7]
        arrays = ran.arrays
        assert np.flatnonzero(np.isnan(arrays.pop("influence"))).tolist() == [7]
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert math.isfinite(ran.summary["validation"]["random"]["measured"])
        if changes.get("landmarks", {}).get("count") == 119:  # 7 is one of them: it is none whose influence is known
            (round_,) = ran.done[Stage.SELECT][0].spec["landmarks"]
            with ran.compute.store.local(round_["gradients"][0]) as path:
                G_mk = load_file(path)["gradients"]
            assert G_mk.isfinite().all()
            measure = Measure(G_tk=G_mk[:1], normalize=False, V_rk=G_mk[:0], Hb_ck=G_mk[:0])
            assert 7 in token_files.read_indices(ran.compute.store, round_["tokens"])
            assert 7 not in exact_rows(ran.compute.store, measure, [round_])[0]

    def test_winnow_select_names_it(
        self, broken: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pool, out = self.pool(tmp_path / "pool.jsonl", 7), tmp_path / "out.jsonl"
        options = {"model": broken, "pool": pool, "target": files[1], "budget": 6, "out": out, "device": "cpu"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += ["--set", "method=exact_influence", "--set", "validate=false"]
        get_command(commands.select)(words, standalone_mode=False)
        assert "Not finite in the pool: row-7\n" in capsys.readouterr().out

    def test_a_budget_of_all_samples_cannot_be_met_without_one(
        self, broken: Path, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        pool = self.pool(tmp_path / "pool.jsonl", 7)
        with pytest.raises(DataError, match="budget is 120, but only 119 samples have a finite exact influence"):
            run(broken, pool, files[1], tmp_path / "store", seed=3, budget=120)

    def test_more_are_an_error_that_names_them(self, broken: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
        marked = range(3, 36, 3)
        pool = self.pool(tmp_path / "pool.jsonl", *marked)
        named = ", ".join(f"row-{i}" for i in list(marked)[:10])
        for changes in ({"method": "exact_influence"}, {"method": "rds_plus"}):
            with pytest.raises(DataError, match=rf"^11 of 120 samples have .*non-finite .*\({named}, \.\.\.\)"):
                run(broken, pool, files[1], tmp_path / "store", **changes)

    def test_units_that_each_have_few_are_counted_together(
        self, broken: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("EMBED_SHARD_TOKENS", "GRADIENT_SHARD_TOKENS"):
            monkeypatch.setattr(shards, name, 2000)
        pool = self.pool(tmp_path / "pool.jsonl", 5, 110)
        for changes in ({"method": "exact_influence"}, {"method": "rds_plus"}, {"landmarks": {"count": 2}}):
            with pytest.raises(DataError, match=r"^2 of 120 .*\(row-5, row-110\)"):
                run(broken, pool, files[1], tmp_path / "store", **changes)

    def test_those_of_the_shortlist_are_counted_together_too(
        self, broken: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shards, "GRADIENT_SHARD_TOKENS", 2000)
        pool = self.pool(tmp_path / "pool.jsonl")
        ran = run(broken, pool, files[1], tmp_path / "store", refine=1.0, validate=False)
        store, shortlist = ran.compute.store, ran.done[Stage.REFINE]
        assert len(shortlist) > 1
        for unit_ in (shortlist[0], shortlist[-1]):  # as if one of each had overflowed
            row = int(token_files.read_indices(store, unit_.spec["tokens"])[unit_.spec["start"]])
            store.write_json(result_key(unit_.artifact_key), {**unit_.result, "nonfinite": [row]})
        influence = ran.path(Stage.PROPAGATE, -1)  # the second one, from all that is exact
        influence.with_name(f"{influence.name}.json").unlink()
        with pytest.raises(DataError, match=r"^2 of 108 shortlisted samples"):
            run(broken, pool, files[1], tmp_path / "store", refine=1.0, validate=False)

    def test_one_in_a_hundred_is_the_most(self) -> None:
        check_nonfinite(None, "", [7], 100, "samples")  # type: ignore[arg-type]

    @pytest.mark.parametrize("method", ["exact_influence", "rds_plus"])
    def test_a_broken_target_takes_no_part(self, broken: Path, tmp_path: Path, method: str) -> None:
        targets = read_jsonl(self.pool(tmp_path / "marked.jsonl", 5))
        pool = write_jsonl(tmp_path / "pool.jsonl", read_jsonl(self.pool(tmp_path / "plain.jsonl"))[:10])
        broken_one, without = (
            run(
                broken, pool, write_jsonl(tmp_path / f"{len(rows)}.jsonl", rows), tmp_path / "store", method=method,
                selection="top_k", validate=False,
            )
            for rows in (targets, targets[:5] + targets[6:])
        )  # fmt: skip
        assert broken_one.done[Stage.SELECT][0].result["nonfinite_targets"] == [5]
        assert broken_one.arrays["influence"] == pytest.approx(without.arrays["influence"], rel=1e-4)
        assert broken_one.selected == without.selected
        assert 5 not in broken_one.arrays["held_out_targets"]

    def test_a_target_without_a_finite_gradient_is_an_error_too(self, broken: Path, tmp_path: Path) -> None:
        pool = self.pool(tmp_path / "pool.jsonl")
        target = write_jsonl(
            tmp_path / "target.jsonl",
            [*target_rows(3, "python_function"), *read_jsonl(self.pool(tmp_path / "t", 0))[:1]],
        )
        with pytest.raises(DataError, match=r"^1 of 4 samples have .*\(row-0\)"):
            run(broken, pool, target, tmp_path / "store")
