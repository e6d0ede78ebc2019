"""What the summary says in words."""

from typing import Any

import pytest

from service.plan.stages import Stage
from worker import summary
from worker.stages import validate


@pytest.mark.parametrize(
    ("solution", "said"),
    [
        (None, []),
        ({"restricted": False, "converged": True, "kkt_residual": 1e-9}, []),
        ({"restricted": True, "converged": True, "kkt_residual": 1e-9}, ["No ridge gives the budget exactly"]),
        ({"restricted": False, "converged": True, "kkt_residual": 2e-8}, ["KKT residual is 2.0e-08"]),
        ({"restricted": False, "converged": False, "kkt_residual": 1e-9}, ["KKT residual is 1.0e-09"]),
    ],
)
def test_what_the_certificate_does_not_promise_is_said(solution: dict[str, Any] | None, said: list[str]) -> None:
    found = summary.of_method({Stage.PREPARE: [{"notes": []}], Stage.SELECT: [{"solution": solution}]})
    assert len(found["notes"]) == len(said)
    assert all(part in note for part, note in zip(said, found["notes"], strict=True))
    assert set(found["notes"]) <= set(found["sentences"])
    assert any("1.48 points" in text for text in found["sentences"]) == (solution is not None)


def test_the_notes_of_all_rounds_are_given() -> None:
    results = {Stage.PREPARE: [{"notes": ["first"]}], Stage.PROPAGATE: [{"notes": ["grown"]}, {"notes": []}]}
    assert summary.of_method(results)["notes"] == ["first", "grown"]


@pytest.mark.parametrize(("stopped", "promise", "said"), [
    ("promised", 0.962, ["2 rounds", "96 %"]), ("max_cost", 0.9, ["90 %", "refine.max_cost"]), ("size", None, ["1.5 times"]),
])  # fmt: skip
def test_what_was_refined_and_is_expected_of_it_is_said(stopped: str, promise: float | None, said: list[str]) -> None:
    first = {"refined": 0, "times_budget": 0.0, "most": 20, "promise": None, "stopped": None}
    second = {**first, "refined": 8, "times_budget": 0.8, "promise": 0.7}
    third = {**first, "refined": 15, "times_budget": 1.5, "promise": promise, "stopped": stopped}
    rounds = [{"refinement": each, "notes": []} for each in (first, second, third)]
    found = summary.of_method({Stage.PREPARE: [{"notes": []}], Stage.PROPAGATE: rounds})
    assert [round_["refined"] for round_ in found["refinement"]["rounds"]] == [8, 15]
    (sentence,) = (text for text in found["sentences"] if "15 samples" in text)
    assert all(part.replace(" %", "%") in sentence for part in said)


def test_rounds_of_landmarks_that_were_not_enough_state_their_fidelity() -> None:
    grown = {"grow": {"count": 64}, "fidelity": {"mean_spearman": 0.25}, "notes": []}
    chosen = {"chosen": {"kind": "hidden"}, "candidates": [{}, {}]}
    exact = {"fidelity": None, "notes": ["exact"]}
    results = {
        Stage.PREPARE: [{"notes": []}],
        Stage.CHOOSE_EMBEDDING: [chosen],
        Stage.PROPAGATE: [grown, exact],
    }
    found = summary.of_method(results)
    grew, last = found["notes"]
    assert ("raised to 64" in grew, "0.250" in grew, last) == (True, True, "exact")
    # The embedding that was chosen was not used in the end.
    assert not any("Embedding" in sentence for sentence in found["sentences"])


@pytest.mark.parametrize("is_adam", [False, True])
def test_where_adam_steps_it_is_said_that_its_second_moment_was_held(is_adam: bool) -> None:
    change = {"measured": -2e-3, "predicted": -3e-3, "predicted_second_order": None}
    found = {"loss": 1.5, "selection": change, "random": change, "held_out": None}
    assert (
        "(predicted -3.00e-03 with Adam's second moment held" in validate._sentence(found, is_adam=is_adam)
    ) == is_adam


def test_what_was_left_out_or_rendered_otherwise_is_said() -> None:
    none: dict[str, Any] = {"count": 0, "by_reason": {}, "first": []}
    prepared = {
        "notes": [],
        "unusable": {"pool": {"count": 4, "by_reason": {"no_reply": 1, "refused": 3}, "first": []}, "target": none},
        "rendering": {"pool": {"system_folded": 2, "unknown_to_this": 1}, "target": {}},
    }
    left_out, folded, other = summary.of_method({Stage.PREPARE: [prepared], Stage.SELECT: [{}]})["notes"]
    assert "4 of the pool (refused: 3, no_reply: 1)" in left_out
    assert folded.startswith("In 2 samples of the pool, the system message")
    assert other == "In 1 sample of the pool, unknown_to_this."
