"""What the tests of results stand on: a database with a succeeded job, and the arrays that were published for it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from service.app import create_app
from service.artifacts import ArtifactStore
from service.database import Sessions
from service.datasets import storage
from service.datasets.formats import CanonicalRow
from service.datasets.tables import Dataset
from service.ids import new_id
from service.jobs.parameters import JobParameters
from service.jobs.state import JobStatus
from service.jobs.tables import SelectionJob
from service.results.service import distribution, publish
from service.settings import ApiSettings, DatabaseSettings
from service.tenants.caller import Scope
from service.tenants.service import authenticate, create_key

N, K = 40_000, 500
SECRET = "integration-tests-only-0123456789abcdef"


@dataclass(frozen=True)
class World:
    """One database with a succeeded job of 40,000 samples, and the arrays that were published for it."""

    client: TestClient
    engine: Engine
    sessions: Sessions
    store: ArtifactStore
    key: str
    other_key: str
    job_id: str
    ids: list[str]
    sources: list[str | None]
    influence: np.ndarray
    weight: np.ndarray
    exact: np.ndarray
    selected: np.ndarray

    def get(self, path: str, *, key: str | None = None, job_id: str | None = None, **params: Any) -> Any:
        return self.client.get(
            f"/v1/selection-jobs/{job_id or self.job_id}/{path}",
            params=params,
            headers={"Authorization": f"Bearer {key or self.key}"},
        )

    def row(self, i: int) -> dict[str, Any]:
        return {
            "index": i,
            "id": self.ids[i],
            "source": self.sources[i],
            "influence": self.influence[i],
            "weight": self.weight[i],
            "exact": bool(self.exact[i]),
        }

    def ranks(self) -> dict[int, int]:
        return {index: rank for rank, index in enumerate(self.selected.tolist())}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal, with the floats compared as the float32 that they are."""
    return found.keys() == expected.keys() and all(
        np.float32(found[name]) == value if isinstance(value, np.floating) else found[name] == value
        for name, value in expected.items()
    )


def write_pool(store: ArtifactStore, folder: Path, samples: list[tuple[str, str | None, dict[str, Any]]]) -> Any:
    folder.mkdir()
    with storage.ContentWriter(folder) as writer:
        for id, source, content in samples:
            writer.append(CanonicalRow(id, source, json.dumps(content, sort_keys=True, separators=(",", ":"))))
    content = writer.content()
    storage.publish(store, content)
    return content


def add_job(
    sessions: Sessions, key: str, content: Any, status: JobStatus, deleted: bool = False, model: str = "small"
) -> str:
    """A job on the content that walked to `status` along the transitions; nothing is published."""
    job_id = new_id("job")
    way = {
        JobStatus.QUEUED: [],
        JobStatus.RUNNING: ["running"],
        JobStatus.SUCCEEDED: ["running"],  # the publishing transaction goes the last step
        JobStatus.CANCELLING: ["running", "cancelling"],
        JobStatus.FAILED: ["running", "failed"],
        JobStatus.CANCELLED: ["cancelled"],
    }[status]
    now = datetime.now(UTC)
    with sessions.begin() as session:
        caller = authenticate(session, key, SECRET)
        dataset = Dataset(
            id=new_id("ds"),
            tenant_id=caller.tenant_id,
            name="pool",
            fingerprint=content.fingerprint,
            row_count=content.row_count,
            byte_count=content.byte_count,
            sources=content.sources,
            deleted_at=now if deleted else None,
        )
        session.add(dataset)
        session.flush()
        session.add(
            SelectionJob(
                id=job_id,
                tenant_id=caller.tenant_id,
                key_id=caller.key_id,
                status=JobStatus.QUEUED,
                pool_id=dataset.id,
                target_id=dataset.id,
                model={"kind": "registered", "name": model},
                budget=K,
                parameters=JobParameters().model_dump(mode="json"),
                request={},
                job_metadata={},
            )
        )
    for step in way:
        move(sessions, job_id, JobStatus(step))
    return job_id


def move(sessions: Sessions, job_id: str, status: JobStatus) -> None:
    values: dict[str, Any] = {"status": status}
    if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        values["finished_at"] = datetime.now(UTC)
    if status is JobStatus.FAILED:
        values["error"] = {"code": "out_of_memory", "detail": "The device has no memory left."}
    with sessions.begin() as session:
        session.execute(update(SelectionJob).where(SelectionJob.id == job_id).values(**values))


@contextmanager
def make_world(postgres_url: str, folder: Path, **more: Any) -> Iterator[World]:
    """`more`: further settings."""
    settings = ApiSettings(
        database=DatabaseSettings(url=postgres_url, pool_size=2),
        artifacts={"url": str(folder / "store")},
        models={"folder": folder},
        secret_key=SecretStr(SECRET),
        **{"broker": {"url": "redis://localhost:1"}, **more},
    )
    app = create_app(settings)
    engine, sessions, store = app.state.engine, app.state.sessions, app.state.store
    with sessions.begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="a", secret_key=SECRET, scopes=Scope)
        other_key = create_key(session, tenant_name=new_id("tenant"), key_name="b", secret_key=SECRET)

    rng = np.random.default_rng(7)
    ids = [f'sample, "{i}" é' for i in range(N)]
    sources = [None if i % 5 == 0 else f"source {i % 3}" for i in range(N)]
    samples = [
        (id, source, {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "é" * 9}]})
        for i, (id, source) in enumerate(zip(ids, sources, strict=True))
    ]
    content = write_pool(store, folder / "pool", samples)
    influence = rng.normal(size=N).astype(np.float32)
    weight = np.zeros(N, np.float32)
    selected = rng.permutation(N)[:K].astype(np.int64)
    weight[selected] = rng.random(K, dtype=np.float32)
    exact = rng.random(N) < 0.1
    job_id = add_job(sessions, key, content, JobStatus.SUCCEEDED)
    with sessions.begin() as session:
        publish(
            session,
            job_id=job_id,
            influence=influence,
            weight=weight,
            exact=exact,
            selected=selected,
            sample_ids=[ids[i] for i in selected],
            sources=[sources[i] for i in selected],
            summary={"influence": distribution(influence), "method": "influence_distillation"},
            provenance={"seed": 7},
        )
    move(sessions, job_id, JobStatus.SUCCEEDED)

    # Entered as a context it would start the dispatcher, which results have no need of.
    client = TestClient(app)
    yield World(
        client, engine, sessions, store, key, other_key, job_id, ids, sources, influence, weight, exact, selected
    )
    engine.dispose()


def publish_small(session: Session, job_id: str, n: int, provenance: dict[str, Any] | None = None) -> None:
    """Results of a small pool, of which sample 1 is the selection."""
    publish(
        session,
        job_id=job_id,
        influence=np.arange(n, dtype=np.float32),
        weight=np.ones(n, np.float32),
        exact=np.zeros(n, np.bool_),
        selected=np.array([1]),
        sample_ids=["1"],
        sources=[None],
        summary={},
        provenance=provenance or {},
    )


def published_job(world: World, content: Any, deleted: bool = False) -> str:
    job_id = add_job(world.sessions, world.key, content, JobStatus.SUCCEEDED, deleted)
    with world.sessions.begin() as session:
        publish_small(session, job_id, content.row_count)
    move(world.sessions, job_id, JobStatus.SUCCEEDED)
    return job_id
