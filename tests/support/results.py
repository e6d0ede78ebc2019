"""What the tests of results stand on: a succeeded job, and the arrays that were published for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel

from service.auth.principal import Scope
from service.ledger.state import JobStatus
from service.results.service import distribution, publish
from service.settings import ApiSettings
from support.charts import small_charts
from support.jobs import add_job, move, published, write_pool
from support.world import JOBS, World

N, K = 40_000, 500


@dataclass(frozen=True)
class Published(World):
    """The first tenant has a succeeded job of 40,000 samples, of which this was published; some took no part."""

    job_id: str
    ids: list[str]
    sources: list[str | None]
    influence: np.ndarray
    weight: np.ndarray
    exact: np.ndarray
    selected: np.ndarray

    def fetch(self, path: str, *, key: str | None = None, job_id: str | None = None, **params: Any) -> httpx.Response:
        """What is below the job."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return self.client.get(f"{JOBS}/{job_id or self.job_id}/{path}", params=params, headers=headers)

    def row(self, i: int) -> dict[str, Any]:
        return {
            "index": i,
            "id": self.ids[i],
            "source": self.sources[i],
            "influence": None if np.isnan(self.influence[i]) else self.influence[i],
            "weight": self.weight[i],
            "exact": bool(self.exact[i]),
        }

    def ranks(self) -> dict[int, int]:
        return {index: rank for rank, index in enumerate(self.selected.tolist())}


def undeclared(model: BaseModel, path: str = "") -> Iterator[str]:
    """Fields that its schema does not have, here and below."""
    yield from (f"{path}{name}" for name in model.model_extra or {})
    for name in type(model).model_fields:
        value = getattr(model, name)
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for each in inside:
            if isinstance(each, BaseModel):
                yield from undeclared(each, f"{path}{name}.")


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal, with the floats compared as the float32 that they are."""
    return found.keys() == expected.keys() and all(
        np.float32(found[name]) == value if isinstance(value, np.floating) else found[name] == value
        for name, value in expected.items()
    )


@contextmanager
def published_world(settings: ApiSettings, folder: Path) -> Iterator[Published]:
    rng = np.random.default_rng(7)
    ids = [f'sample, "{i}" é' for i in range(N)]
    sources = [None if i % 5 == 0 else f"source {i % 3}" for i in range(N)]
    samples = [
        (id, source, {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "é" * 9}]})
        for i, (id, source) in enumerate(zip(ids, sources, strict=True))
    ]
    influence = rng.normal(size=N).astype(np.float32)
    weight = np.zeros(N, np.float32)
    selected = rng.permutation(N)[:K].astype(np.int64)
    weight[selected] = rng.random(K, dtype=np.float32)
    exact = rng.random(N) < 0.1
    left_out = np.setdiff1d(np.arange(0, N, 11), selected)
    influence[left_out], exact[left_out] = np.nan, False
    with World.made(settings, scopes=Scope) as world:
        pool = write_pool(world.store, folder / "pool", samples)
        published(world.sessions, world.other_key, pool)  # which a query that forgot its job would find too
        job_id = add_job(world.sessions, world.key, pool, JobStatus.SUCCEEDED)
        with world.sessions.begin() as session:
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
                charts=small_charts(N),
                provenance={"seed": 7},
            )
        move(world.sessions, job_id, JobStatus.SUCCEEDED)
        arrays = (influence, weight, exact, selected)
        yield Published(world.app, world.client, world.other, job_id, ids, sources, *arrays)
