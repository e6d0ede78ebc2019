"""The table of states: what a job can come to, and the order of its stages."""

from itertools import chain, pairwise

from service.jobs.state import (
    JOB_TRANSITIONS,
    STAGE_GROUPS,
    STAGE_ORDER,
    TERMINAL,
    UNIT_TRANSITIONS,
    JobStatus,
    Stage,
    UnitState,
    group_of,
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


def test_the_groups_hold_every_stage_once_in_order() -> None:
    assert list(chain.from_iterable(STAGE_GROUPS)) == list(Stage)
    assert all(STAGE_ORDER[a] < STAGE_ORDER[b] for a, b in pairwise(Stage))


def test_a_stage_is_found_in_its_group() -> None:
    assert [group_of(stage) for stage in Stage] == [0, 1, 1, 1, 2, 3, 4]
