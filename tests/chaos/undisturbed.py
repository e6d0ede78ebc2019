"""The run that nothing disturbs: what it finds is what every other run must find, and where it passes is where it may die."""

import psycopg
from support.servers import Servers
from support.world import Json
from world import World

Undisturbed = Json
"""{"selection": what the job found, "points": {crash point: how often it was passed}}; JSON, since it goes between processes."""


def run_job(world: World) -> Json:
    """Submits the job of all scenarios, waits for its end and reads what it has found, if it has succeeded.

    That a key is used is written once a minute only: here it always is, so that the crash points of that are passed.
    """
    with psycopg.connect(world.database_url) as connection:
        connection.execute("UPDATE api_keys SET last_used_at = NULL")
    job = world.ended(world.submit())
    return world.selection(job["id"]) if job["status"] == "succeeded" else job


def _is_marked(world: World) -> bool:
    """To the last commit of it."""
    with psycopg.connect(world.database_url) as connection:
        return connection.execute("SELECT 1 FROM artifact_stores WHERE marked_at IS NOT NULL").fetchone() is not None


def run_undisturbed(servers: Servers) -> Undisturbed:
    """From processes that have just started."""
    with World.made(servers) as world:
        world.until("the store is marked", lambda: _is_marked(world))
        world.faults.forget()  # that is done once, by no scenario again
        world.add_worker()
        selection = run_job(world)
        assert "weights_root" in selection, selection["error"]
        world.audit()
        return {"selection": selection, "points": dict(world.faults.passed())}
