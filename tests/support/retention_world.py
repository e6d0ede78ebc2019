"""What the tests of the collection stand on: a ledger, and a store whose files are of any age."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from service.ids import new_id
from service.plan.artifact_keys import content_key
from service.plan.stages import Stage, UnitSpec
from service.retention.service import Collected, collect
from service.settings import RetentionSettings
from service.storage.artifacts import ArtifactStore
from support.ledger_world import LedgerWorld

HOUR, DAY = 3_600, 86_400
MONTH = RetentionSettings(artifacts_days=30)
PATIENCE = 60.0


@dataclass(frozen=True)
class Kept:
    """A ledger, and a store whose files are of any age."""

    ledger: LedgerWorld
    store: ArtifactStore

    def put(self, key: str, *, days: float = 40, size: int = 10) -> str:
        with self.store.writing(key) as path:
            path.write_bytes(b"x" * size)
        self.age(key, days)
        return key

    def age(self, key: str, days: float) -> None:
        then = time.time() - days * DAY
        if "file" in self.store.fs.protocol:
            os.utime(f"{self.store.root}/{key}", (then, then))
        else:
            file = self.store.fs.store[f"{self.store.root}/{key}"]
            file.modified -= timedelta(days=days)

    def artifact(self, kind: str = "gradients", *, days: float = 40, size: int = 10) -> str:
        return self.put(content_key(kind, {"id": new_id("x")}, ".safetensors"), days=days, size=size)

    def collect(self, retention: RetentionSettings = MONTH, **options: Any) -> Collected:
        return collect(self.ledger.sessions, self.store, retention, **options)

    def keys(self) -> set[str]:
        return {file.key for file in self.store.files()}

    def job(self, stage: Stage = Stage.SELECT, *, key: str | None = None, spec: dict[str, Any] | None = None) -> str:
        key = key or content_key("selections", {"id": new_id("x")}, ".safetensors")
        return self.ledger.job(UnitSpec(stage=stage, shard=0, artifact_key=key, spec=spec or {}, total=1))

    def end(self, job_id: str) -> None:
        self.ledger.cancel(job_id)
        assert self.ledger.status(job_id) == "cancelled"


def empty(world: LedgerWorld, url: str) -> Kept:
    with world.engine.begin() as connection:
        # As a superuser may: provenance goes with its jobs, which its trigger refuses.
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text("TRUNCATE selection_jobs, workers, uploads CASCADE"))
        connection.execute(text("DELETE FROM datasets WHERE id <> :id"), {"id": world.owner["pool_id"]})
    return Kept(world, ArtifactStore(url))
