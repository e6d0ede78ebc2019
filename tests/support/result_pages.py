"""Finished jobs of hostile texts, published by hand, for the tests of their pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.auth.principal import Scope
from service.settings import ApiSettings
from support.charts import HOSTILE, largest_charts
from support.jobs import published, write_pool
from support.web import Visitor, visitor
from support.world import World

N, K = 40, 6
LONG = 50_000
_VERDICT = [
    {"about": "choice", "level": "bad", "figure": 0.2, "meaning": f"Meaning {HOSTILE}", "advice": f"Advice {HOSTILE}"},
    {"about": "rows", "level": "ok", "figure": None, "meaning": "Fine.", "advice": None},
]
_STEP = {"measured": -0.01, "predicted": -0.012, "predicted_second_order": None}


@dataclass(frozen=True)
class Shown:
    """`job` has all charts and took samples 39 to 34; `other`, of the same pool, has none; `foreign` is another tenant's."""

    world: World
    me: Visitor
    job: str
    other: str
    foreign: str

    def page(self, path: str) -> str:
        answer = self.me.get(f"/jobs/{self.job}/{path}")
        assert answer.status_code == 200, answer.text[-2000:]
        return answer.text


@contextmanager
def shown_results(settings: ApiSettings, folder: Path) -> Iterator[Shown]:
    texts = [f"{HOSTILE} {number}" for number in range(N)]
    texts[3] = "long" * LONG
    rows = [
        (f"id {n}", HOSTILE, {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]})
        for n, text in enumerate(texts)
    ]
    with World.made(settings, scopes=Scope) as world:
        pool = write_pool(world.store, folder / "pool", rows)
        job = publish(world, world.key, pool, [39, 38, 37, 36, 35, 34], charts=largest_charts(N, budget=K))
        other = publish(world, world.key, pool, [39, 38, 3], charts=None)
        foreign = publish(world, world.other_key, pool, [1, 2, 3])
        yield Shown(world, visitor(world), job, other, foreign)


def publish(world: World, key: str, pool: Any, selected: list[int], **more: Any) -> str:
    influence = np.linspace(-1, 1, N, dtype=np.float32)
    influence[5] = np.nan
    weight = np.zeros(N, np.float32)
    weight[selected] = 1
    summary = {
        "verdict": _VERDICT,
        "sources": {HOSTILE: {"pool": N, "selected": len(selected), "weight": 1.0}},
        "validation": {**dict.fromkeys(("selection", "random"), _STEP), "held_out": None, "sentence": HOSTILE},
        "sentences": [HOSTILE],
    }
    return published(
        world.sessions,
        key,
        pool,
        influence=influence,
        weight=weight,
        selected=np.array(selected),
        sample_ids=[f"id {index}" for index in selected],
        sources=[None] * len(selected),
        summary=summary,
        provenance={"request": {"model": HOSTILE}, "pool": {"id": "ds_1", "rows": N}, "budget": len(selected)},
        **more,
    )
