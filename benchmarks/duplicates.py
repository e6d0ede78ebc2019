"""Repeats in a large pool, and with a target: time and memory, without a model.

    python benchmarks/duplicates.py --cache DIR --out benchmarks/results [--rows 1000000] [--length 100] [--target 1000]

Generated rows of words that are as frequent as in a language (Zipf), half of each row reply. A tenth of the rows repeat an
earlier one, half of them in other case, half with one word in twenty changed; a thousandth of the rows repeat the target so. The
stage runs as a worker runs it, in one process: signatures shard by shard, then the search. Each phase has a process of its own,
whose peak is its memory; one that is done is not repeated. What was planted is compared with what was found.
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

from service.datasets import storage
from service.datasets.rows.canonical import CanonicalRow
from service.plan.shards import prepare_shards
from service.plan.stages import JobInputs
from service.settings import WorkerSettings
from service.storage.artifacts import ArtifactStore
from service.storage.tempdirs import temporary_directory
from worker.duplicates.matching import NONE
from worker.duplicates.minhash import BANDS, ROWS, THRESHOLD, detection
from worker.stages.context import ModelCache, StageContext
from worker.stages.duplicates import PoolRepeats

console = Console(stderr=True)
Found = dict[str, Any]
REPEATED, OF_TARGET = 0.1, 0.001
CHANGED_WORDS = 20  # one in so many
VOCABULARY = 50_000
WORDS = [f"w{number:x}" for number in range(VOCABULARY)]
_EARLIER = 1_000  # rows before a repeat that it may repeat: kept in memory here, not by the search


def shares() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    ends = np.cumsum(1 / np.arange(10, VOCABULARY + 10))
    return ends / ends[-1]


def words(draw: np.random.Generator, ends: np.ndarray[Any, Any], size: int) -> list[str]:
    return [WORDS[number] for number in np.searchsorted(ends[:-1], draw.random(size)).tolist()]


def row(index: int, name: str, said: list[str]) -> CanonicalRow:
    half = len(said) // 2
    messages = [
        {"role": role, "content": " ".join(part)} for role, part in (("user", said[:half]), ("assistant", said[half:]))
    ]
    return CanonicalRow(f"{name}{index}", None, json.dumps({"messages": messages}, separators=(",", ":")))


def varied(draw: np.random.Generator, said: list[str], *, is_exact: bool) -> list[str]:
    if is_exact:
        return [word.upper() for word in said]
    changed = set(draw.choice(len(said), max(1, len(said) // CHANGED_WORDS), replace=False).tolist())
    return [f"other{draw.integers(1 << 30):x}" if i in changed else word for i, word in enumerate(said)]


def target_words(options: argparse.Namespace) -> list[list[str]]:
    draw, ends = np.random.default_rng([options.seed, 1]), shares()
    return [words(draw, ends, options.length) for _ in range(options.target)]


def drawn(options: argparse.Namespace, planted: list[tuple[str, int, bool]]) -> Iterator[CanonicalRow]:
    """The pool; what is planted is appended to `planted`: kind, row, and whether it is exact."""
    draw, ends, target = np.random.default_rng([options.seed, 0]), shares(), target_words(options)
    earlier: list[list[str]] = []
    for index in range(options.rows):
        kind, is_exact = draw.random(), bool(draw.random() < 0.5)
        if kind < OF_TARGET:
            planted.append(("overlap", index, is_exact))
            said = varied(draw, target[int(draw.integers(len(target)))], is_exact=is_exact)
        elif kind < OF_TARGET + REPEATED and earlier:
            planted.append(("duplicates", index, is_exact))
            said = varied(draw, earlier[int(draw.integers(len(earlier)))], is_exact=is_exact)
        else:
            said = words(draw, ends, int(draw.integers(max(2, options.length * 3 // 4), options.length * 5 // 4 + 1)))
            earlier = earlier[-_EARLIER:] if len(earlier) > 2 * _EARLIER else earlier
            earlier.append(said)
        yield row(index, "row-", said)


def context(options: argparse.Namespace, pool: str = "", target: str = "") -> StageContext:
    return StageContext(
        store=ArtifactStore(str(options.cache / "store")),
        job=JobInputs(model={}, pool=pool, target=target, budget=1, parameters={}),
        prepared={},
        models=ModelCache(options.cache, torch.device("cpu")),
        settings=WorkerSettings(),
        token_budget=0,
        report=lambda _: None,
        event=lambda *_: None,
    )


def generated(options: argparse.Namespace) -> Found:
    store, planted, published = context(options).store, list[tuple[str, int, bool]](), {}
    targets = (row(i, "target-", said) for i, said in enumerate(target_words(options)))
    for name, rows in (("pool", drawn(options, planted)), ("target", targets)):
        with temporary_directory() as folder:
            with storage.ContentWriter(folder) as writer:
                for each in rows:
                    writer.append(each)
            content = writer.content()
            storage.publish(store, content)
        published[name] = content.fingerprint
        published[f"{name}_bytes"] = content.byte_count
    write_json(options.cache / "planted.json", {"planted": planted})
    return published


def search(options: argparse.Namespace) -> PoolRepeats:
    published = json.loads((options.cache / "generated.json").read_text())["found"]
    of = context(options, published["pool"], published["target"])
    return PoolRepeats(of, prepare_shards(*storage.group_sizes(of.store, published["pool"])), lambda: None)


def signatures(options: argparse.Namespace) -> Found:
    made = search(options)
    made.make_signatures()
    return {"shards": len(made.shards), "bytes": sum(made.context.store.size(key) for key in made.signatures)}


def searching(options: argparse.Namespace) -> Found:
    """With what share of the planted was found, and how much else."""
    made = search(options)
    found = made.find()
    planted = json.loads((options.cache / "planted.json").read_text())["planted"]
    result: Found = {"bytes": sum(made.context.store.size(key) for key in found.keys.values())}
    for kind, repeats in (("duplicates", found.duplicates), ("overlap", found.overlap)):
        rows = {index: is_exact for name, index, is_exact in planted if name == kind}
        # Rows that repeat the same row of the target repeat one another, and who repeats a row may thereby repeat the target.
        others = np.setdiff1d(np.flatnonzero(repeats.is_repeat), [index for _, index, _ in planted])
        shares_found = {}
        for name, wanted in (("exact", True), ("near", False)):
            of = [index for index, is_exact in rows.items() if is_exact == wanted]
            shares_found[name] = round(float((repeats.same_as[of] != NONE).mean()), 4) if of else None
        result[kind] = {**repeats.counts, "planted": len(rows), "found": shares_found, "not_planted": len(others)}
    return result


PHASES: dict[str, Callable[[argparse.Namespace], Found]] = {
    "generated": generated,
    "signatures": signatures,
    "search": searching,
}


def measured(name: str, options: argparse.Namespace) -> Found:
    started, processor = time.perf_counter(), time.process_time()
    found = PHASES[name](options)
    processor = time.process_time() - processor
    return {
        **found,
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(processor, 2),
        "rows_a_processor_second": round(options.rows / processor),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def in_its_own_process(name: str, options: argparse.Namespace) -> Found:
    """Of a phase that was measured before with the same options, what was found then."""
    asked = {key: value for key, value in vars(options).items() if key in ("rows", "length", "target", "seed")}
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
    parser.add_argument("--length", type=int, default=100, help="words of a row, on average")
    parser.add_argument("--target", type=int, default=1_000, help="rows of the target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    for folder in (options.cache, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    found = {name: in_its_own_process(name, options) for name in PHASES}
    how = {"threshold": THRESHOLD, "bands": BANDS, "rows_of_a_band": ROWS}
    detected = {str(j): round(detection(j), 4) for j in (0.5, 0.6, 0.7, 0.8, 0.9)}
    result = {**heading(options), "rows": options.rows, "minhash": {**how, "detection": detected}, **found}
    write_json(options.out / "duplicates.json", result)
    columns = ("seconds", "processor_seconds", "rows_a_processor_second", "peak_mib")
    lines = [[name, *(f"{each[column]:,}" for column in columns)] for name, each in found.items()]
    text = table(["phase", "seconds", "processor seconds", "rows a processor second", "peak MiB"], lines)
    planted = [
        [
            kind,
            *(found["search"][kind][name] for name in ("planted", "exact", "near", "not_planted")),
            *shares_of(found, kind),
        ]
        for kind in ("duplicates", "overlap")
    ]
    header = ["", "planted", "found exactly", "found nearly", "found and not planted", "of exact ones", "of near ones"]
    text += "\n" + table(header, planted)
    (options.out / "duplicates.md").write_text(text)
    console.print(text)


def shares_of(found: Found, kind: str) -> list[str]:
    return ["" if share is None else f"{share:.2%}" for share in found["search"][kind]["found"].values()]


if __name__ == "__main__":
    main()
