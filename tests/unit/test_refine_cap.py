"""How many samples are refined: what a share of the cost of `rds_plus` allows, between two budgets and the rest of the pool."""

from typing import Any

import pytest
from support.counts import PAPER_COUNTS as COUNTS
from support.counts import PAPER_SHAPE as SHAPE

from service.plan import estimate, passes
from service.plan.job_counts import JobCounts
from service.plan.limits import LEAST_REFINE, UNKNOWN_COST_REFINE
from service.plan.operations import Shape, TokenCounts
from service.plan.parameters import Parameters
from service.plan.rates import Rates
from service.plan.refine_cap import RefineCap, refine_cap, shortlist_size
from service.plan.stage_costs import StageCosts
from service.plan.stages import Stage

REFINE = {"size": "auto", "share": None, "rounds": 8, "min_captured": 0.95, "max_cost": 1 / 3.5}


def parameters(max_cost: float = 1 / 3.5, landmarks: int = 4096, **given: Any) -> dict[str, Any]:
    found = Parameters.model_validate({"embedding": {"kind": "hidden"}, **given}).model_dump(mode="json")
    return {
        **found,
        "landmarks": {**found["landmarks"], "count": landmarks},
        "refine": {**REFINE, "max_cost": max_cost},
    }


def cap(counts: JobCounts = COUNTS, **given: Any) -> RefineCap:
    return refine_cap(SHAPE, parameters(**given), counts)


def total(found: RefineCap, samples: int) -> float:
    assert found.fixed_operations is not None
    assert found.operations_per_sample is not None
    return found.fixed_operations + samples * found.operations_per_sample


def test_the_cap_is_the_largest_number_that_costs_no_more_than_allowed() -> None:
    found = cap(max_cost=0.5)
    assert found.allowed_operations is not None
    assert total(found, found.samples) <= found.allowed_operations < total(found, found.samples + 1)
    assert (found.is_floor, found.unknown, found.note) == (False, None, None)
    assert found.times_budget == found.samples / 10_000
    assert 3 < found.times_budget < 3.5, "an eighth is embedding, a sample two forwards"


def test_what_is_allowed_is_a_share_of_what_rds_plus_would_compute() -> None:
    rival = {**parameters(), "method": "rds_plus"}
    costs = StageCosts(SHAPE, rival, COUNTS, "bfloat16", 512).all()
    embedded = costs[Stage.EMBED].operations + costs[Stage.EMBED_TARGET].operations
    assert cap(max_cost=0.25).allowed_operations == pytest.approx(0.25 * embedded)


@pytest.mark.parametrize("kind", ["hidden", "jvp", "output", "auto"])
def test_what_is_spent_anyway_is_what_the_stages_before_cost(kind: str) -> None:
    given = {**parameters(embedding={"kind": kind}), "refine": {**REFINE, "size": 0}}
    costs = StageCosts(SHAPE, given, COUNTS, "bfloat16", 512).all()
    names = [Stage.LANDMARK_GRADIENTS, Stage.TARGET_GRADIENTS, Stage.CANDIDATES, Stage.EMBED]
    expected = sum(costs[stage].operations for stage in names if stage in costs)
    assert cap(embedding={"kind": kind}).fixed_operations == pytest.approx(expected)


def test_a_cap_in_multiples_of_rds_plus_has_the_room_that_arithmetic_gives_it() -> None:
    """A gradient is about two forwards at 7B."""
    free = cap(embedding={"kind": "rds"}, max_cost=1.5)  # whose embedding is a whole one of rds_plus
    assert free.operations_per_sample is not None
    assert free.allowed_operations is not None
    forwards = free.operations_per_sample / (free.allowed_operations / 1.5 / 200_000)
    assert forwards == pytest.approx(2, rel=0.02)
    left = 0.5 * 200_000 / forwards - 4096  # after one whole embedding of the pool, and the landmarks
    assert free.samples == pytest.approx(left, rel=0.02)


AUTO: dict[str, Any] = {"embedding": {"kind": "auto"}}


def offered(**refine: Any) -> list[str]:
    found = {**parameters(**AUTO), "refine": {**REFINE, **refine}}
    return list(passes.offered_kinds(SHAPE, found, COUNTS))


def test_output_is_compared_from_the_cap_on_that_leaves_two_budgets_after_it() -> None:
    least = passes.output_from(SHAPE, parameters(**AUTO), COUNTS)
    assert least is not None
    assert 1.1 < least < 1.4, "a forward of the pool, and 24,000 gradients of 200,000"
    assert offered(max_cost=1.001 * least) == ["text", "text_hidden", "hidden", "output"]
    assert offered(max_cost=0.999 * least) == offered() == ["text", "text_hidden", "hidden"]
    found = cap(**AUTO, max_cost=1.001 * least)
    assert (found.is_floor, found.times_budget) == (False, pytest.approx(2, abs=0.02))
    assert not cap(**AUTO, max_cost=0.999 * least).is_floor, "without a forward of the pool much is left"


def test_a_cheaper_candidate_that_is_chosen_leaves_more_to_refine() -> None:
    given = parameters(**AUTO, max_cost=2.0)
    text, hidden, output = (
        refine_cap(SHAPE, given, COUNTS, {**given["embedding"], "kind": kind}) for kind in ("text", "hidden", "output")
    )
    assert refine_cap(SHAPE, given, COUNTS) == output
    assert text.samples > hidden.samples > output.samples
    assert total(text, text.samples) == pytest.approx(total(output, output.samples), rel=1e-4)


def test_what_is_left_of_a_small_pool_is_enough_to_refine_after_output() -> None:
    most = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=150_000, estimated=False, usable=154_000)
    least = passes.output_from(SHAPE, parameters(**AUTO), most)
    assert least is not None
    all_exact = passes.gradients(SHAPE, parameters(), most.pool, is_scaled=True) / passes.rds_plus(
        SHAPE, parameters(), most
    )
    assert least == pytest.approx(1.05 + all_exact, abs=0.1)


def test_output_is_not_compared_where_nothing_bounds_the_cost() -> None:
    for unbounded in ({"size": 2.4}, {"share": 0.2}, {"size": 0}):
        assert offered(max_cost=10.0, **unbounded) == ["text", "text_hidden", "hidden"]


def test_output_is_not_compared_where_its_cost_is_unknown() -> None:
    dear = parameters(**AUTO, max_cost=10.0)
    assert passes.offered_kinds("of the model, it has none", dear, COUNTS)[-1] == "hidden"
    unmatched = {**dear, "gradient": {**dear["gradient"], "modules": "experts"}}
    assert passes.output_from(SHAPE, unmatched, COUNTS) is None


def test_a_plan_says_what_is_compared_and_from_when_on_output_is() -> None:
    def planned(shape: Shape | str = SHAPE, **given: Any) -> Any:
        found = Parameters.model_validate({**AUTO, **given}).model_dump(mode="json")
        return estimate.plan(shape, found, COUNTS, Rates(device="x"), {})["candidates"]

    by_default = planned()
    assert by_default["kinds"] == ["text", "text_hidden", "hidden"]
    assert planned(refine={"max_cost": by_default["output_from"]})["kinds"][-1] == "output"
    assert planned(refine={"max_cost": by_default["output_from"] - 0.001})["kinds"] == by_default["kinds"]
    for unbounded in (planned(refine=0), planned("of the model, its config.json is missing")):
        assert unbounded == {"kinds": by_default["kinds"], "output_from": None}
    assert planned(embedding={"kind": "text"}) is None


def test_two_budgets_are_the_least_and_that_is_said() -> None:
    found = cap(max_cost=0.01)
    assert (found.samples, found.times_budget, found.is_floor) == (20_000, LEAST_REFINE, True)
    assert found.note is not None
    assert "20000 samples are refined all the same" in found.note
    assert found.allowed_operations is not None
    assert total(found, found.samples) > found.allowed_operations


def test_the_rest_of_the_pool_is_the_most() -> None:
    found = cap(max_cost=10.0)
    assert found.samples == 200_000 - 4096
    assert not found.is_floor
    few = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=150_000, estimated=False, usable=154_000)
    assert cap(few, max_cost=0.01).samples == 154_000 - 4096
    everything = cap(landmarks=300_000, max_cost=0.01)
    assert (everything.samples, everything.is_floor, everything.note) == (0, False, None)


def test_an_average_sample_is_one_of_the_usable() -> None:
    half = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=10_000, estimated=False, usable=100_000)
    each, of_half = cap().operations_per_sample, cap(half).operations_per_sample
    assert each is not None
    assert of_half == pytest.approx(2 * each, rel=0.01)  # as many tokens in half of the samples
    assert half.drawn(100_000).tokens == COUNTS.pool.tokens


def test_the_warm_up_and_the_validation_do_not_count() -> None:
    plain = cap(max_cost=0.5)
    assert cap(max_cost=0.5, warmup={"samples": 10_000}, validate=False) == plain
    adapted = cap(max_cost=0.5, warmup={"samples": 10_000, "lora": {"rank": 64}})
    assert adapted.operations_per_sample != plain.operations_per_sample, "measured on the adapters"


def test_exact_scaling_makes_a_sample_dearer_and_the_list_shorter() -> None:
    adam = cap(max_cost=0.5, optimizer={"type": "adamw"}, warmup={})
    assert adam.samples < cap(max_cost=0.5).samples


@pytest.mark.parametrize(
    ("shape", "given", "why"),
    [
        ("of the model, its config.json has no hidden_size", {}, "has no hidden_size"),
        (SHAPE, {"gradient": {"modules": "experts"}}, "matches none of the block layers"),
    ],
)
def test_without_a_cost_the_size_is_a_multiple_of_the_budget(
    shape: Shape | str, given: dict[str, Any], why: str
) -> None:
    found = refine_cap(shape, parameters(**given), COUNTS)
    assert found.samples == UNKNOWN_COST_REFINE * 10_000
    assert (found.allowed_operations, found.fixed_operations, found.operations_per_sample) == (None, None, None)
    assert not found.is_floor
    assert found.note is not None
    assert why in found.note
    assert "2.4 times the budget" in found.note
    small = JobCounts(pool=TokenCounts(12, 60, 600, 30), target=COUNTS.target, budget=5, estimated=False)
    assert refine_cap(shape, parameters(landmarks=4, **given), small).samples == 8


def test_a_cap_is_json() -> None:
    found = cap(max_cost=0.5)
    assert found.as_dict()["samples"] == found.samples
    assert RefineCap(**found.as_dict()) == found


@pytest.mark.parametrize(
    ("refine", "expected"),
    [
        ({"size": "auto"}, 33),
        ({"size": 2.4}, 24),
        ({"size": 2.41}, 25),
        ({"size": 0}, 0),
        ({"size": 1000}, 900),
        ({"share": 0.07}, 70),  # 0.07 * 1000 is a little more than 70 in binary
        ({"share": 0.001}, 10),
        ({"share": 1.0}, 900),
    ],
)
def test_the_shortlist_is_as_large_as_its_parameters_say(refine: dict[str, Any], expected: int) -> None:
    assert shortlist_size({**REFINE, **refine}, budget=10, usable=1000, landmarks=100, cap=33) == expected


def test_nothing_is_left_where_every_sample_is_a_landmark() -> None:
    assert shortlist_size({**REFINE, "size": 2.4}, budget=10, usable=100, landmarks=100, cap=0) == 0


def test_rds_plus_costs_a_forward_of_the_pool_and_of_the_target() -> None:
    linear = 2 * (COUNTS.pool.tokens + COUNTS.target.tokens) * SHAPE.blocks * SHAPE.block_weights
    attention = 2 * (COUNTS.pool.squares + COUNTS.target.squares) * SHAPE.attention_width * SHAPE.blocks
    assert passes.rds_plus(SHAPE, parameters(), COUNTS) == pytest.approx(linear + attention)


def test_a_plan_says_what_its_cap_allows() -> None:
    def planned(**given: Any) -> dict[str, Any]:
        found = Parameters.model_validate(given).model_dump(mode="json")
        return estimate.plan(SHAPE, found, COUNTS, Rates(device="x"), {})

    capped, free = planned(refine={"max_cost": 0.01}), planned(refine={"max_cost": 0.5})
    assert (capped["refine_cap"]["samples"], capped["refine_cap"]["is_floor"]) == (20_000, True)
    (warning,) = capped["warnings"]
    assert "up to 20000 samples" in warning
    assert (free["refine_cap"]["is_floor"], free["warnings"]) == (False, [])
    assert free["refine_cap"]["samples"] > 20_000
    for given in ({"refine": {"size": 3}}, {"refine": 0.2}, {"method": "exact_influence"}):
        assert planned(**given)["refine_cap"] is None
