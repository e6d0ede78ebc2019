"""The embedding of a large pool from its text: time and memory, without a model.

    python benchmarks/text_embedding.py --cache DIR --out benchmarks/results [--rows 1000000] [--length 300]

The stage runs as a worker runs it, shard after shard, on tokens in an artifact store: random ones, as frequent as words in a
language are (Zipf), half of each row reply. So it measures time and memory, and says nothing about quality. Each phase has a
process of its own, whose peak is its memory; one that is done is not repeated.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import heading
from reporting import table, write_json
from rich.console import Console

from service.plan.limits import SCALED_ON
from service.plan.shards import embed_shards
from service.plan.stages import JobInputs
from service.settings import WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.stages import embed
from worker.stages.context import ModelCache, StageContext
from worker.text import token_files
from worker.text.tokenization import Tokenised

console = Console(stderr=True)
Found = dict[str, Any]
POOL, SCALED = "tokens/pool.parquet", "tokens/scaled_on.parquet"


def drawn(rows: int, length: int, vocabulary: int, seed: int) -> Iterator[Tokenised]:
    """Rows of about this many tokens, a quarter more or less."""
    draw = np.random.default_rng(seed)
    shares = 1 / np.arange(10, vocabulary + 10)
    ends = np.cumsum(shares / shares.sum())
    for index in range(rows):
        size = int(draw.integers(max(2, length * 3 // 4), length * 5 // 4 + 1))
        ids = np.searchsorted(ends[:-1], draw.random(size)).astype(np.int32)
        response = np.arange(size) >= size // 2
        yield Tokenised(index=index, input_ids=ids, response=response, truncated=False, response_truncated=False)


def context(options: argparse.Namespace) -> StageContext:
    return StageContext(
        store=ArtifactStore(str(options.cache / "store")),
        job=JobInputs(model={}, pool="pool", target="target", budget=1, parameters={"seed": 0}),
        prepared={},
        models=ModelCache(options.cache, torch.device("cpu")),
        settings=WorkerSettings(),
        token_budget=0,
        report=lambda _: None,
        event=lambda *_: None,
    )


def generated(options: argparse.Namespace) -> Found:
    store = context(options).store
    token_files.write_tokens(store, POOL, drawn(options.rows, options.length, options.vocabulary, options.seed))
    order = np.random.default_rng(options.seed).permutation(options.rows)
    token_files.copy_rows(store, POOL, SCALED, np.sort(order[:SCALED_ON]))
    return {"tokens": int(token_files.read_counts(store, POOL).length.sum())}


def embedding(options: argparse.Namespace) -> Found:
    ran = context(options)
    shards = embed_shards(token_files.read_counts(ran.store, POOL).length)
    spec = {"tokens": POOL, "of": options.rows, "checkpoint": None, "scaled_on": SCALED}
    width = tokens = 0
    for number, (start, stop) in enumerate(shards):
        own = {**spec, "options": {"kind": "text"}, "start": start, "stop": stop}
        found = embed.run(ran, f"embeddings/{number}.safetensors", own, dataset="pool")
        width, tokens = found["width"], tokens + found["tokens"]
    return {"shards": len(shards), "width": width, "tokens": tokens}


PHASES: dict[str, Callable[[argparse.Namespace], Found]] = {
    "generated": generated,
    "embedding": embedding,
}


def measured(name: str, options: argparse.Namespace) -> Found:
    started, processor = time.perf_counter(), time.process_time()
    found = PHASES[name](options)
    seconds = time.perf_counter() - started
    return {
        **found,
        "seconds": round(seconds, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "rows_a_second": round(options.rows / seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def in_its_own_process(name: str, options: argparse.Namespace) -> Found:
    """Of a phase that was measured before with the same options, what was found then."""
    asked = {key: value for key, value in vars(options).items() if key in ("rows", "length", "vocabulary", "seed")}
    kept = options.cache / f"{name}.json"
    if kept.exists() and (before := json.loads(kept.read_text()))["asked"] == asked:
        found: Found = before["found"]
        return found
    console.print(f"{name}: {options.rows:,} rows")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(measured, (name, options))
    write_json(kept, {"asked": asked, "found": found})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=300, help="tokens of a row, on average")
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    for folder in (options.cache, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    found = {name: in_its_own_process(name, options) for name in PHASES}
    write_json(options.out / "text_embedding.json", {**heading(options), "rows": options.rows, **found})
    columns = ("seconds", "processor_seconds", "rows_a_second", "peak_mib")
    lines = [[name, *(f"{found[name][column]:,}" for column in columns)] for name in ("generated", "embedding")]
    text = table(["stage", "seconds", "processor seconds", "rows a second", "peak MiB"], lines)
    (options.out / "text_embedding.md").write_text(text)
    console.print(text)


if __name__ == "__main__":
    main()
