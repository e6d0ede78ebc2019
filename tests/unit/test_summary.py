"""What the summary says of the weights' certificate."""

from typing import Any

import pytest

from service.jobs.state import Stage
from worker import summary


@pytest.mark.parametrize(
    ("solution", "said"),
    [
        (None, []),
        ({"restricted": False, "kkt_residual": 1e-9}, []),
        ({"restricted": True, "kkt_residual": 1e-9}, ["No ridge gives the budget exactly"]),
        ({"restricted": False, "kkt_residual": 2e-8}, ["not solved to the end: their KKT residual is 2.0e-08"]),
    ],
)
def test_what_the_certificate_does_not_promise_is_said(solution: dict[str, Any] | None, said: list[str]) -> None:
    found = summary.of_method({Stage.PREPARE: [{"notes": []}], Stage.SELECT: [{"solution": solution}]})
    assert len(found["notes"]) == len(said)
    assert all(part in note for part, note in zip(said, found["notes"], strict=True))
    assert set(found["notes"]) <= set(found["sentences"])


def test_of_landmarks_that_grew_the_notes_of_the_last_round_are_told() -> None:
    results = {Stage.PREPARE: [{"notes": ["first"]}], Stage.PROPAGATE: [{"notes": ["grown"]}, {"notes": ["second"]}]}
    assert summary.of_method(results)["notes"] == ["first", "second"]
