"""A process is killed at every crash point that a job passes: the job ends all the same, with the same bits, and nothing of the
killed process stays."""

import importlib.util
import subprocess
from collections.abc import Callable, Iterator

import psycopg
import pytest
from audit import MARKER, audit
from inject import sitecustomize
from support.servers import Servers
from undisturbed import Undisturbed, run_job
from world import World

# Those of the short form: each at another boundary between what was written and what was not yet.
TELLING = (
    "api: before rename to datasets/rows.parquet",
    "compute: before rename to tokens/*.counts.parquet",
    "compute: before rename to gradients/*.safetensors.json",
    "worker: before commit of …start_stages…",
    "worker: before commit of …succeed_job…",
)


@pytest.fixture(scope="module")
def lasting(servers: Servers) -> Iterator[World]:
    """The world of all scenarios; each begins with nothing stored."""
    with World.made(servers) as made:
        made.add_worker()
        yield made
        made.sweep()


@pytest.fixture
def world(lasting: World) -> World:
    lasting.revive()
    lasting.clear()
    return lasting


def _run(world: World, point: str) -> None:
    world.faults.arm(point)
    run_job(world)


def test_every_hook_has_found_what_it_hooks(undisturbed: Undisturbed) -> None:
    """A module that has moved is never imported under its old name, and nothing would be hooked; a function that has fails."""
    assert [name for name in sitecustomize.WRAPPERS if importlib.util.find_spec(name) is None] == []
    passed = {
        kind: any(kind in point for point in undisturbed["points"])
        for kind in (
            "commit of claim_unit",
            "commit of register",
            "rename to",
            "the rows of a result",
            "message to the",
        )
    }
    assert all(passed.values()), passed


def test_a_kill_at_a_crash_point_changes_nothing(
    world: World, undisturbed: Undisturbed, point: str, record_property: Callable[[str, object], None]
) -> None:
    try:
        _run(world, point)
        if not world.faults.has_struck:  # processes that have just started pass it only
            world.clear()
            world.restart(*world.workers)
            _run(world, point)
    finally:
        if world.faults.has_struck:
            record_property("fault", point)
    assert world.faults.has_struck, f"{point} was not passed"
    for job_id in world.job_ids():  # two, where a client had no answer to its POST
        job = world.ended(job_id)
        assert job["status"] == "succeeded", job["error"]
        assert world.selection(job_id) == undisturbed["selection"]
    world.audit(swept=False)


_TAMPER = (
    "DELETE FROM job_events WHERE id = (SELECT min(id) FROM job_events WHERE type = 'unit.claimed')",
    "INSERT INTO job_events (job_id, type, data) SELECT id, 'unit.released', '{}' FROM selection_jobs"
    " WHERE deleted_at IS NULL",
    "UPDATE job_units SET failures = 1 WHERE stage = 'embed'",
    "UPDATE weight_chunks SET weight[1] = weight[1] + 1",
    "DELETE FROM selected_samples WHERE rank = 0",
)


def test_the_audit_names_what_does_not_hold(world: World) -> None:
    assert world.ended(world.submit())["status"] == "succeeded"
    world.audit()
    with psycopg.connect(world.database_url, autocommit=True) as connection:
        for statement in _TAMPER:
            connection.execute(statement.encode())
    gradients = sorted((world.store / "gradients").rglob("*.safetensors"))
    gradients[0].write_bytes(gradients[0].read_bytes()[:100])
    gradients[1].unlink()
    left = world.store / "tmp" / "left"
    left.touch()
    with subprocess.Popen(["sleep", "60"], env={MARKER: world.marker}) as orphan:
        with pytest.raises(AssertionError) as found:
            audit(world.database_url, world.store, world.marker, alive=world.pids())
        orphan.kill()
    left.unlink()
    for message in (
        "unit prepare/0 was claimed 1 times, and its events tell of []",
        "has the event unit.released after job.succeeded",
        "unit embed/0 has 1 failures, and its events tell of 0",
        "chunk 0 of its weights does not have its sha256",
        "its weights do not have the Merkle root of its provenance",
        "has 9 selected samples, not 10",
        f"{gradients[0].relative_to(world.store)} cannot be read",
        f"{gradients[1].relative_to(world.store)} is not in the store",
        "the store holds the temporary file left",
        f"process {orphan.pid} has outlived its world",
    ):
        assert message in str(found.value)
