"""The downstream benchmark on the example data: that training helps, that nothing of the test is trained on, and its parts."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_form import REPOSITORY, Run
from support.tiny import EXAMPLES, make_tokenizer, pool_rows
from transformers import AutoModelForCausalLM

from worker.influence import OptimizerOptions
from worker.loading.adapters import trainable
from worker.training import Training, train

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import downstream
import downstream_tasks
from corpus import samples_of

SMALL = ("--rows", "60", "--share", "0.2", "--landmarks", "12", "--blocks", "2", "--seeds", "2", "--processes", "1")
TRAINING = ("--epochs", "4", "--learning-rate", "0.003", "--test-rows", "12", "--accuracy")


def files(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def ids(file: str) -> list[str]:
    return [json.loads(line)["id"] for line in (EXAMPLES / file).read_text().splitlines()]


def measured(cache: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (cache / "measured" / kind).rglob("*.json")]


@pytest.mark.slow
def test_it_trains_on_what_is_selected_and_never_on_the_test(run_benchmark: Run, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = run_benchmark("downstream", *SMALL, *TRAINING)
    losses = found["losses"]["target"]
    trained = {name: of for name, of in losses.items() if name != "zero-shot"}
    assert set(trained) == {*downstream_tasks.JOBS, "full pool"}
    assert all(change < -0.1 for of in trained.values() for change in of["change"])
    assert losses["full pool"]["test"][0] < min(losses["random"]["test"])
    assert losses["random"]["test"][0] != losses["random"]["test"][1]

    selections, runs = measured(cache, "selections"), measured(cache, "runs")
    assert (len(selections), len(runs)) == (2 + 5, 2 + 6 * 2 + 2)
    tests, pool = set(ids("target.jsonl")[1::2]), set(ids("pool.jsonl"))
    assert all(len(run["tested_on"]["target"]) == 12 and {*run["tested_on"]["target"]} <= tests for run in runs)
    assert all({*run["trained_on"]} <= pool and not tests & {*run["trained_on"]} for run in runs)
    assert all({*one["ids"]} <= pool and not tests & {*one["given"]} and len(one["ids"]) == 12 for one in selections)

    before = files(cache)
    again = run_benchmark("downstream", *SMALL, *TRAINING)
    assert files(cache) == before
    assert again["losses"] == found["losses"]


def test_with_every_row_a_landmark_the_default_selects_as_the_exact_method(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"corpus": EXAMPLES, "cache": tmp_path, "model": tiny_llama, "device": "cpu", "targets": ("target",)}
    given = {"rows": 40, "landmarks": 40, "seed": 0, "max_length": 128, "share": 0.2, "blocks": 2}
    unused = dict.fromkeys(name for name in downstream_tasks.Setup.__dataclass_fields__ if name not in options | given)
    setup = downstream_tasks.Setup(**options, **given, **unused)
    bench = downstream_tasks.Bench(setup)
    exact = bench.selection("exact_influence", "target", 0)
    assert bench.selection("default", "target", 0)["ids"] == exact["ids"]
    assert bench.selection("rds_plus", "target", 0)["ids"] != exact["ids"]

    finished = downstream_tasks.Bench(replace(setup, finished=True))
    assert finished.selection("exact_influence", "target", 0) == exact
    with pytest.raises(downstream_tasks.NotMeasured):
        finished.selection("exact_influence", "target", 1)


def tuned(folder: Path, weights: list[float] | None, order: slice = slice(None)) -> dict[str, torch.Tensor]:
    """The parameters after two steps on 8 rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = samples_of(pool_rows(8)[order], make_tokenizer(), 96)
    how = Training(
        epochs=2, learning_rate=1e-3, batch_size=8, optimizer=OptimizerOptions(type="adamw"), seed=3, token_budget=512
    )
    if weights is None:
        train(model, trainable(model), samples, how, report=lambda *_: None, progress=lambda *_: None)
    else:
        downstream_tasks.fine_tune(model, samples, np.array(weights), how, precision="float32")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_of_one_change_nothing_and_a_weight_of_zero_leaves_a_row_out(tiny_llama: Path) -> None:
    plain, ones = tuned(tiny_llama, None), tuned(tiny_llama, [1.0] * 8)
    assert all(torch.equal(plain[name], ones[name]) for name in plain)
    # One batch is all rows: the mean over eight with weights 2 and 0 is the plain mean over four.
    half, four = tuned(tiny_llama, [2.0] * 4 + [0.0] * 4), tuned(tiny_llama, None, slice(4))
    assert all(torch.allclose(half[name], four[name], atol=2e-4) for name in four)
    assert not all(torch.allclose(half[name], plain[name], atol=2e-4) for name in four)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 1,234", "1234"),
        ("#### $12.50 each", "12.5"),
        ("####-3.", "-3"),
        ("#### 100", "100"),
        ("#### 7.0", "7"),
        ("the answer is 5", None),
    ],
)
def test_the_number_after_the_marks(text: str, number: str | None) -> None:
    assert downstream_tasks.number_after_marks(text) == number


def test_replies_do_not_depend_on_the_padding_beside_them(tiny_llama: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), make_tokenizer()
    rows = [row for row in pool_rows(12) if len(row["messages"]) == 2]
    together = downstream_tasks.generated(model, tokenizer, rows, tokens=8)
    assert together == [downstream_tasks.generated(model, tokenizer, [row], tokens=8)[0] for row in rows]
    assert len(set(together)) > 1


def test_a_difference_is_carried_only_where_seeds_and_rows_agree() -> None:
    random = np.random.default_rng(0)
    theirs = {seed: {"test": (2 + random.normal(size=40)).tolist()} for seed in range(3)}

    def shifted(by_seed: list[float], noise: float) -> dict[int, dict[str, list[float]]]:
        return {
            seed: {"test": (np.array(theirs[seed]["test"]) + shift + noise * random.normal(size=40)).tolist()}
            for seed, shift in enumerate(by_seed)
        }

    found = downstream.difference(shifted([-0.5, -0.52, -0.48], 0.1), theirs)
    assert found["carried"]
    assert found["mean"] == pytest.approx(-0.5, abs=0.05)
    assert not downstream.difference(shifted([-0.9, -0.5, 0.1], 0.1), theirs)["carried"]
    assert not downstream.difference(shifted([-0.05, -0.05, -0.05], 3.0), theirs)["carried"]
    assert not downstream.difference({0: shifted([-0.5], 0.0)[0]}, theirs)["carried"]
