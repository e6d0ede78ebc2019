"""The artifact store: no room is left, or a writer dies with half of its file written."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scenario import COMPUTED, Told, errors, only_in_full, struck, survived
from tiny import pool_rows
from undisturbed import Undisturbed
from world import World

_ROOM = "16m"


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        pytest.param("gradients", ".safetensors", id="an artifact"),
        pytest.param("gradients", ".json", id="a result", marks=only_in_full),
        pytest.param("datasets", "/rows.parquet", id="a dataset", marks=only_in_full),
    ],
)
def test_half_a_file_is_made_whole(
    pair: World, undisturbed: Undisturbed, record_property: Told, kind: str, suffix: str
) -> None:
    pair.faults.tear(kind, suffix)
    job_id = pair.submit()
    struck(pair)
    record_property("fault", f"{kind}*{suffix} half written")
    survived(pair, undisturbed, job_id)


@contextmanager
def _small(world: World) -> Iterator[None]:
    """The store on a disk of its own, which can be filled."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    world.store.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM},mode=700", "tmpfs", str(world.store)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(world.store)], check=True)


def _fill(world: World) -> None:
    """To the last byte."""
    ballast = os.open(world.store / "ballast", os.O_CREAT | os.O_WRONLY)
    try:
        for size in (2**16, 1):
            while _wrote(ballast, size):
                pass
    finally:
        os.close(ballast)


def _wrote(file: int, size: int) -> bool:
    try:
        return os.write(file, bytes(size)) > 0
    except OSError:
        return False


def _free(world: World) -> None:
    (world.store / "ballast").unlink()


@only_in_full
@pytest.mark.parametrize(
    "before",
    [
        pytest.param("compute: before rename to gradients/*.safetensors", id="a result"),
        pytest.param(COMPUTED, id="an artifact"),
    ],
)
def test_a_full_disk_ends_an_attempt_and_no_job(
    pair: World, undisturbed: Undisturbed, record_property: Told, before: str
) -> None:
    """`before` is what a child passes right before it writes."""
    record_property("fault", "disk full")
    with _small(pair):
        pair.faults.arm(before, action="hold")
        job_id = pair.submit()
        struck(pair)
        _fill(pair)
        pair.faults.arm("worker: before commit of fail_unit", action="hold")
        pair.faults.release(but_latest=True)
        struck(pair)
        _free(pair)
        survived(pair, undisturbed, job_id)
        told = [data["error"] for data in pair.events(job_id, "unit.attempt_failed")]
        assert {error["code"] for error in told} == {"storage_full"}
        assert all(
            "No space left on device" in error["detail"] and "Free some room" in error["detail"] for error in told
        )


@only_in_full
def test_an_upload_to_a_full_disk_is_refused_and_leaves_nothing(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    with _small(pair):
        _fill(pair)
        record_property("fault", "disk full at an upload")
        answer = pair.client.post("/v1/datasets", params={"name": "rows"}, json=pool_rows(1)[0])
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_full")
        assert int(answer.headers["Retry-After"]) > 0
        assert pair.call("GET", "/v1/datasets").json()["data"] == []
        assert [path.name for path in pair.store.rglob("*") if path.is_file()] == ["ballast"]
        _free(pair)
        job_id = pair.submit()
        survived(pair, undisturbed, job_id)
        assert errors(pair, job_id) == []
