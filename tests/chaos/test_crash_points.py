"""A process is killed at every crash point that a job passes: the job ends all the same, with the same bits, and nothing of the
killed process stays."""

from collections.abc import Callable, Iterator

import pytest
from servers import Servers
from undisturbed import Undisturbed
from world import World

# Those of the short form: each at another boundary between what was written and what was not yet.
TELLING = (
    "api: after commit of create_job+add_event",
    "api: before rename to datasets/rows.parquet",
    "compute: before rename to gradients/*.safetensors.json",
    "worker: after commit of claim_unit",
    "worker: before commit of finish_unit+start_stages",
    "worker: before commit of publish+finish_unit+succeed_job",
)


@pytest.fixture(scope="module")
def lasting(servers: Servers) -> Iterator[World]:
    """The world of all scenarios; each begins with nothing stored."""
    with World.made(servers) as made:
        made.add_worker()
        yield made


@pytest.fixture
def world(lasting: World) -> World:
    lasting.revive()
    lasting.clear()
    return lasting


def _run(world: World, point: str) -> None:
    world.faults.arm(point)
    world.ended(world.submit())


def test_a_kill_at_a_crash_point_changes_nothing(
    world: World, undisturbed: Undisturbed, point: str, record_property: Callable[[str, object], None]
) -> None:
    _run(world, point)
    if not world.faults.has_struck:  # processes that have just started pass it only
        world.clear()
        world.restart(*world.workers)
        _run(world, point)
    assert world.faults.has_struck, f"{point} was not passed"
    record_property("fault", point)
    for job_id in world.job_ids():  # two, where a client had no answer to its POST
        job = world.ended(job_id)
        assert job["status"] == "succeeded", job["error"]
        assert world.selection(job_id) == undisturbed["selection"]
    world.audit()
