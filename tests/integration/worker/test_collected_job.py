"""Real jobs, on a store from which everything goes that may: what they select is the same."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import OperationalError
from support.worker_jobs import Datasets, SharedWorker, post
from support.world import Json, World

from service.retention.service import collect
from service.settings import RetentionSettings

PARAMETERS: Json = {"budget": 10, "landmarks": {"count": 12}, "embedding": {"kind": "hidden", "blocks": 2}}


def submit(world: World, datasets: Datasets) -> str:
    return post(world, datasets.small, datasets.target, **PARAMETERS)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def selected(world: World, datasets: Datasets, shared: SharedWorker) -> list[Json]:
    """What the first job selects, from whose artifacts nothing was taken."""
    shared.running()
    job_id = submit(world, datasets)
    world.succeeded(job_id)
    return world.selected(job_id)


def age(world: World, *kinds: str) -> set[str]:
    """The keys of all artifacts of the kinds, which nobody has used for long."""
    keys = {file.key for file in world.store.files() if file.key.partition("/")[0] in kinds}
    for key in keys:
        os.utime(f"{world.store.root}/{key}", (1_000_000, 1_000_000))
    return keys


def test_a_job_on_what_a_collection_has_left_selects_the_same(
    world: World, datasets: Datasets, selected: list[Json]
) -> None:
    """The propagated influence is still there; the shortlists that the rounds before it name are not, nor their gradients."""
    aged = age(world, "tokens", "gradients")
    assert aged
    found = collect(world.sessions, world.store, world.settings.retention)
    assert found.removed["tokens"].files + found.removed["gradients"].files == len(aged)
    job_id = submit(world, datasets)
    job = world.succeeded(job_id)
    assert world.selected(job_id) == selected
    reused = {stage["stage"]: stage["units_reused"] for stage in job["stages"]}
    assert reused["embed"] == 1
    assert reused["landmark_gradients"] == reused["refine"] == 0
    assert reused["propagate"] == 1, "the last one alone, which names no shortlist"


def test_a_sample_whose_explanation_was_collected_says_so(
    world: World, datasets: Datasets, selected: list[Json]
) -> None:
    job_id = submit(world, datasets)
    world.succeeded(job_id)
    rows = world.get(f"{job_id}/weights")["data"]
    exact, propagated = (next(r["index"] for r in rows if r["exact"] is kind) for kind in (True, False))
    before = [world.get(f"{job_id}/samples/{index}") for index in (exact, propagated)]
    assert [each["explanation"]["explained_by"] for each in before] == ["own_gradient", "landmarks"]
    aged = age(world, "influence")
    assert any(".landmarks." in key for key in aged)  # collected together with what it belongs to
    collect(world.sessions, world.store, world.settings.retention)
    assert not any(world.store.exists(key) for key in aged)
    for index, was in ((exact, before[0]), (propagated, before[1])):
        sample = world.get(f"{job_id}/samples/{index}")
        if sample["explanation"] is not None:  # the shortlist's is beside the selection
            assert (index, sample) == (exact, was)
            continue
        assert "removed to free space. Post the same job again" in sample["explanation_missing"]
        left = {name: value for name, value in was.items() if not name.startswith("explanation")}
        assert left == {name: value for name, value in sample.items() if not name.startswith("explanation")}


@contextmanager
def collecting(world: World) -> Iterator[list[int]]:
    """Pass after pass, in which everything that is not needed at the moment goes, however young. How much each has taken."""
    stopping, taken = threading.Event(), []
    failures: list[Exception] = []
    retention = RetentionSettings(artifacts_days=1e-9)

    def run() -> None:
        while not stopping.is_set():
            try:
                found = collect(world.sessions, world.store, retention, stopping=stopping)
                taken.append(sum(tally.files for tally in found.removed.values()))
            except OperationalError:
                continue  # the lock was not to be had in time on a busy machine: the next pass
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield taken
    finally:
        stopping.set()
        thread.join()
    assert not failures


def test_a_job_lacks_nothing_while_all_goes_that_it_does_not_need(
    world: World, datasets: Datasets, selected: list[Json]
) -> None:
    with collecting(world) as taken:
        job_id = submit(world, datasets)
        world.succeeded(job_id)
    assert world.selected(job_id) == selected
    assert world.events(job_id, "unit.attempt_failed") == []
    assert taken[0] > 0
    assert len(taken) > 10
