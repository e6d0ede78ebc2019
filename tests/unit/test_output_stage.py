"""Whole jobs whose embedding is that of the output layer: asked for, or compared by `auto` where it is affordable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.local_job import Ran, load, remembering, write_files

from service.plan import operations
from service.plan.stages import Stage
from worker.influence import EmbeddingOptions, embed
from worker.loading.model_shape import counts_of, shape_of

POOL, BUDGET, HIDDEN = 60, 4, 32
OUTPUT: dict[str, Any] = {"kind": "output", "blocks": 4}  # the default number, of which it makes no use

Job = Callable[..., Ran]


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return remembering(tiny_llama, *write_files(folder, POOL, 18), folder / "store", budget=BUDGET, validate=False)


def test_a_whole_job(job: Job, tiny_llama: Path) -> None:
    ran = job(embedding=OUTPUT, refine={"size": 2.4, "rounds": 3})
    model, pool = load(tiny_llama), ran.tokens("pool")
    rows = load_file(ran.path(Stage.EMBED))["embeddings"]
    expected = embed(model, pool, options=EmbeddingOptions(kind="output"))
    assert rows.shape == (POOL, HIDDEN**2)
    torch.testing.assert_close(rows.float(), expected, rtol=2e-3, atol=2e-3)
    (unit,) = ran.done[Stage.EMBED]
    assert unit.result["operations"] == operations.embedding(shape_of(model), counts_of(pool), {"kind": "output"})
    assert unit.result["width"] == operations.embedding_width(shape_of(model), {"kind": "output"})
    assert len(ran.selected) == BUDGET
    assert len(ran.done[Stage.REFINE]) == 3
    assert ran.summary["fidelity"]["mean_spearman"] > 0


def test_it_depends_on_the_model_and_is_found_again(job: Job) -> None:
    first, second = (job(embedding=OUTPUT, refine=refine) for refine in ({"size": 2.4, "rounds": 3}, 0))
    assert first.keys(Stage.EMBED) == second.keys(Stage.EMBED)
    warm = job(embedding=OUTPUT, refine=0, warmup={"samples": 8})
    assert warm.keys(Stage.EMBED) != first.keys(Stage.EMBED)


def test_auto_compares_it_where_the_cap_affords_it(job: Job) -> None:
    ran = job(embedding={"kind": "auto"}, refine={"max_cost": 3.5})
    table = ran.summary["embedding"]["candidates"]
    assert [(entry["kind"], entry["cost"]) for entry in table][2:] == [
        ("hidden", pytest.approx(2 / 3)),
        ("output", 1.0),
    ]
    assert [row["kind"] for row in ran.prepared["candidates"]] == [entry["kind"] for entry in table]
    chosen = ran.summary["embedding"]["chosen"]["kind"]
    assert chosen == next(entry["kind"] for entry in table if entry["chosen"])
    cap = ran.prepared["refine_cap"]
    assert cap["samples"] == cap["with"]["output"] <= cap["with"]["text"]
    assert ran.summary["refinement"]["most"] == cap["with"][chosen]


def test_auto_does_not_compare_it_by_default(job: Job) -> None:
    ran = job(embedding={"kind": "auto"})
    assert [entry["kind"] for entry in ran.summary["embedding"]["candidates"]] == ["text", "text_hidden", "hidden"]
