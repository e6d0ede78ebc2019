"""What is collected and what never is, on a real PostgreSQL and a real store: a file that must go beside one that must stay."""

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from support.damage import cut
from support.ledger_world import LedgerWorld
from support.retention_world import DAY, HOUR, MONTH, Kept

from service.datasets import repository as datasets
from service.datasets.storage import ids_key, rows_key, skipped_key
from service.datasets.tables import Dataset
from service.db.locks import advisory_lock
from service.ids import new_id
from service.ledger.workers import record_worker
from service.plan.artifact_keys import content_key
from service.plan.stages import Stage, UnitSpec
from service.retention import repository
from service.retention import service as collection
from service.settings import RetentionSettings


def files_of(artifact: str) -> set[str]:
    """All that stands beside an artifact."""
    stem = artifact.partition(".")[0]
    return {artifact, f"{artifact}.json", f"{stem}.optimizer.safetensors"}


def test_what_none_used_for_so_long_goes_with_all_that_stands_beside_it(kept: Kept) -> None:
    old, young = kept.artifact(days=31), kept.artifact(days=29)
    for key in (files_of(old) | files_of(young)) - {old, young}:
        kept.put(key, days=31)
    used = kept.artifact("embeddings", days=31)
    kept.put(f"{used}.json", days=1)
    done = kept.put(f"prepare/{new_id('job')}.json", days=31)
    found = kept.collect()
    assert kept.keys() == files_of(young) | {used, f"{used}.json"}
    assert {kind: (tally.files, tally.bytes) for kind, tally in found.removed.items()} == {
        "gradients": (3, 30),
        "prepare": (1, 10),
    }
    assert not kept.store.exists(done)


def test_nothing_is_too_old_where_it_is_kept_for_ever(kept: Kept) -> None:
    key = kept.artifact(days=4000)
    assert not kept.collect(RetentionSettings(artifacts_days=0)).removed
    assert kept.keys() == {key}


def test_beyond_the_bound_the_oldest_go_and_never_the_young(kept: Kept) -> None:
    third, first, second = (kept.artifact(days=days, size=100) for days in (1, 3, 2))
    young = kept.artifact(days=0.5 * HOUR / DAY, size=1000)
    kept.collect(RetentionSettings(artifacts_bytes=1150))
    assert kept.keys() == {third, young}
    assert not kept.store.exists(first)
    assert not kept.store.exists(second)
    kept.collect(RetentionSettings(artifacts_bytes=1))
    assert kept.keys() == {young}


def test_the_bound_counts_what_is_in_use_and_takes_what_is_not(kept: Kept) -> None:
    oldest, other = kept.artifact(days=3, size=100), kept.artifact(days=2, size=100)
    kept.job(key=oldest)
    kept.collect(RetentionSettings(artifacts_bytes=150))
    assert kept.keys() == {oldest}
    assert not kept.store.exists(other)


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_what_a_job_that_is_not_finished_refers_to_stays(kept: Kept, status: str) -> None:
    own, spec, result = kept.artifact(), kept.artifact("embeddings"), kept.artifact("tokens")
    other = kept.artifact()
    prepared = f"prepare/{new_id('job')}"
    beside = {kept.put(key) for key in (*files_of(own), *files_of(spec), *files_of(result), f"{prepared}.json")}
    job_id = kept.ledger.job(
        UnitSpec(stage=Stage.EMBED, shard=0, artifact_key=prepared, spec={}, total=1),
        UnitSpec(stage=Stage.SELECT, shard=0, artifact_key=own, spec={"of": [{"gradients": [spec]}]}, total=1),
        UnitSpec(stage=Stage.VALIDATE, shard=0, artifact_key="validations", spec={}, total=1),
    )
    if status != "queued":
        kept.ledger.finish(kept.ledger.claim(), {"found": {"tokens": result}, "operations": 1.5})
        kept.ledger.claim()
    else:
        beside -= files_of(result)
    if status == "cancelling":
        kept.ledger.cancel(job_id)
    assert kept.ledger.status(job_id) == status
    for retention in (MONTH, RetentionSettings(artifacts_bytes=1)):
        kept.collect(retention)
        assert kept.keys() == beside
    assert not kept.store.exists(other)


def test_what_a_finished_job_refers_to_goes(kept: Kept) -> None:
    key = kept.artifact()
    job_id = kept.job(key=key)
    kept.collect()
    assert kept.keys() == {key}
    kept.end(job_id)
    kept.collect()
    assert kept.keys() == set()


OF_PREPARE = {"tokens", "orders", "signatures", "duplicates", "overlaps", "exclusions"}
INTERMEDIATE = {*OF_PREPARE, "embeddings"}


@pytest.mark.parametrize(
    ("stage", "staying"),
    [
        (Stage.PREPARE, OF_PREPARE),
        (Stage.PROPAGATE, {"tokens"}),
        (Stage.SELECT, set()),
    ],
)
def test_what_a_stage_may_just_have_found_stays_until_its_result_says_what_it_was(
    local: Kept, stage: Stage, staying: set[str]
) -> None:
    """Found by `store.exists`, used, and named by no row until the unit ends."""
    keys = {kind: local.artifact(kind) for kind in INTERMEDIATE}
    job_id = local.job(stage)
    for _ in range(2):  # pending, running
        local.collect()
        assert local.keys() == {keys[kind] for kind in staying}
        claim = local.ledger.try_claim()
    assert claim is None
    (unit,) = local.ledger.units(job_id)
    with local.ledger.sessions.begin() as session:
        running = session.merge(unit)
        running.state, running.lease_expires_at = "succeeded", None  # type: ignore[assignment]
        running.result = {"tokens": keys["tokens"]}
    local.collect()
    assert local.keys() == {keys[kind] for kind in staying & {"tokens"}}


def test_every_search_of_the_store_by_a_stage_is_known_to_the_collection() -> None:
    """A stage that goes by what it finds must stand in `FINDS`: prepare by itself, and who calls `rows_artifact`."""
    worker = Path(__file__).parents[4] / "worker"
    stages = {path.relative_to(worker).as_posix(): path.read_text() for path in worker.rglob("*.py")}
    searches = re.compile(r"store\.(exists|is_whole)\(")
    assert {name for name, code in stages.items() if searches.search(code)} == {
        "stages/prepare.py",
        "stages/tokenise.py",  # of prepare
        "stages/duplicates.py",  # of prepare
        "text/token_files.py",  # rows_artifact
        "artifact_cache.py",  # of the unit itself, which is in use
        "units.py",  # an estimate
    }
    assert {name for name, code in stages.items() if "rows_artifact(" in code} == {
        "stages/prepare.py",
        "stages/propagate.py",
        "stages/rounds.py",  # of propagate
        "text/token_files.py",
    }
    assert set(repository.FINDS) == {Stage.PREPARE, Stage.PROPAGATE}


def test_the_result_goes_before_the_artifact(local: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short between them, a result without its artifact would be taken for done."""
    key = local.artifact()
    local.put(f"{key}.json")
    deleted: list[str] = []
    monkeypatch.setattr(local.store, "delete", deleted.append)
    local.collect()
    assert deleted == [f"{key}.json", key]


def test_a_file_that_cannot_be_removed_does_not_stop_the_others(local: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, other = local.artifact(days=50), local.artifact(days=40)
    delete = local.store.delete

    def refusing(key: str) -> None:
        if key == stuck:
            raise PermissionError(key)
        delete(key)

    monkeypatch.setattr(local.store, "delete", refusing)
    found = local.collect()
    assert local.keys() == {stuck}
    assert found.removed["gradients"].files == 1
    assert not local.store.exists(other)


def content(kept: Kept, *, live: bool, days: float = 2) -> Dataset:
    """A dataset, or what is left of one."""
    fingerprint, dataset_id = new_id("x").removeprefix("x_") * 2, new_id("ds")
    for key in (rows_key(fingerprint), ids_key(fingerprint), skipped_key(fingerprint, dataset_id)):
        kept.put(key, days=days)
    dataset = Dataset(
        id=dataset_id,
        tenant_id=kept.ledger.owner["tenant_id"],
        name="",
        fingerprint=fingerprint,
        row_count=1,
        byte_count=1,
        sources={},
    )
    with kept.ledger.sessions.begin() as session:
        datasets.add(session, dataset)
        if not live:
            session.execute(text("UPDATE datasets SET deleted_at = now() WHERE id = :id"), {"id": dataset.id})
    return dataset


def content_files(kept: Kept, dataset: Dataset) -> set[str]:
    keys = [key for key in list(kept.keys()) if dataset.fingerprint in key]
    return {key.rpartition("/")[2].replace(f"{dataset.id}.", "") for key in keys}


def test_content_goes_when_no_dataset_has_it_and_ids_when_no_job_names_them(kept: Kept) -> None:
    live, orphan, young = (
        content(kept, live=True, days=400),
        content(kept, live=False),
        content(kept, live=False, days=0.5),
    )
    named, unnamed = content(kept, live=True), content(kept, live=True)
    for dataset in (named, unnamed):
        owner = {**kept.ledger.owner, "pool_id": dataset.id}
        LedgerWorld(kept.ledger.url, kept.ledger.engine, kept.ledger.sessions, owner).job()
    with kept.ledger.engine.begin() as connection:
        connection.execute(text("UPDATE selection_jobs SET status = 'cancelled', finished_at = now()"))
        connection.execute(
            text("UPDATE datasets SET deleted_at = now() WHERE id IN (:a, :b)"), {"a": named.id, "b": unnamed.id}
        )
        connection.execute(text("UPDATE selection_jobs SET deleted_at = now() WHERE pool_id = :id"), {"id": unnamed.id})
    found = kept.collect(RetentionSettings(artifacts_bytes=1))
    everything = {"rows.parquet", "ids.parquet", "skipped.jsonl.gz"}
    assert content_files(kept, live) == everything
    assert content_files(kept, young) == everything
    assert content_files(kept, named) == {"ids.parquet"}
    assert content_files(kept, unnamed) == content_files(kept, orphan) == set()
    assert found.removed["datasets"].files == 8


def test_the_report_of_a_deleted_dataset_goes_although_another_one_has_the_same_rows(kept: Kept) -> None:
    live, deleted = content(kept, live=True), new_id("ds")
    crashed = kept.put(skipped_key(live.fingerprint, deleted), days=2)
    assert kept.collect().removed["datasets"].files == 1
    assert not kept.store.exists(crashed)
    assert kept.store.exists(skipped_key(live.fingerprint, live.id))


def test_content_that_is_being_published_stays(local: Kept) -> None:
    """Its files are there, and may be old; its row is not yet."""
    orphan = content(local, live=False)
    with local.ledger.sessions() as session:
        advisory_lock(session, datasets.content_lock(orphan.fingerprint))
        local.collect()
        assert len(content_files(local, orphan)) == 3
    local.collect()
    assert content_files(local, orphan) == set()


def test_what_was_set_aside_is_removed_in_time(local: Kept) -> None:
    """For it is nobody's, but for a month somebody may want to know what happened to it."""
    key = local.artifact()
    cut(Path(local.store.root, key))
    assert not local.store.is_whole(key)
    (aside,) = local.store.set_aside()
    assert not local.collect(RetentionSettings(artifacts_days=1, artifacts_bytes=1)).removed
    local.age(aside.key, 31)
    assert local.collect(dry_run=True).removed["damaged"].files == 1
    assert local.collect().removed["damaged"].files == 1
    assert local.keys() == set()


def test_checksums_that_a_crash_has_left_alone_are_removed(local: Kept) -> None:
    orphan = content(local, live=False)
    key = local.artifact()
    for each in (key, rows_key(orphan.fingerprint)):
        Path(local.store.root, each).unlink()
        local.age(f"{each}.sum", 40)
    assert local.collect().removed["gradients"].files == 1
    assert local.keys() == set()


def test_what_is_not_ours_is_left_alone_and_counted(local: Kept) -> None:
    digest = "ab" * 32
    foreign = {
        "notes.txt",
        "lost+found/x",
        f"gradients/ff/{digest}.safetensors/x",
        f"gradients/ab/{digest[:-1]}.npy",
        f"datasets/ff/{digest}/rows.parquet",
        f"datasets/ab/{digest}/other.parquet",
        "prepare/other.json",
    }
    for key in foreign:
        local.put(key, days=4000)
    with local.store.writing(content_key("gradients", {}, "")) as path:
        path.write_bytes(b"half")
        found = local.collect(RetentionSettings(artifacts_bytes=1))
        assert path.exists()
    assert foreign <= local.keys()
    assert (found.unknown.files, found.unknown.bytes) == (len(foreign), 10 * len(foreign))
    assert not found.removed


def test_jobs_are_deleted_when_their_time_is_over(local: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "_JOBS", 2)
    old = [local.job() for _ in range(5)]
    recent, running = local.job(), local.job()
    for job_id in (*old, recent):
        local.end(job_id)
    with local.ledger.engine.begin() as connection:
        connection.execute(text("UPDATE selection_jobs SET created_at = now() - interval '99 days'"))
        past = "UPDATE selection_jobs SET finished_at = now() - interval '11 days' WHERE id = ANY(:ids)"
        connection.execute(text("ALTER TABLE selection_jobs DISABLE TRIGGER USER"))
        connection.execute(text(past), {"ids": old})
        connection.execute(text("ALTER TABLE selection_jobs ENABLE TRIGGER USER"))
    assert local.collect(RetentionSettings(results_days=0)).jobs == []
    retention = RetentionSettings(results_days=10)
    assert local.collect(retention, dry_run=True).jobs == old
    assert [local.ledger.row(job_id).deleted_at for job_id in old] == [None] * 5
    assert local.collect(retention).jobs == old
    assert all(local.ledger.row(job_id).deleted_at for job_id in old)
    assert not any(local.ledger.units(job_id) for job_id in old)
    for job_id in (recent, running):
        assert local.ledger.row(job_id).deleted_at is None
        assert local.ledger.units(job_id)
    assert local.collect(retention).jobs == []


def test_workers_that_were_not_seen_for_a_day_are_forgotten(local: Kept) -> None:
    with local.ledger.sessions.begin() as session:
        for worker in ("gone:1", "here:2"):
            record_worker(session, worker, "v", stopped=False)
        past = "UPDATE workers SET seen_at = now() - interval '25 hours' WHERE worker_id = 'gone:1'"
        session.execute(text(past))
    assert local.collect(dry_run=True).workers == ["gone:1"]
    assert local.collect().workers == ["gone:1"]
    assert local.collect().workers == []
    with local.ledger.engine.connect() as connection:
        assert connection.scalars(text("SELECT worker_id FROM workers")).all() == ["here:2"]


def test_scratch_is_swept(local: Kept) -> None:
    with local.store.writing("x") as path:
        left = path.parent.with_name(f"winnow.{socket.gethostname()}.a1b2c3d4")
        left.mkdir()
        path.write_bytes(b"")
        assert local.collect(dry_run=True).scratch == 1
        assert local.collect().scratch == 1
        assert path.exists()
    assert not left.exists()


def test_a_dry_run_says_what_the_next_pass_removes_and_removes_nothing(kept: Kept) -> None:
    gone = {kept.artifact(), kept.artifact("tokens")}
    content(kept, live=False)
    kept.job(key=kept.artifact())
    before = kept.keys()
    said = kept.collect(dry_run=True)
    assert kept.keys() == before
    assert kept.collect() == said
    assert said.removed["datasets"].files == 3
    assert len(before) - len(kept.keys()) == 5
    assert not gone & kept.keys()


def test_it_ends_in_the_midst_of_a_listing(local: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    key = local.artifact()
    stopping = threading.Event()
    (file,) = local.store.files()

    def endless() -> Iterator[Any]:
        yield file
        stopping.set()
        while True:
            yield file

    monkeypatch.setattr(local.store, "files", endless)
    assert not local.collect(stopping=stopping).removed
    assert local.store.exists(key)
