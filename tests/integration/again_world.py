"""Jobs that failed or succeeded without a worker, and a key of their tenant that may do all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from results_world import move

from service.app import create_app
from service.ids import new_id
from service.jobs.state import JobStatus
from service.jobs.tables import SelectionJob
from service.results.service import publish
from service.settings import ApiSettings, ArtifactSettings, BrokerSettings, DatabaseSettings, ModelSettings
from service.tenants.caller import Scope
from service.tenants.service import create_key

SECRET = "integration-tests-only-0123456789abcdef"
JOBS, DATASETS = "/v1/selection-jobs", "/v1/datasets"
MODEL = "small"
Json = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Nothing runs beside the API: no dispatcher, and nothing is sent."""

    app: FastAPI
    client: TestClient
    other: TestClient
    tenant: str

    def upload(self, tag: str, rows: int = 8) -> Json:
        content = "".join(f'{{"prompt": "{tag} {i}", "completion": "b"}}\n' for i in range(rows))
        answer = self.client.post(DATASETS, params={"name": tag}, content=content)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def post(self, **changes: Any) -> Json:
        pool, target = (changes.pop(name, None) or self.upload(name)["id"] for name in ("pool", "target"))
        request = {"model": MODEL, "pool": pool, "target": target, "budget": 0.5, "seed": 7, **changes}
        answer = self.client.post(JOBS, json=request)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def failed(self, **changes: Any) -> Json:
        job = self.post(**changes)
        for status in (JobStatus.RUNNING, JobStatus.FAILED):
            move(self.app.state.sessions, job["id"], status)
        return job

    def succeeded(self, **changes: Any) -> Json:
        """With results of random figures, and a record as a worker writes it."""
        job = self.post(**changes)
        move(self.app.state.sessions, job["id"], JobStatus.RUNNING)
        with self.app.state.sessions.begin() as session:
            row = session.get_one(SelectionJob, job["id"])
            datasets = {n: self.client.get(f"{DATASETS}/{job[n]}").json() for n in ("pool", "target")}
            random, n = np.random.default_rng(1), datasets["pool"]["row_count"]
            publish(
                session,
                job_id=job["id"],
                influence=random.normal(size=n).astype(np.float32),
                weight=np.ones(n, np.float32),
                exact=np.ones(n, np.bool_),
                selected=np.arange(job["budget"]),
                sample_ids=[str(i) for i in range(job["budget"])],
                sources=[None] * job["budget"],
                summary={},
                provenance={
                    **{d: {"id": v["id"], "fingerprint": v["fingerprint"], "rows": n} for d, v in datasets.items()},
                    "model": {**row.model, "fingerprint": "f", "files": {}, "chat_template": "default"},
                    "budget": row.budget,
                    "parameters": row.parameters,
                    "dtype": "bfloat16",
                },
            )
        move(self.app.state.sessions, job["id"], JobStatus.SUCCEEDED)
        return job


@contextmanager
def again_world(postgres_url: str, folder: Path) -> Iterator[World]:
    (folder / MODEL).mkdir()
    (folder / MODEL / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 6}))
    app = create_app(
        ApiSettings(
            database=DatabaseSettings(url=postgres_url, pool_size=2),
            broker=BrokerSettings(url="redis://localhost:1"),
            artifacts=ArtifactSettings(url=str(folder / "store")),
            models=ModelSettings(folder=folder),
            webhooks={"allowed_networks": ["127.0.0.0/8"]},
            secret_key=SecretStr(SECRET),
        )
    )
    tenant = new_id("tenant")
    with app.state.sessions.begin() as session:
        keys = [
            create_key(session, tenant_name=name, key_name="all", secret_key=SECRET, scopes=list(Scope))
            for name in (tenant, new_id("tenant"))
        ]
    # Entered as a context it would start the dispatcher and the sender.
    client, other = (TestClient(app, headers={"Authorization": f"Bearer {key}"}) for key in keys)
    yield World(app, client, other, tenant)
    app.state.engine.dispose()
