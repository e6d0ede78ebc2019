"""Real jobs on a store of which something was damaged: it is noticed, made again, and reported; what jobs select is the same."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from support.damage import cut, flip_second_half
from support.servers import free_port
from support.tiny import pool_rows, target_rows
from support.worker_jobs import Datasets, post
from support.world import Json, World, stage

PARAMETERS: Json = {"budget": 10, "landmarks": {"count": 12}, "embedding": {"kind": "hidden", "blocks": 2}}
LAST = ("influence", "selections")  # of what a job makes: what reads all the rest


class Reported:
    """A worker, and what it counts of damaged artifacts."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def count(self) -> float:
        found = re.search(r"^winnow_worker_artifacts_damaged_total (\S+)$", httpx.get(self._url).text, re.MULTILINE)
        assert found is not None
        return float(found[1])


@pytest.fixture(scope="module")
def worker(world: World) -> Iterator[Reported]:
    port = free_port()
    with world.worker("metered", WINNOW_WORKER__METRICS_PORT=str(port)):
        yield Reported(port)


def found_by(world: World, job_id: str) -> Json:
    return {
        "selected": world.selected(job_id),
        "root": world.get(f"{job_id}/provenance")["weights_root"],
    }


@pytest.fixture(scope="module")
def undisturbed(world: World, datasets: Datasets, worker: Reported) -> Json:
    job_id = post(world, datasets.small, datasets.target, **PARAMETERS)
    world.succeeded(job_id)
    assert worker.count() == 0
    return found_by(world, job_id)


def files(world: World, kind: str, suffix: str) -> list[Path]:
    """Those of the kind that a next job will read, the newest last."""
    found = [path for path in (world.folder / "store" / kind).rglob(f"*{suffix}") if path.is_file()]
    if (
        kind == "tokens"
    ):  # the next job opens what stands for a dataset, and its rows only where it has to compute with them
        found = [path for path in found if "input_ids" not in pq.read_schema(path).names]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def let_it_compute(world: World) -> None:
    """Removes the last artifacts, so that the same job reads all others once more."""
    for kind in LAST:
        for path in files(world, kind, ""):
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "suffix", "damage"),
    [
        pytest.param("embeddings", ".safetensors", flip_second_half, id="a flipped embedding"),
        pytest.param("embeddings", ".safetensors", cut, id="half an embedding"),
        pytest.param("embeddings", ".safetensors.json", cut, id="half a result"),
        pytest.param("embeddings", ".safetensors.sum", flip_second_half, id="flipped checksums"),
        pytest.param("gradients", ".safetensors", flip_second_half, id="flipped gradients"),
        pytest.param("tokens", ".parquet", flip_second_half, id="flipped tokens"),
        pytest.param("orders", ".npy", cut, id="half an order"),
    ],
)
def test_what_is_damaged_is_made_again_and_changes_no_job(
    world: World,
    datasets: Datasets,
    worker: Reported,
    undisturbed: Json,
    kind: str,
    suffix: str,
    damage: Callable[[Path], None],
) -> None:
    let_it_compute(world)
    before, aside = worker.count(), len(world.store.set_aside())
    path = files(world, kind, suffix)[0]
    damage(path)
    key = str(path.relative_to(world.folder / "store")).removesuffix(".sum")
    job_id = post(world, datasets.small, datasets.target, **PARAMETERS)
    job = world.succeeded(job_id)
    assert found_by(world, job_id) == undisturbed
    assert [event["artifact"] for event in world.events(job_id, "artifact.damaged")] == [key]
    assert world.events(job_id, "unit.attempt_failed") == []
    assert worker.count() == before + 1
    assert len(world.store.set_aside()) == aside + 1
    assert world.store.is_whole(key)
    if kind == "embeddings":
        assert stage(job, "landmark_gradients")["units_reused"] == 1  # only what was damaged is made again


def test_an_artifact_that_is_gone_while_its_result_is_there_is_made_again(
    world: World, datasets: Datasets, worker: Reported, undisturbed: Json
) -> None:
    let_it_compute(world)
    gone = files(world, "gradients", ".safetensors")[0]
    gone.unlink()
    job_id = post(world, datasets.small, datasets.target, **PARAMETERS)
    world.succeeded(job_id)
    assert found_by(world, job_id) == undisturbed
    assert gone.is_file()


def test_an_explanation_of_damaged_artifacts_is_refused_and_comes_back_with_the_same_job(
    world: World, datasets: Datasets, worker: Reported, undisturbed: Json
) -> None:
    job_id = post(world, datasets.small, datasets.target, **PARAMETERS)
    world.succeeded(job_id)
    index = next(row["index"] for row in world.get(f"{job_id}/weights")["data"] if not row["exact"])
    before = world.get(f"{job_id}/samples/{index}")
    assert before["explanation"] is not None
    flip_second_half(files(world, "influence", ".landmarks.safetensors")[-1])
    sample = world.get(f"{job_id}/samples/{index}")
    assert sample["explanation"] is None
    assert "damaged" in sample["explanation_missing"]
    again = post(world, datasets.small, datasets.target, **PARAMETERS)
    world.succeeded(again)
    assert found_by(world, again) == undisturbed
    assert world.get(f"{job_id}/samples/{index}") == before


def test_a_damaged_dataset_fails_its_jobs_with_what_to_do_and_an_upload_repairs_it(
    world: World, worker: Reported
) -> None:
    pool, target = world.upload(pool_rows(61)), world.upload(target_rows(4, "python_function"))
    fingerprint = world.call("GET", f"/v1/datasets/{pool}").json()["fingerprint"]
    cut(world.folder / "store" / "datasets" / fingerprint[:2] / fingerprint / "rows.parquet")
    job = world.ended(post(world, pool, target, **PARAMETERS))
    assert (job["status"], job["error"]["code"]) == ("failed", "artifact_damaged")
    assert "pload" in job["error"]["detail"]
    assert str(world.folder) not in str(job["error"])
    world.upload(pool_rows(61))
    world.succeeded(post(world, pool, target, **PARAMETERS))
