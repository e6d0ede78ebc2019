"""Which samples become landmarks, and which embedding they choose."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.local_job import Ran, remembering, write_files
from support.tiny import pool_rows

from service.plan.stages import Stage

POOL, BUDGET = 40, 8
WHOLE = {"projection_dim": None}

Job = Callable[..., Ran]


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return remembering(tiny_llama, *write_files(folder, POOL, 18), folder / "store", budget=BUDGET, validate=False)


def test_more_than_there_are_samples_are_lowered_and_that_is_said(job: Job) -> None:
    ran = job(gradient=WHOLE, landmarks={"count": 1000})
    assert ran.prepared["landmark_count"] == POOL
    assert ran.selected == job(method="exact_influence", gradient=WHOLE).selected
    notes = ran.summary["notes"]
    assert any("landmarks.count is 1000: lowered to the 40 usable" in note for note in notes)
    assert any("every influence is exact" in note for note in notes)


def test_stratified_ones_hold_every_source_in_its_share(job: Job) -> None:
    ran = job(gradient=WHOLE, landmarks={"count": 20, "choice": "stratified"}, refine=0)
    sources = [row["source"] for row in pool_rows(POOL)]
    chosen = Counter(sources[i] for i in np.flatnonzero(ran.arrays["exact"]))
    for source, count in Counter(sources).items():
        assert abs(chosen[source] - count / 2) <= 1


def test_auto_takes_the_cheapest_candidate_close_to_the_best(job: Job) -> None:
    ran = job(gradient=WHOLE, embedding={"kind": "auto"}, landmarks={"count": 20})
    table = ran.summary["embedding"]["candidates"]
    best = max(entry["mean_spearman"] for entry in table)
    close_ones = [entry for entry in table if entry["mean_spearman"] >= best - 0.01]
    (chosen,) = (entry for entry in table if entry["chosen"])
    assert chosen["cost"] == min(entry["cost"] for entry in close_ones)
    assert chosen["kind"] == ran.summary["embedding"]["chosen"]["kind"]
    assert [entry["kind"] for entry in table] == ["text", "text_hidden", "hidden"]
    assert job(gradient=WHOLE, embedding={"kind": chosen["kind"]}, landmarks={"count": 20}).selected == ran.selected


def test_candidates_are_compared_on_the_first_landmarks_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = {"gradient": WHOLE, "embedding": {"kind": "auto"}, "refine": 0}
    few = job(**auto, landmarks={"count": 10})
    monkeypatch.setattr("worker.stages.prepare.COMPARED_LANDMARKS", 10)
    ran = job(**auto, landmarks={"count": 14})
    assert ran.keys(Stage.CANDIDATES) == few.keys(Stage.CANDIDATES)
    found, expected = ([e["mean_r2"] for e in r.summary["embedding"]["candidates"]] for r in (ran, few))
    assert found == pytest.approx(expected, rel=1e-3)
    assert ran.summary["landmark_count"] == 14
