"""The table of states: what a job can come to."""

from itertools import chain

from service.jobs.state import (
    JOB_TRANSITIONS,
    TERMINAL,
    UNIT_TRANSITIONS,
    JobStatus,
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
