"""Two workers tokenise a pool: each a shard, whichever of them stops or dies."""

from scenario import struck, survived, worker_of
from support.world import Json
from undisturbed import Undisturbed
from world import World

COUNTED = "compute: before rename to tokens/*.counts.parquet"


def units_of_prepare(world: World, job_id: str) -> list[Json]:
    units = world.get(f"{job_id}/provenance")["record"]["units"]
    return [unit for unit in units if unit["stage"] == "prepare"]


def shards_done(world: World, job_id: str) -> list[Json]:
    return [unit for unit in world.events(job_id, "unit.succeeded") if unit["stage"] == "prepare" and unit["shard"]]


def test_two_workers_share_the_shards_and_the_next_job_has_none(pair: World, undisturbed: Undisturbed) -> None:
    """One stands still with its shard until the other has done the rest."""
    pair.faults.arm(COUNTED, action="hold")
    job_id = pair.submit()
    struck(pair)
    pair.until("the other shard is done", lambda: shards_done(pair, job_id))
    survived(pair, undisturbed, job_id)
    first, *shards, last = units_of_prepare(pair, job_id)
    assert [unit["artifact"] for unit in (first, last)] == [f"prepare/{job_id}", f"prepare_merged/{job_id}"]
    assert len(shards) == 2
    assert len({unit["worker"] for unit in shards}) == 2
    job = pair.get(job_id)
    again = pair.post_usual(job["pool"], job["target"])
    survived(pair, undisturbed, again)
    assert [unit["artifact"] for unit in units_of_prepare(pair, again)] == [f"prepare/{again}"]


def test_a_worker_killed_with_its_shard_costs_that_shard(pair: World, undisturbed: Undisturbed) -> None:
    pair.faults.arm(COUNTED, action="hold")
    job_id = pair.submit()
    worker_of(pair, struck(pair)).kill()
    pair.revive()
    survived(pair, undisturbed, job_id)
    attempts = sorted(unit["attempt"] for unit in units_of_prepare(pair, job_id))
    assert attempts == [1, 1, 1, 2]
