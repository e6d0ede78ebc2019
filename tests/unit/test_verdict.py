"""The verdict: what each finding is decided by, at its bounds, and that the worst comes first."""

from typing import Any

import pytest

from worker import verdict

STEP = {"measured": -2e-4, "predicted": -2e-4}
NONE = {"exact": 0, "near": 0, "repeated": 0}
NOTHING: dict[str, Any] = {"pool": NONE, "excluded": 0, "count": 0, "first": []}
SOME = {"exact": 30, "near": 12, "repeated": 20}


def summary(**changes: Any) -> dict[str, Any]:
    """Of a job with which nothing is wrong."""
    counts = {"samples": 1000, "truncated": 3, "truncated_responses": 0}
    none = {"pool": {"count": 0}, "target": {"count": 0}}
    return {
        "landmark_count": 128,
        "refinement": {"promise": 0.96, "stopped": "promised"},
        "fidelity": {"mean_spearman": 0.7, "spearman": [0.6, 0.8]},
        "validation": {"selection": STEP, "random": {**STEP, "measured": -1e-5}, "held_out": None},
        "unusable": none,
        "nonfinite": none,
        "rendering": {"pool": {}, "target": {}},
        "pool": counts,
        "target": {**counts, "samples": 48},
        "repeats": {"duplicates": NOTHING, "overlap": NOTHING},
        "sources": {"a": {"pool": 300, "selected": 30}, "b": {"pool": 700, "selected": 20}},
        "chat_template": "own",
        "conversations": 50,
        **changes,
    }


def finding(about: str, **changes: Any) -> dict[str, Any]:
    (found,) = (each for each in verdict.of(summary(**changes)) if each["about"] == about)
    return found


def level(about: str, **changes: Any) -> str:
    return str(finding(about, **changes)["level"])


def test_where_nothing_is_wrong_all_is_well() -> None:
    found = verdict.of(summary())
    assert [each["about"] for each in found] == [
        "choice",
        "fidelity",
        "step",
        "rows",
        "duplicates",
        "overlap",
        "sources",
    ]
    assert {each["level"] for each in found} == {"ok"}
    assert not any(each["advice"] for each in found)


def test_the_worst_comes_first_and_says_what_to_do() -> None:
    found = verdict.of(summary(repeats={"duplicates": {**NOTHING, "pool": SOME, "count": 20}, "overlap": NOTHING}))
    assert (found[0]["about"], found[0]["level"], found[0]["figure"]) == ("duplicates", "bad", 20 / 50)
    assert found[0]["advice"]


@pytest.mark.parametrize(
    ("promise", "expected"), [(0.9, "ok"), (0.89, "look"), (0.75, "look"), (0.74, "bad"), (None, "look")]
)
def test_the_choice_is_as_good_as_is_promised(promise: float | None, expected: str) -> None:
    assert level("choice", refinement={"promise": promise, "stopped": "max_cost"}) == expected
    assert finding("choice", refinement={"promise": promise, "stopped": "max_cost"})["figure"] == promise


def test_a_choice_among_exact_influences_needs_no_promise_and_no_fidelity() -> None:
    for changes in ({"fidelity": None, "refinement": None}, {"refinement": {"promise": 1.0, "stopped": "pool"}}):
        found = verdict.of(summary(**changes))
        assert ("choice", "ok") in {(each["about"], each["level"]) for each in found}
        assert "fidelity" not in {each["about"] for each in found}


def test_a_choice_by_propagated_influence_alone_is_worth_a_look() -> None:
    assert level("choice", refinement=None) == "look"


def test_methods_without_landmarks_are_not_judged_by_what_they_do_not_compute() -> None:
    found = verdict.of(summary(landmark_count=0, refinement=None, fidelity=None, validation=None))
    assert {each["about"] for each in found} == {"rows", "duplicates", "overlap", "sources"}


@pytest.mark.parametrize(
    ("landmarks", "mean", "each", "expected"),
    [
        (101, 0.5, [0.5, 0.5], "ok"),
        (101, 0.49, [0.5, 0.5], "look"),
        (101, 0.19, [0.5, 0.5], "bad"),  # two standard deviations of a guess are 0.2
        (10_001, 0.19, [0.5, 0.5], "look"),
        (101, 0.6, [0.1, 0.1, 0.7], "look"),
        (101, None, [None, None], "look"),
    ],
)
def test_fidelity_is_measured_by_guessing(
    landmarks: int, mean: float | None, each: list[float | None], expected: str
) -> None:
    assert level("fidelity", landmark_count=landmarks, fidelity={"mean_spearman": mean, "spearman": each}) == expected


@pytest.mark.parametrize(
    ("selection", "random", "expected"),
    [
        (-2e-4, -1e-5, "ok"),
        (-2e-4, 1e-5, "ok"),
        (-2e-4, -2e-4, "look"),
        (1e-5, 2e-4, "look"),
        (-1e-4, -2e-4, "bad"),
    ],
)
def test_a_step_on_the_selection_is_to_do_more_than_one_on_random_samples(
    selection: float, random: float, expected: str
) -> None:
    measured = {"selection": {"measured": selection}, "random": {"measured": random}}
    assert level("step", validation={**measured, "held_out": None}) == expected
    ok = {"selection": {"measured": -1.0}, "random": {"measured": 0.0}}
    held_out = {**ok, "held_out": {"targets": 24, **measured}}
    assert level("step", validation=held_out) == expected, "targets that had no part in the choice decide"


@pytest.mark.parametrize(("count", "expected"), [(0, "ok"), (10, "ok"), (11, "look"), (100, "look"), (101, "bad")])
def test_rows_that_took_no_part_or_were_cut_count(count: int, expected: str) -> None:
    none = {"count": 0}
    assert level("rows", unusable={"pool": {"count": count}, "target": none}) == expected
    assert level("rows", nonfinite={"pool": {"count": count}, "target": none}) == expected
    assert level("rows", pool={"samples": 1000, "truncated_responses": count}) == expected


def test_the_target_is_judged_by_its_own_size() -> None:
    found = finding("rows", target={"samples": 48, "truncated_responses": 5})
    assert (found["level"], found["figure"]) == ("bad", 5 / 48)


def test_an_assumed_template_is_worth_a_look_where_there_are_conversations() -> None:
    assert level("rows", chat_template="default") == "look"
    assert level("rows", chat_template="default", conversations=0) == "ok"


def test_what_is_rendered_otherwise_is_said() -> None:
    plain, changed = finding("rows"), finding("rows", rendering={"pool": {"system_folded": 7}, "target": {}})
    assert changed["level"] == "ok"
    assert "7 of the pool's 1,000" in changed["meaning"] != plain["meaning"]


def test_results_of_an_earlier_version_count_nothing_unusable() -> None:
    assert level("rows", unusable=None, rendering=None) == "ok"


@pytest.mark.parametrize(("count", "expected"), [(0, "ok"), (1, "look"), (5, "look"), (6, "bad")])
@pytest.mark.parametrize(("kind", "option"), [("duplicates", "duplicates: one"), ("overlap", "overlap: exclude")])
def test_repeats_count_by_their_share_of_the_selection(kind: str, option: str, count: int, expected: str) -> None:
    repeats = {"duplicates": NOTHING, "overlap": NOTHING, kind: {**NOTHING, "pool": SOME, "count": count}}
    found = finding(kind, repeats=repeats)
    assert (found["level"], found["figure"]) == (expected, count / 50)
    assert (option in (found["advice"] or "")) == bool(count)
    assert "42 of the pool's 1,000" in found["meaning"]
    assert "30 exactly, 12 nearly" in found["meaning"]


@pytest.mark.parametrize("kind", ["duplicates", "overlap"])
def test_what_an_option_left_out_is_said_and_is_well(kind: str) -> None:
    repeats = {"duplicates": NOTHING, "overlap": NOTHING, kind: {**NOTHING, "pool": SOME, "excluded": 41}}
    found = finding(kind, repeats=repeats)
    assert (found["level"], found["advice"]) == ("ok", None)
    assert "left 41 of them out" in found["meaning"]


def test_results_that_were_prepared_by_an_earlier_version_say_nothing_of_repeats() -> None:
    assert {each["about"] for each in verdict.of(summary(repeats=None))}.isdisjoint({"duplicates", "overlap"})


@pytest.mark.parametrize(("of_pool", "selected", "expected"), [(500, 45, "look"), (501, 45, "ok"), (500, 44, "ok")])
def test_one_source_that_the_pool_has_little_of_is_worth_a_look(of_pool: int, selected: int, expected: str) -> None:
    sources = {"a": {"pool": of_pool, "selected": selected}, "b": {"pool": 1000 - of_pool, "selected": 50 - selected}}
    assert level("sources", sources=sources) == expected


def test_a_pool_of_one_source_says_nothing_of_sources() -> None:
    found = verdict.of(summary(sources={"(none)": {"pool": 1000, "selected": 50}}))
    assert "sources" not in {each["about"] for each in found}
