"""The table of states: what a job can come to."""

from itertools import chain

from service.jobs.state import (
    JOB_TRANSITIONS,
    TERMINAL,
    UNIT_TRANSITIONS,
    JobStatus,
    Stage,
    UnitState,
)


def reachable(transitions: frozenset, start: str) -> set:
    seen = {start}
    while more := {after for before, after in transitions if before in seen} - seen:
        seen |= more
    return seen


def test_every_state_can_be_reached_and_every_job_can_end() -> None:
    assert reachable(JOB_TRANSITIONS, JobStatus.QUEUED) == set(JobStatus)
    assert reachable(UNIT_TRANSITIONS, UnitState.PENDING) == set(UnitState)
    for status in JobStatus:
        assert reachable(JOB_TRANSITIONS, status) & TERMINAL


def test_terminal_states_are_those_that_nothing_leaves() -> None:
    assert set(JobStatus) - {before for before, _ in JOB_TRANSITIONS} == TERMINAL


def test_a_job_that_is_being_cancelled_can_only_be_cancelled() -> None:
    assert reachable(JOB_TRANSITIONS, JobStatus.CANCELLING) == {JobStatus.CANCELLING, JobStatus.CANCELLED}


def test_a_job_succeeds_or_fails_only_while_it_runs() -> None:
    before = {a for a, b in JOB_TRANSITIONS if b in (JobStatus.SUCCEEDED, JobStatus.FAILED)}
    assert before == {JobStatus.RUNNING}


def test_a_transition_changes_the_state() -> None:
    assert not [step for step in chain(JOB_TRANSITIONS, UNIT_TRANSITIONS) if step[0] == step[1]]


def test_no_stage_comes_before_what_it_reads() -> None:
    """Within a wave the ledger hands units out in the order of this table; the plan says the rest."""
    order = list(Stage)
    assert order[0] == Stage.PREPARE
    assert order[-3:] == [Stage.SELECT, Stage.VALIDATE, Stage.PUBLISH]
    for earlier, later in (
        (Stage.WARMUP, Stage.LANDMARK_GRADIENTS),
        (Stage.CANDIDATES, Stage.CHOOSE_EMBEDDING),
        (Stage.CHOOSE_EMBEDDING, Stage.EMBED),
        (Stage.CURVATURE, Stage.PROPAGATE),
        (Stage.PROPAGATE, Stage.REFINE),
        (Stage.REFINE, Stage.SELECT),
    ):
        assert order.index(earlier) < order.index(later)
