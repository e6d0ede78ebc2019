"""What a job costs beside other ways to choose, by our count and by the paper's formula."""

from typing import Any

import pytest
from support.counts import PAPER_COUNTS as COUNTS
from support.counts import PAPER_SHAPE as SHAPE

from service.plan import estimate
from service.plan.compared_costs import APART, ComparedCosts, compared
from service.plan.parameters import Parameters
from service.plan.rates import Rates
from service.plan.stage_costs import StageCosts
from service.plan.stages import JobInputs, Stage
from worker import costs

FORWARD = 2 * SHAPE.weights * 6e7
"""2 d T"""


def parameters(**given: Any) -> dict[str, Any]:
    return Parameters.model_validate({"embedding": {"kind": "hidden"}, **given}).model_dump(mode="json")


def of(rates: Rates = Rates(), **given: Any) -> ComparedCosts:
    return compared(SHAPE, parameters(**given), COUNTS, "bfloat16", rates)


def test_the_papers_formula_gives_the_papers_ratios() -> None:
    """872 TF of 2,800 for the authors' setting at 7 billion weights and 200,000 samples, and 8,400 for LESS (METHOD 10)."""
    found = of()
    assert found.rds_plus.paper_operations == FORWARD
    assert found.exact_influence.paper_operations == 3 * FORWARD
    share = 2 * 4 / 32 + 3 * 4096 / 200_000
    assert found.authors.paper_operations == pytest.approx(share * FORWARD)
    assert share == pytest.approx(872 / 2800, rel=0.01)


@pytest.mark.parametrize(
    ("embedding", "forwards"),
    [
        ({"kind": "hidden"}, 1 / 8),
        ({"kind": "hidden", "blocks": 2}, 1 / 16),
        ({"kind": "text_hidden", "blocks": 2}, 1 / 16),
        ({"kind": "text"}, 0),
        ({"kind": "jvp", "tangents": 5}, 1 / 4),
        ({"kind": "rds"}, 1),
        ({"kind": "output"}, 1),
    ],
)
def test_the_formula_of_a_job_counts_its_embedding_and_its_exact_samples(
    embedding: dict[str, Any], forwards: float
) -> None:
    found = of(embedding=embedding, landmarks={"count": 2000}, refine={"size": 2.4})
    exact = 3 * (2000 + 24_000) / 200_000
    assert found.job.paper_operations == pytest.approx((forwards + exact) * FORWARD)
    assert found.rds_plus_ratio_by_paper == pytest.approx(1 / (forwards + exact), abs=1e-3)


def test_ours_is_the_sum_of_the_stages_without_warm_up_and_validation() -> None:
    given = parameters(warmup={"samples": 1000}, refine={"size": 2})
    stages = StageCosts(SHAPE, given, COUNTS, "bfloat16", 512).all()
    found = of(warmup={"samples": 1000}, refine={"size": 2})
    assert found.job.operations == pytest.approx(
        sum(cost.operations for stage, cost in stages.items() if stage not in APART)
    )
    assert found.warmup is not None
    assert found.warmup.operations == pytest.approx(stages[Stage.WARMUP].operations)
    assert found.warmup.paper_operations == pytest.approx(3 * FORWARD * 1000 / 200_000)
    assert found.rds_plus_ratio == pytest.approx(found.rds_plus.operations / found.job.operations, abs=1e-3)
    plain = of(refine={"size": 2})
    assert plain.warmup is None
    assert (plain.job, plain.rds_plus, plain.authors) == (found.job, found.rds_plus, found.authors)


def test_the_default_cap_holds_the_job_at_its_share_of_rds_plus() -> None:
    found = of(embedding={"kind": "hidden"}, landmarks={"count": 2000}, refine={"max_cost": 0.5})
    assert found.rds_plus_ratio == pytest.approx(2, rel=0.02)


def test_the_others_are_the_same_whatever_the_job_is() -> None:
    found = [
        of(**given)
        for given in (
            {"method": "exact_influence", "embedding": {}},
            {"method": "rds_plus", "embedding": {}},
            {"method": "random", "embedding": {}},
            {"landmarks": {"count": 100}, "refine": 0, "kernel": {"ridge": 1}},
            {"optimizer": {"type": "sgd"}, "selection": "weighted", "curvature": {"type": "fisher"}},
        )
    ]
    for each in found[1:-1]:
        assert (each.rds_plus, each.authors) == (found[0].rds_plus, found[0].authors)
    assert found[-1].rds_plus == found[0].rds_plus, "without the curvature"
    assert found[0].job == found[0].exact_influence
    assert (found[1].job, found[1].rds_plus_ratio) == (found[1].rds_plus, 1.0)
    assert (found[2].job.operations, found[2].rds_plus_ratio, found[2].rds_plus_ratio_by_paper) == (0, None, None)


def test_seconds_are_given_where_every_stage_was_measured() -> None:
    stages = (Stage.LANDMARK_GRADIENTS, Stage.EMBED, Stage.PROPAGATE)
    known = Rates(operations=dict.fromkeys(stages, 1e15), samples={Stage.SELECT: 1e6}, device="x")
    found = of(known, refine={"size": 2})
    for cost in (found.job, found.rds_plus, found.exact_influence, found.authors):
        assert cost.seconds == pytest.approx(cost.operations / 1e15 + 0.2, rel=1e-3), (
            "targets and shortlist at the same rate"
        )
    text_only = Rates(operations={Stage.LANDMARK_GRADIENTS: 1e15, Stage.PROPAGATE: 1e15}, samples={Stage.SELECT: 1e6})
    found = of(text_only, refine={"size": 2})
    assert (found.job.seconds, found.rds_plus.seconds, found.authors.seconds) == (None, None, None)
    assert found.exact_influence.seconds is not None
    assert of(Rates(matmul={"bfloat16": 1e15}, device="x")).rds_plus.seconds is None, (
        "an assumed rate is no measured one"
    )


def test_a_plan_holds_the_comparison() -> None:
    given = parameters(refine={"size": 2}, warmup={"samples": 1000})
    plan = estimate.plan(SHAPE, given, COUNTS, Rates(), {})
    assert plan["costs"] == of(refine={"size": 2}, warmup={"samples": 1000}).model_dump()


WEIGHTED: dict[str, Any] = {"selection": "weighted", "gradient": {"normalize": False}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, []),
        ({"selection": "weighted", "gradient": {"normalize": True}}, []),
        (WEIGHTED, ["favours samples with large gradients"]),
        ({**WEIGHTED, "optimizer": {"type": "sgd"}, "curvature": {"type": "ggn"}}, ["favours samples"]),
        (
            {**WEIGHTED, "optimizer": {"type": "sgd", "learning_rate": 1.0}, "curvature": {"type": "fisher"}},
            ["favours samples", "destroyed the choice"],
        ),
        (
            {**WEIGHTED, "optimizer": {"type": "sgd", "learning_rate": 0.5}, "curvature": {"type": "fisher"}},
            ["favours samples"],
        ),
    ],
)
def test_a_plan_warns_of_weights_that_were_measured_to_harm(given: dict[str, Any], said: list[str]) -> None:
    warnings = estimate.plan(SHAPE, parameters(**given, refine={"size": 2}), COUNTS, Rates(device="x"), {})["warnings"]
    assert len(warnings) == len(said)
    assert all(part in warning for part, warning in zip(said, warnings, strict=True))


# What a job has cost


PREPARED = {
    "pool_counts": {"samples": 200_000, "tokens": int(6e7), "squares": int(2e10), "response_tokens": int(3e7)},
    "target_counts": {"samples": 48, "tokens": 14_400, "squares": int(4.6e6), "response_tokens": 7_200},
    "usable": 200_000,
    "dtype": "bfloat16",
}


def result_of(stages: dict[Stage, list[dict[str, Any]]], refined: int, **given: Any) -> ComparedCosts:
    job = JobInputs(model={}, pool="p", target="t", budget=10_000, parameters=parameters(**given))
    found = {"landmark_count": 2000, "refined_count": refined, "embedding": {"chosen": given.pop("chosen", None)}}
    dumped = costs.of_job(SHAPE, job, {Stage.PREPARE: [PREPARED], **stages}, found, Rates())
    assert dumped is not None
    return ComparedCosts.model_validate(dumped)


def unit(operations: float | None, seconds: float = 1.0) -> dict[str, Any]:
    return {"seconds": seconds} if operations is None else {"seconds": seconds, "operations": operations}


UNITS = {
    Stage.LANDMARK_GRADIENTS: [unit(1e15), unit(2e15)],
    Stage.TARGET_GRADIENTS: [unit(1e12)],
    Stage.EMBED: [unit(4e14, 2.5)],
    Stage.PROPAGATE: [unit(1e10)],
    Stage.REFINE: [unit(5e15), unit(6e15)],
    Stage.SELECT: [unit(None)],
    Stage.VALIDATE: [unit(9e18, 99.0)],
    Stage.WARMUP: [unit(9e18, 99.0)],
}


def test_a_result_says_what_was_really_computed() -> None:
    found = result_of(UNITS, 12_345, landmarks={"count": 2000})
    planned = of(landmarks={"count": 2000})
    assert found.job.operations == 1e15 + 2e15 + 1e12 + 4e14 + 1e10 + 5e15 + 6e15
    assert found.job.seconds == 9.5, "of all stages but warm-up and validation"
    assert found.job.paper_operations == pytest.approx((1 / 8 + 3 * (2000 + 12_345) / 200_000) * FORWARD)
    assert (found.rds_plus, found.exact_influence, found.authors) == (
        planned.rds_plus,
        planned.exact_influence,
        planned.authors,
    )
    assert found.rds_plus_ratio == pytest.approx(found.rds_plus.operations / found.job.operations, abs=1e-3)


def test_units_that_did_not_count_are_counted_by_the_plan() -> None:
    uncounted = {**UNITS, Stage.REFINE: [unit(5e15), unit(None)]}
    given = {"landmarks": {"count": 2000}, "refine": {"size": 1.2345}}
    expected = StageCosts(SHAPE, parameters(**given), COUNTS, "bfloat16", 512).all()[Stage.REFINE].operations
    counted, mixed = result_of(UNITS, 12_345, **given), result_of(uncounted, 12_345, **given)
    assert mixed.job.operations - counted.job.operations == pytest.approx(expected - 1.1e16, rel=1e-6)


def test_the_chosen_embedding_is_what_the_formula_counts() -> None:
    given = {"landmarks": {"count": 2000}, "embedding": {"kind": "auto"}}
    job = JobInputs(model={}, pool="p", target="t", budget=10_000, parameters=parameters(**given))
    chosen = {"kind": "hidden", "pooling": "last", "blocks": 2, "tangents": 2}
    found = {"landmark_count": 2000, "refined_count": 0, "embedding": {"chosen": chosen}}
    dumped = costs.of_job(SHAPE, job, {Stage.PREPARE: [PREPARED], **UNITS}, found, Rates())
    assert dumped is not None
    assert dumped["job"]["paper_operations"] == pytest.approx((1 / 16 + 3 * 2000 / 200_000) * FORWARD)


def test_a_model_that_cannot_be_counted_has_no_comparison() -> None:
    for shape, given in (("of the model, its config.json has no n", {}), (SHAPE, {"gradient": {"modules": "experts"}})):
        job = JobInputs(model={}, pool="p", target="t", budget=10_000, parameters=parameters(**given))
        found = {"landmark_count": 2000, "refined_count": 0, "embedding": {"chosen": None}}
        assert costs.of_job(shape, job, {Stage.PREPARE: [PREPARED], **UNITS}, found, Rates()) is None
