"""What single stages cost: embeddings from text, the regression in rounds, the shortlist, the validation."""

from typing import Any

import pytest
from support.counts import COUNTS, SHAPE, parameters

from service.plan import operations, stage_costs
from service.plan.job_counts import JobCounts
from service.plan.limits import MAX_CENTRES
from service.plan.operations import TokenCounts
from service.plan.refine_cap import refine_cap
from service.plan.stage_costs import StageCosts
from service.plan.stages import Stage


def costs_of(counts: JobCounts = COUNTS, **given: Any) -> dict[Stage, stage_costs.StageCost]:
    return StageCosts(SHAPE, parameters(**given), counts, "bfloat16", 16_384).all()


def test_text_is_embedded_without_products_or_a_model() -> None:
    text, beside, hidden = (
        costs_of(embedding={"kind": kind})[Stage.EMBED] for kind in ("text", "text_hidden", "hidden")
    )
    assert (text.operations, text.samples) == (0, 3000)
    assert text.memory_bytes < hidden.memory_bytes
    assert text.artifact_bytes == 2 * 3000 * operations.embedding_width(SHAPE, {"kind": "text"})
    assert beside.operations == hidden.operations > 0
    assert beside.memory_bytes == hidden.memory_bytes
    assert beside.artifact_bytes == text.artifact_bytes + hidden.artifact_bytes


def test_the_output_layer_is_a_pass_through_the_model_and_its_head_twice() -> None:
    output, hidden = (costs_of(embedding={"kind": kind})[Stage.EMBED] for kind in ("output", "hidden"))
    back = 2 * COUNTS.pool.predicted * 49_152 * 576
    outer = 2 * COUNTS.pool.predicted * 2 * 576 * 128  # the second state is projected first
    assert output.operations == pytest.approx(operations.forward(SHAPE, COUNTS.pool) + back + outer)
    assert output.artifact_bytes == 2 * 3000 * 4096
    assert output.memory_bytes > hidden.memory_bytes


def test_a_regression_is_fitted_and_applied_once_more_than_there_are_rounds() -> None:
    fixed: dict[str, Any] = {
        "landmarks": {"count": 600},
        "kernel": {"kind": "rbf", "ridge": 0.1},
        "embedding": {"kind": "hidden"},
    }
    none = costs_of(**fixed, refine=0)[Stage.PROPAGATE].operations
    e, t, k = 576, 48, 16_384

    def once(exact: float) -> float:
        fit = 2 * exact**2 * e + 2 * exact**2 * t + exact**3
        return fit + 2 * 3000 * exact * (e + t) + 2 * exact * t * k

    assert none == pytest.approx(once(600))
    rounds = costs_of(**fixed, refine={"size": 4, "rounds": 3})[Stage.PROPAGATE].operations
    assert rounds == pytest.approx(once(600) + once(800) + once(1000) + once(1200))
    by_kernel = costs_of(**{**fixed, "kernel": {"kind": "auto", "ridge": 0.1}}, refine=0)[Stage.PROPAGATE].operations
    assert by_kernel - none == pytest.approx(2 * 600**2 * (e + t) + 600**3), (
        "fitted for either kernel, applied with one"
    )


def test_kernel_and_ridge_are_chosen_on_some_and_the_best_is_fitted_to_all() -> None:
    def fit(count: int, e: int = 576, t: int = 48, ridges: int = 1) -> float:
        return float(2 * count**2 * e + ridges * (2 * count**2 * t + count**3))

    def regression(landmarks: int, **kernel: Any) -> float:
        given: dict[str, Any] = {"landmarks": {"count": landmarks}, "embedding": {"kind": "hidden"}, "kernel": kernel}
        applied = 2 * 3000 * landmarks * (576 + 48) + 2 * landmarks * 48 * 16_384
        return costs_of(**given, refine=0)[Stage.PROPAGATE].operations - applied

    assert regression(2000) == pytest.approx(2 * fit(2000, ridges=5))
    assert regression(2900) == pytest.approx(2 * fit(2048, ridges=5) + fit(2900))
    assert regression(2900, kind="rbf", ridge=0.1) == pytest.approx(fit(2900))


def test_the_centres_bound_the_memory_of_a_regression() -> None:
    large = JobCounts(
        pool=TokenCounts(1e6, 1.8e8, 5e10, 8e7), target=COUNTS.target, budget=10_000, estimated=False, usable=1_000_000
    )
    few, many, most = (
        costs_of(large, embedding={"kind": "hidden"}, landmarks={"count": 4096}, refine={"size": size})[
            Stage.PROPAGATE
        ].memory_bytes
        for size in (1, 2.4, 10)
    )
    centres = 8 * 5 * MAX_CENTRES**2
    assert few < many < most
    assert most - many == pytest.approx(8 * 76_000 * (576 + 3 * 48)), "only rows are added beyond the centres"
    assert many < centres + 1.5 * 2**30


def test_a_shortlist_is_as_large_as_the_job_says() -> None:
    each = costs_of(refine=0)[Stage.LANDMARK_GRADIENTS].operations / 128
    for refine, samples in (({"size": 2.4}, 360), (0.2, 600), ({"share": 0.01}, 150), ({"size": 1000}, 2872)):
        assert costs_of(refine=refine)[Stage.REFINE].operations == pytest.approx(samples * each)
    capped = refine_cap(SHAPE, parameters(), COUNTS)
    assert costs_of()[Stage.REFINE].samples == capped.samples
    assert 0 < capped.samples < 2872


def test_a_shortlist_holds_no_landmarks() -> None:
    found = costs_of(landmarks={"count": 2900}, refine=1.0)
    assert found[Stage.REFINE].operations == pytest.approx(found[Stage.LANDMARK_GRADIENTS].operations / 29)


def test_a_validation_holds_the_weights_in_float32_unless_they_are_quantised() -> None:
    memory = [
        costs_of(dtype="bfloat16", quantization=quantization)[Stage.VALIDATE].memory_bytes
        for quantization in ("none", "int8")
    ]
    assert memory[0] - memory[1] == pytest.approx(3 * SHAPE.weights)  # 4 bytes each, not 1
