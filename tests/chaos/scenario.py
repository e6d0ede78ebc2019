"""What the scenarios share: who runs what, processes that stand still for a while, and how a scenario ends."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from support.processes import Process
from support.world import Json
from undisturbed import Undisturbed
from world import World

Told = Callable[[str, object], None]

# The compute child is done with its unit's artifact and has not yet said so.
COMPUTED = "compute: before rename to gradients/*.safetensors.json"


def survived(world: World, undisturbed: Undisturbed, *job_ids: str, to_the_bit: bool = True) -> None:
    """The jobs succeed with what the undisturbed run has found, and everything holds that must.

    Args:
        to_the_bit: batches that were cut otherwise sum otherwise, in the last bits.
    """
    world.faults.release()
    for job_id in job_ids:
        job = world.ended(job_id)
        assert job["status"] == "succeeded", job["error"]
        found, expected = world.selection(job_id), undisturbed["selection"]
        if to_the_bit:
            assert found == expected
        else:
            assert _rounded(found) == _rounded(expected)
    world.audit()


def _rounded(selection: Json) -> Json:
    """Ids as they are, numbers to a tolerance, without what is a hash of numbers."""
    return {name: [_near(row) for row in selection[name]] for name in ("selected", "weights")}


def _near(row: Json) -> Json:
    return {k: pytest.approx(v, rel=1e-3, abs=1e-6) if isinstance(v, float) else v for k, v in row.items()}


def struck(world: World) -> int:
    """The process that the latest plan has struck, once it has."""
    return int(world.until("the fault strikes", lambda: world.faults.struck))


def held_job(world: World) -> str:
    """A new job, whose compute child stands still where it has just computed something."""
    world.faults.arm(COMPUTED, action="hold")
    job_id = world.submit()
    struck(world)
    return job_id


def worker_of(world: World, pid: int) -> Process:
    """The worker that is the process, or whose compute child it is."""
    return next(w for w in world.workers if pid in (w.pid, *w.children()))


@contextmanager
def frozen(*processes: Process) -> Iterator[None]:
    """SIGSTOP, and in the end SIGCONT."""
    for process in processes:
        process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.signal(signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


@contextmanager
def only_worker(world: World, **environment: str) -> Iterator[Process]:
    """In place of the world's workers one with other settings; those that are added to it go with it."""
    usual, world.workers = world.workers, []
    for worker in usual:
        worker.stop()
    started = world.add_worker(**environment)
    try:
        yield started
    finally:
        world.faults.release()
        for worker in world.workers:
            worker.stop()
        world.workers = usual
        world.revive()


def errors(world: World, job_id: str) -> list[tuple[str, str]]:
    """(stage, code) of each attempt that failed."""
    return [(data["stage"], data["error"]["code"]) for data in world.events(job_id, "unit.attempt_failed")]


def attempts(world: World, job_id: str, stage: str) -> list[Any]:
    """(what, attempt) of everything that happened to the stage's first unit."""
    found = world.get(f"{job_id}/events", limit=1000)["data"]
    own = [event for event in found if event["data"].get("stage") == stage and event["data"].get("shard") == 0]
    return [(event["type"], event["data"]["attempt"]) for event in own if event["type"].startswith("unit.")]
