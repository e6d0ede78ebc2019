"""Jobs and results that are written by hand, as a worker would have: nothing is computed."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import update
from sqlalchemy.orm import Session

from service.auth.authentication import authenticate
from service.datasets import storage
from service.datasets.rows.canonical import CanonicalRow
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.ids import new_id
from service.ledger.state import TERMINAL, JobStatus
from service.ledger.tables import SelectionJob
from service.plan.parameters import JobParameters
from service.results.service import publish
from service.storage.artifacts import ArtifactStore
from support.charts import small_charts
from support.world import DATASETS, JOBS, SECRET, Json, World

# What a job walks through before it is in the status; the publishing transaction goes the last step of a success.
_WAY = {
    JobStatus.QUEUED: (),
    JobStatus.RUNNING: (JobStatus.RUNNING,),
    JobStatus.SUCCEEDED: (JobStatus.RUNNING,),
    JobStatus.CANCELLING: (JobStatus.RUNNING, JobStatus.CANCELLING),
    JobStatus.FAILED: (JobStatus.RUNNING, JobStatus.FAILED),
    JobStatus.CANCELLED: (JobStatus.CANCELLED,),
}


def plain_rows(count: int, tag: str = "a") -> list[Json]:
    """Of other content for each tag."""
    return [{"prompt": f"{tag} {i}", "completion": "b"} for i in range(count)]


def write_pool(store: ArtifactStore, folder: Path, samples: list[tuple[str, str | None, Json]]) -> Any:
    """Content of (id, source, row) that a dataset may have; `folder` is a new one."""
    folder.mkdir()
    with storage.ContentWriter(folder) as writer:
        for id, source, content in samples:
            writer.append(
                CanonicalRow(id, source, json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")))
            )
    content = writer.content()
    storage.publish(store, content)
    return content


def add_job(
    sessions: Sessions,
    key: str,
    content: Any,
    status: JobStatus,
    deleted: bool = False,
    model: str = "small",
    budget: int = 500,
) -> str:
    """A job of the key's tenant on the content, that walked to `status` along the transitions; nothing is published."""
    job_id = new_id("job")
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
            deleted_at=datetime.now(UTC) if deleted else None,
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
                budget=budget,
                parameters=JobParameters().model_dump(mode="json"),
                request={},
                job_metadata={},
            )
        )
    for step in _WAY[status]:
        move(sessions, job_id, step)
    return job_id


def move(sessions: Sessions, job_id: str, *statuses: JobStatus) -> None:
    """Through the statuses, each in a transaction."""
    for status in statuses:
        values: Json = {"status": status}
        if status in TERMINAL:
            values["finished_at"] = datetime.now(UTC)
        if status is JobStatus.FAILED:
            values["error"] = {"code": "out_of_memory", "detail": "The device has no memory left."}
        with sessions.begin() as session:
            session.execute(update(SelectionJob).where(SelectionJob.id == job_id).values(**values))


def publish_small(session: Session, job_id: str, n: int, provenance: Json | None = None, **changes: Any) -> None:
    """Results of a small pool, of which sample 1 is the selection; or `changes` of what is published."""
    usual: Json = {
        "influence": np.arange(n, dtype=np.float32),
        "weight": np.ones(n, np.float32),
        "exact": np.zeros(n, np.bool_),
        "selected": np.array([1]),
        "sample_ids": ["1"],
        "sources": [None],
        "summary": {},
        "charts": small_charts(n),
    }
    publish(session, job_id=job_id, provenance=provenance or {}, **{**usual, **changes})


def published(sessions: Sessions, key: str, content: Any, deleted: bool = False, **more: Any) -> str:
    """A job that has succeeded, with small results."""
    job_id = add_job(sessions, key, content, JobStatus.SUCCEEDED, deleted, model=more.pop("model", "small"))
    with sessions.begin() as session:
        publish_small(session, job_id, content.row_count, **more)
    move(sessions, job_id, JobStatus.SUCCEEDED)
    return job_id


class HandmadeJobs(World):
    """Jobs of the model "small" in every state, as a user posts them and no worker runs them."""

    def dataset(self, tag: str, rows: int = 8) -> Json:
        return dict(self.call("GET", f"{DATASETS}/{self.upload(plain_rows(rows, tag), tag)}").json())

    def queued(self, **changes: Any) -> Json:
        pool, target = (changes.pop(name, None) or self.dataset(name)["id"] for name in ("pool", "target"))
        request = {"model": "small", "pool": pool, "target": target, "budget": 0.5, "seed": 7, **changes}
        return dict(self.call("POST", JOBS, json=request).json())

    def failed(self, **changes: Any) -> Json:
        job = self.queued(**changes)
        move(self.sessions, job["id"], JobStatus.RUNNING, JobStatus.FAILED)
        return job

    def succeeded_with_results(self, *, unknown: str | None = None, **changes: Any) -> Json:
        """Random figures, and a record as a worker writes it, or one whose version did not know of the parameter `unknown`."""
        job = self.queued(**changes)
        move(self.sessions, job["id"], JobStatus.RUNNING)
        datasets = {name: self.call("GET", f"{DATASETS}/{job[name]}").json() for name in ("pool", "target")}
        n, budget = datasets["pool"]["row_count"], job["budget"]
        with self.sessions.begin() as session:
            row = session.get_one(SelectionJob, job["id"])
            publish_small(
                session,
                job["id"],
                n,
                influence=np.random.default_rng(1).normal(size=n).astype(np.float32),
                exact=np.ones(n, np.bool_),
                selected=np.arange(budget),
                sample_ids=[str(i) for i in range(budget)],
                sources=[None] * budget,
                provenance={
                    **{d: {"id": v["id"], "fingerprint": v["fingerprint"], "rows": n} for d, v in datasets.items()},
                    "model": {**row.model, "fingerprint": "f", "files": {}, "chat_template": "default"},
                    "budget": row.budget,
                    "parameters": {name: value for name, value in row.parameters.items() if name != unknown},
                    "dtype": "bfloat16",
                },
            )
        move(self.sessions, job["id"], JobStatus.SUCCEEDED)
        return job
