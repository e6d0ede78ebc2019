"""When a waiting job may start, from what is known."""

from typing import Any

import pytest

from service.jobs.queue import Figures, seconds_until_start

KNOWN: dict[str, Any] = {
    "jobs_before": 2,
    "workers": 2,
    "idle": 0,
    "own_seconds": 60.0,
    "other_seconds": 40.0,
    "free_seconds": 10.0,
    "artifact_seconds": 0.0,
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 50.0),
        ({"workers": 1}, 100.0),
        ({"free_seconds": 70.0}, 70.0),
        ({"artifact_seconds": 80.0}, 80.0),
        ({"jobs_before": 0, "own_seconds": 0.0, "other_seconds": 0.0}, 10.0),
        ({"jobs_before": 0, "own_seconds": 0.0, "other_seconds": 0.0, "free_seconds": None}, None),
        ({"jobs_before": 0, "idle": 1}, 0.0),
        ({"jobs_before": 1, "idle": 1, "free_seconds": None}, 50.0),
        ({"jobs_before": 0, "idle": 1, "artifact_seconds": 30.0}, 30.0),
        ({"jobs_before": 0, "idle": 1, "artifact_seconds": None}, None),
        ({"jobs_before": None, "own_seconds": None}, None),
        ({"jobs_before": None, "other_seconds": None}, None),
        ({"artifact_seconds": None}, None),
        ({"workers": 0}, None),
    ],
)
def test_the_start_is_the_latest_of_what_it_waits_for_and_unknown_if_one_is(
    changed: dict[str, Any], expected: float | None
) -> None:
    assert seconds_until_start(Figures(**{**KNOWN, **changed})) == expected
