"""The stages of a job in time: what was planned for each, what it has taken, and what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from service.jobs.schemas import SelectionJobOut, StageReport
from service.ledger.state import TERMINAL
from service.plan.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A stage. Seconds are wall-clock ones: planned for one worker, spent from the first start to the last end, or until now.

    `place`: its bar from the start of the job, and that of its plan, as shares of the whole: (begin, length).
    """

    stage: Stage
    report: StageReport | None
    state: str
    planned: float | None
    spent: float | None
    place: tuple[float, float]
    planned_place: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Timeline:
    """`seconds_left`: until the job ends, if it goes as planned; None: it has ended, or nothing is known."""

    steps: Sequence[Step]
    seconds_left: float | None


def of_job(job: SelectionJobOut, plan: Mapping[str, Any] | None, now: datetime) -> Timeline:
    """`plan`: the data of the job's latest `job.planned`."""
    planned = {Stage(each["stage"]): each["seconds"] for each in (plan or {}).get("stages", [])}
    reports = {report.stage: report for report in job.stages}
    is_over = job.status in TERMINAL
    known = [stage for stage in Stage if stage in reports or (stage in planned and not is_over)]
    began = [report.started_at for report in job.stages if report.started_at is not None]
    start = min([*began, job.started_at or now])
    end = job.finished_at or now
    drawn: list[tuple[Stage, float, float, float]] = []
    reached = 0.0  # where the next stage begins that has not begun
    for stage in known:
        report = reports.get(stage)
        if report is not None and report.started_at is not None:
            begin = (report.started_at - start).total_seconds()
            length = ((report.finished_at or end) - report.started_at).total_seconds()
        else:
            begin, length = max(reached, (end - start).total_seconds() if not is_over else 0.0), 0.0
        plan_length = planned.get(stage) or 0.0
        drawn.append((stage, begin, max(length, 0.0), plan_length))
        is_going = report is not None and report.started_at is not None and report.finished_at is None
        reached = max(reached, begin + (max(length, plan_length) if is_going or not length else length))
    whole = max([0.001, *(begin + max(length, plan) for _, begin, length, plan in drawn)])
    steps = [
        Step(
            stage=stage,
            report=reports.get(stage),
            state=_state(reports.get(stage), is_over=is_over, status=job.status),
            planned=planned.get(stage),
            spent=None if reports.get(stage) is None or reports[stage].started_at is None else length,
            place=(begin / whole, length / whole),
            planned_place=(begin / whole, plan_length / whole),
        )
        for stage, begin, length, plan_length in drawn
    ]
    return Timeline(steps, None if is_over else _seconds_left(steps, plan is not None))


def _state(report: StageReport | None, *, is_over: bool, status: str) -> str:
    if report is None or (report.started_at is None and not is_over):
        return "to come"
    if report.units_done == report.units:
        return "done"
    return status if is_over else "running"


def _seconds_left(steps: Sequence[Step], is_planned: bool) -> float | None:
    """By the pace of what runs, and the plan of what is to come."""
    left = 0.0
    for step in steps:
        if step.state == "done":
            continue
        report = step.report
        if report is not None and step.spent and report.done:
            left += step.spent / report.done * (report.total - report.done)
        elif step.planned is not None:
            left += max(0.0, step.planned - (step.spent or 0.0))
        else:
            return None
    return left if is_planned else None
