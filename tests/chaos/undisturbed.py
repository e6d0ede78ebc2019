"""The run that nothing disturbs: what it finds is what every other run must find, and where it passes is where it may die."""

from servers import Servers
from world import Json, World

Undisturbed = Json
"""{"selection": what the job found, "points": {crash point: how often it was passed}}; JSON, since it goes between processes."""


def run_undisturbed(servers: Servers) -> Undisturbed:
    """The job of all scenarios, from processes that have just started."""
    with World.made(servers) as world:
        world.add_worker()
        job_id = world.submit()
        job = world.ended(job_id)
        assert job["status"] == "succeeded", job["error"]
        world.audit()
        return {"selection": world.selection(job_id), "points": dict(world.faults.passed())}
