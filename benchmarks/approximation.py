"""How well landmarks and cheap embeddings stand in for exact influence, by embedding and by choice of landmarks.

    python benchmarks/approximation.py --corpus DIR --model DIR --cache DIR [--measure] [--out FILE]

With --measure the exact gradients and every embedding are made first, a piece of the pool at a time, each kept in the cache: the
run can be stopped and started again, and what is done so far can be compared without --measure. The pool is a random part
of DIR/pool.jsonl.gz, the targets are the dev splits; test splits are not read.
"""

import argparse
import gzip
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.datasets.storage import Sample
from worker.data import tokenise
from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    KernelRidge,
    Samples,
    cosine_influence,
    default_token_budget,
    embed,
    fidelity,
    landmark_order,
    per_sample_gradients,
    round_robin,
    top_k,
)
from worker.influence.batching import marked_positions, padded, run_batches
from worker.influence.models import block_list, hidden_states
from worker.influence.propagation import RIDGES
from worker.influence.samples import IntArray

PIECE = 150
"""Rows of the pool that are measured at a time."""
DEPTHS = (4, 8, 15, 22, 30)
POOLINGS = ("last", "response", "weighted")
HIDDEN = tuple(f"{depth}.{pooling}" for depth in (4, 8, 15, 22, 30) for pooling in ("last", "response"))
JOINED = (
    ("hidden 4 last", "hidden 4 response"),
    ("jvp 4 last", "jvp 4 response"),
    ("hidden 4 response", "jvp 4 response"),
    ("hidden 4 response", "hidden 22 response"),
)
COMPARED = ("hidden 4 response", "jvp 4 response")
"""What ridges and choices of landmarks are compared with."""
CHOICES = ("uniform", "stratified", "equal per source", "k-means++", "ridge leverage")
SELECTED = 0.05
JVP = {"jvp_last": "last", "jvp_response": "response"}


def main() -> None:
    options = arguments()
    options.cache.mkdir(parents=True, exist_ok=True)
    names = options.targets.split(",")
    if options.measure:
        measure(options, names)
    pool = read_pool(options, names)
    print(f"{pool.rows} rows of the pool are measured, {pool.usable.size} of them have a gradient", flush=True)
    started = time.perf_counter()
    report = {
        "command": f"python benchmarks/approximation.py --corpus DIR --model DIR --cache DIR --rows {options.rows}",
        "commit": commit(),
        "machine": {"processor": "AMD EPYC", "cores": 2, "accelerator": None, "beside": options.beside},
        "model": options.model.name,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "rows": pool.rows,
        "usable": pool.usable.size,
        "targets": {name: P_nt.shape[1] for name, P_nt in pool.influence.items()},
        "processor_seconds_of_150_rows": pool.seconds,
        "selected_share": SELECTED,
        "seeds": options.seeds,
        "embeddings": compare(pool, options, pool.embeddings),
        "ridges": compare(pool, options, COMPARED, ridges=(*RIDGES, None)),
        "landmarks": compare(pool, options, COMPARED, CHOICES),
    }
    report["comparison_seconds"] = round(time.perf_counter() - started)
    text = json.dumps(report, indent=1)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--target-rows", type=int, default=48)
    parser.add_argument("--targets", default="gsm8k,squad,bbh")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--measure", action="store_true", help="make what the cache lacks before comparing")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--landmarks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--beside", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def read_rows(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def pool_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The random part of the pool, the same for the same seed; twice the rows asked for are drawn in the same order."""
    rows = read_rows(options.corpus / "pool.jsonl.gz")
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[: options.rows]]


def samples_of(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Samples:
    given = [Sample(i, row["id"], row["source"], row["messages"], None) for i, row in enumerate(rows)]
    tokenised = list(tokenise(given, tokenizer, max_length=max_length, report=lambda _: None))
    return Samples(
        input_ids=np.concatenate([row.input_ids for row in tokenised]),
        response=np.concatenate([row.response for row in tokenised]),
        offsets=np.cumsum([0, *(len(row.input_ids) for row in tokenised)]).astype(np.int64),
    )


def measure(options: argparse.Namespace, names: list[str]) -> None:
    """Fill the cache: targets first, then the pool piece by piece, every quantity of a piece before the next."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    for name in names:
        rows = read_rows(options.corpus / f"targets/{name}.dev.jsonl.gz")[: options.target_rows]
        samples = samples_of(rows, tokenizer, options.max_length)
        cached(options.cache / f"{name}.gradients", lambda s=samples: {"g": gradients(model, s)})
    pool = samples_of(pool_rows(options), tokenizer, options.max_length)
    for start in range(0, options.rows, PIECE):
        piece = pool.slice(start, min(start + PIECE, options.rows))
        at = f"pool{start:05d}"
        cached(options.cache / f"{at}.gradients", lambda s=piece: {"g": gradients(model, s)})
        cached(options.cache / f"{at}.hidden", lambda s=piece: hidden(model, s))
        for name, pooling in JVP.items():
            jvp = EmbeddingOptions(kind="jvp", pooling=pooling, blocks=4, tangents=2)
            cached(options.cache / f"{at}.{name}", lambda s=piece, o=jvp: {"e": embed(model, s, options=o)})


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> None:
    """One safetensors file, appearing whole, with the seconds that it took."""
    path = path.with_name(path.name + ".safetensors")
    if path.exists():
        return
    start, cpu = time.perf_counter(), time.process_time()
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"seconds": f"{seconds:.2f}", "cpu_seconds": f"{cpu_seconds:.2f}"})
    part.rename(path)
    print(f"{path.name}: {seconds:.1f} s ({cpu_seconds:.1f} s of processor)", flush=True)


def gradients(model: Any, samples: Samples) -> Tensor:
    return per_sample_gradients(model, samples, projection=GradientProjection()).values


@torch.no_grad()
def hidden(model: Any, samples: Samples) -> dict[str, Tensor]:
    """Normed hidden states of several depths under several poolings, from one forward pass: (n, D) by "depth.pooling".

    `embed` would run the first blocks again for each of them; what it returns is the same up to rounding and length.
    """
    base = model.base_model
    blocks, norm = block_list(base)[1], base.norm
    lengths = samples.lengths
    sums = {
        f"{depth}.{pooling}": torch.zeros(len(samples), norm.weight.shape[0])
        for depth in DEPTHS
        for pooling in POOLINGS
    }
    everything = np.ones(samples.input_ids.size, dtype=bool)

    def run(indices: IntArray) -> None:
        outputs: dict[int, Tensor] = {}
        handles = [
            blocks[depth - 1].register_forward_hook(
                lambda _m, _i, out, d=depth: outputs.__setitem__(d, out[0] if isinstance(out, tuple) else out)
            )
            for depth in DEPTHS
        ]
        try:
            hidden_states(model, base, padded(samples, indices, lengths, torch.device("cpu")))
        finally:
            for handle in handles:
                handle.remove()
        rows, places = marked_positions(everything, samples, indices)
        response = np.concatenate([samples.response[samples.offsets[i] : samples.offsets[i + 1]] for i in indices])
        row_weights = {
            "last": places == lengths[indices][rows] - 1,
            "response": response,
            "weighted": places + 1.0,
        }
        for depth, states_BTD in outputs.items():
            states_RD = norm(states_BTD[rows, places]).float()
            for pooling, weight in row_weights.items():
                total = np.bincount(rows, weights=weight, minlength=indices.size)
                share_R = torch.from_numpy(weight / np.maximum(total, 1e-9)[rows]).float()
                pooled_BD = torch.zeros(indices.size, states_RD.shape[1])
                pooled_BD.index_add_(0, torch.from_numpy(rows), states_RD * share_R[:, None])
                sums[f"{depth}.{pooling}"][torch.from_numpy(indices)] = pooled_BD

    run_batches(lengths, default_token_budget(torch.device("cpu")), run)
    return sums


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What is measured: exact influence (n, t) by target, embeddings (n, e) by name, sources, the rows with a gradient."""

    rows: int
    influence: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    sources: list[str]
    usable: IntArray
    seconds: dict[str, float]


def read_pool(options: argparse.Namespace, names: list[str]) -> Pool:
    """Everything of the pieces whose last quantity is in the cache."""
    starts = []
    for start in range(0, options.rows, PIECE):
        if not (options.cache / f"pool{start:05d}.jvp_response.safetensors").exists():
            break
        starts.append(start)
    seconds: dict[str, float] = {}

    def all_of(kind: str) -> dict[str, Tensor]:
        files = [options.cache / f"pool{start:05d}.{kind}.safetensors" for start in starts]
        spent = []
        for file in files:
            with safe_open(file, "pt") as opened:
                spent.append(float(opened.metadata()["cpu_seconds"]))
        seconds[kind] = round(float(np.mean(spent)), 1)
        pieces = [load_file(file) for file in files]
        return {name: torch.cat([piece[name] for piece in pieces]).float() for name in pieces[0]}

    G_nk, states = all_of("gradients")["g"], all_of("hidden")
    targets = {name: load_file(options.cache / f"{name}.gradients.safetensors")["g"] for name in names}
    embeddings = {f"hidden {key.replace('.', ' ')}": states[key] for key in HIDDEN}
    embeddings["rds"] = states["30.weighted"]
    embeddings |= {name.replace("_", " 4 "): all_of(name)["e"] for name in JVP}
    unit = {name: nn.functional.normalize(E_ne, dim=1) for name, E_ne in embeddings.items()}
    for first, second in JOINED:
        unit[f"{first} + {second}"] = nn.functional.normalize(torch.cat([unit[first], unit[second]], 1), dim=1)
    unit["the gradient itself"] = nn.functional.normalize(G_nk, dim=1)
    return Pool(
        rows=len(G_nk),
        influence={name: cosine_influence(G_nk, G_tk).double() for name, G_tk in targets.items()},
        embeddings=unit,
        sources=[row["source"] for row in pool_rows(options)[: len(G_nk)]],
        usable=np.flatnonzero(G_nk.norm(dim=1).numpy() > 0),
        seconds=seconds,
    )


def compare(
    pool: Pool,
    options: argparse.Namespace,
    names: Iterable[str],
    choices: tuple[str, ...] = ("uniform",),
    ridges: tuple[float | None, ...] = (None,),
) -> list[dict[str, Any]]:
    """The figures of every combination; a ridge of None is chosen by leave-one-out."""
    return [
        {"embedding": name, "landmarks": count, "choice": choice, "ridge": ridge}
        | averaged(pool, name, choice, count, ridge, options.seeds)
        for name in names
        for count in options.landmarks
        for choice in choices
        for ridge in ridges
    ]


def averaged(
    pool: Pool, name: str, choice: str, count: int, ridge: float | None, seeds: int
) -> dict[str, dict[str, Any]]:
    """Mean of each figure over targets and seeds, `spread`: its standard deviation over seeds; two of them by target."""
    found = [one_run(pool, name, choice, count, ridge, seed) for seed in range(seeds)]
    targets = list(pool.influence)
    figures = {key: np.array([[run[t][key] for t in targets] for run in found]) for key in found[0][targets[0]]}
    return {
        "mean": {key: round(float(values.mean()), 3) for key, values in figures.items()},
        "spread": {key: round(float(values.mean(axis=1).std()), 3) for key, values in figures.items()},
        "by_target": {
            target: {key: round(float(figures[key][:, column].mean()), 3) for key in ("spearman", "refined_overlap")}
            for column, target in enumerate(targets)
        },
    }


def one_run(
    pool: Pool, name: str, choice: str, count: int, ridge: float | None, seed: int
) -> dict[str, dict[str, float]]:
    """The figures of one draw of landmarks, by target; fidelity is that of the samples which are no landmarks."""
    E_ne = pool.embeddings[name]
    landmarks = choose_landmarks(pool, E_ne, choice, count, seed)
    others = np.setdiff1d(pool.usable, landmarks)
    figures = {}
    for target, P_nt in pool.influence.items():
        fitted = KernelRidge.fit(E_ne[landmarks], P_nt[landmarks], ridge=ridge)
        predicted_mt = fitted.predict(E_ne[others])
        true = fidelity(P_nt[others], predicted_mt)
        left_out = fidelity(P_nt[landmarks], fitted.leave_one_out())
        known_nt = P_nt.clone()
        known_nt[others] = predicted_mt
        figures[target] = {
            "spearman": float(np.mean([value for value in true.spearman if value is not None])),
            "mean_spearman": true.mean_spearman or 0.0,
            "mean_r2": true.mean_r2 or 0.0,
            "left_out_mean_spearman": left_out.mean_spearman or 0.0,
            "left_out_mean_r2": left_out.mean_r2 or 0.0,
            "overlap": overlap(P_nt[pool.usable], known_nt[pool.usable], seed),
            **refined(pool, P_nt, known_nt, landmarks, others, seed),
            "ridge": fitted.delta,
        }
    return figures


def overlap(exact_mt: Tensor, known_mt: Tensor, seed: int) -> float:
    """Share of the exact method's choice that is chosen from what is known, by round robin."""
    budget = round(SELECTED * len(exact_mt))
    wanted, found = (set(round_robin(P_mt, budget, seed=seed).tolist()) for P_mt in (exact_mt, known_mt))
    return len(wanted & found) / budget


def refined(
    pool: Pool, P_nt: Tensor, known_nt: Tensor, landmarks: IntArray, others: IntArray, seed: int
) -> dict[str, float]:
    """Overlap when the exact influence of a shortlist of 20 % of the usable samples, and of the landmarks, is known.

    `refined_overlap`: the best by mean influence that are no landmarks; `with_landmarks`: the best of all, so that landmarks
    take places among them; `by_turns`: by round robin in place of the mean; `unpropagated`: any that are no landmarks.
    """
    size = min(round(0.2 * pool.usable.size), others.size)
    mean_n = known_nt.mean(dim=1)
    shortlists = {
        "refined_overlap": others[top_k(mean_n[others], size)],
        "refined_overlap_with_landmarks": pool.usable[top_k(mean_n[pool.usable], size)],
        "refined_overlap_by_turns": others[round_robin(known_nt[others], size, seed=seed)],
        "refined_overlap_by_turns_with_landmarks": pool.usable[round_robin(known_nt[pool.usable], size, seed=seed)],
        "refined_overlap_unpropagated": np.random.default_rng(seed).choice(others, size, replace=False),
    }
    figures = {}
    for name, shortlist in shortlists.items():
        exact = np.union1d(shortlist, landmarks)
        limited_nt = torch.full_like(P_nt, -2.0)
        limited_nt[exact] = P_nt[exact]
        figures[name] = overlap(P_nt[pool.usable], limited_nt[pool.usable], seed)
    return figures


def choose_landmarks(pool: Pool, E_ne: Tensor, choice: str, count: int, seed: int) -> IntArray:
    sources = [pool.sources[i] for i in pool.usable]
    if choice in ("uniform", "stratified"):
        return landmark_order(pool.usable, choice=choice, seed=seed, sources=sources)[:count]
    generator = np.random.default_rng(seed)
    if choice == "equal per source":
        shuffled = generator.permutation(pool.usable.size)
        seen: Counter[str] = Counter()
        turns = []
        for place in shuffled:
            turns.append(seen[sources[place]])
            seen[sources[place]] += 1
        return pool.usable[shuffled[np.argsort(turns, kind="stable")]][:count]
    E_me = E_ne[pool.usable].double()
    if choice == "ridge leverage":
        distances = torch.cdist(E_me, E_me)
        K_mm = torch.exp(-0.5 * (distances / distances[distances > 0].median()) ** 2)
        scores = torch.linalg.solve(K_mm + 0.1 * torch.eye(len(K_mm), dtype=K_mm.dtype), K_mm).diagonal().numpy()
        return generator.choice(pool.usable, count, replace=False, p=scores / scores.sum())
    chosen = [int(generator.integers(pool.usable.size))]
    squared_m = torch.full((len(E_me),), torch.inf, dtype=torch.float64)
    while len(chosen) < count:
        squared_m = torch.minimum(squared_m, (E_me - E_me[chosen[-1]]).square().sum(dim=1))
        chances = squared_m.numpy().copy()
        chances[chosen] = 0.0
        chosen.append(int(generator.choice(pool.usable.size, p=chances / chances.sum())))
    return pool.usable[chosen]


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
