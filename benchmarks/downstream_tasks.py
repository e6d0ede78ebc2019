"""The measurements of the downstream benchmark: a selection by the product, training on it, and the quality of the trained model.

Each measurement is one JSON file in the cache, named by the hash of everything that it depends on.
"""

import hashlib
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Corpus, Row, load_model, load_tokenizer, samples_of
from rich.progress import Progress
from safetensors.numpy import load_file

from service.datasets import storage
from service.datasets.convert import convert
from service.datasets.rows.options import RowOptions
from service.models.registry import resolve
from service.plan.artifact_keys import content_key
from service.plan.parameters import Parameters
from service.plan.stages import JobInputs, Stage
from service.plan.versions import code_version
from service.settings import ModelSettings, UploadSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker import summary
from worker.influence import OptimizerOptions, Samples, default_token_budget, sample_losses
from worker.loading.adapters import trainable
from worker.local_run import LocalJob
from worker.process.main import Compute
from worker.training import Training, train

RANDOM, ZERO_SHOT, FULL_POOL = "random", "zero-shot", "full pool"
EQUAL_WEIGHTS = "weighted, trained with equal weights"
JOBS: Mapping[str, Mapping[str, Any]] = {
    RANDOM: {"method": "random"},
    "rds_plus": {"method": "rds_plus"},
    "exact_influence": {"method": "exact_influence"},
    "authors' setting": {
        "embedding": {"kind": "jvp", "pooling": "last", "tangents": 2},
        "kernel": {"kind": "rbf", "ridge": 0.01},
        "refine": 0,
    },
    "default": {},
    "weighted": {"selection": "weighted"},
    EQUAL_WEIGHTS: {"selection": "weighted"},
}
"""The parameters of each method's job; the setup gives the number of landmarks and of embedded blocks."""
GENERATED_TOKENS = 128
GENERATED_AT_ONCE = 40
"""Number of prompts in a batch."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The options that all selections and runs of one benchmark share."""

    corpus: Path
    cache: Path
    model: Path
    device: str
    seed: int
    rows: int
    max_length: int
    share: float
    landmarks: int
    blocks: int
    targets: tuple[str, ...]
    epochs: int
    full_epochs: int
    learning_rate: float
    batch_size: int
    precision: str
    test_rows: int
    dev_rows: int
    accuracy: tuple[tuple[str, int], ...]
    accuracy_of: str
    varied_selection: bool
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training (none for zero-shot) and the targets that the model is then measured on."""

    method: str
    seed: int
    targets: tuple[str, ...]


class NotMeasured(Exception):
    """A measurement is not in the cache, and only cached ones were requested."""


class Bench:
    """The corpus, the product's compute code and the cache, within one process."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.corpus = Corpus(setup.corpus)
        self.pool = self.corpus.pool(setup.rows, setup.seed)
        self.tokenizer = load_tokenizer(setup.model)
        self.measured = ArtifactStore(str(setup.cache.resolve() / "measured"))
        self.models = ModelSettings(folder=setup.model.resolve().parent)
        settings = WorkerSettings(device="cuda" if setup.device.startswith("cuda") else "cpu", threads=1)
        artifacts = ArtifactStore(str(setup.cache.resolve() / "artifacts")).url
        self.compute = Compute(artifacts=artifacts, models=self.models.folder, settings=settings)
        self.registered = cache(self._register)

    def selection(self, method: str, target: str, seed: int) -> dict[str, Any]:
        """The product's selection for the target's dev split, in order of rank."""
        setup, given = self.setup, dict(JOBS[method])
        if "method" not in given:
            given["landmarks"] = {"count": setup.landmarks}
        if "embedding" in given:
            given["embedding"] = {**given["embedding"], "blocks": setup.blocks}
        parameters = Parameters(**given, seed=seed, max_length=setup.max_length, validate=False)
        job = JobInputs(
            model=resolve(self.models, setup.model.resolve().name, parameters),
            pool=self.registered("pool"),
            target=self.registered(target),
            budget=round(setup.share * len(self.pool)),
            parameters=parameters.model_dump(mode="json"),
        )
        depends_on = {
            "job": job.as_dict(),
            "model": self.compute.models.folder(job.model).fingerprint,
            "device": setup.device,
            "code": {stage: code_version(stage) for stage in Stage},
        }
        return self._cached("selections", depends_on, lambda: self._selected(job, target))

    def measure(self, run: Run) -> dict[str, Any]:
        """Trains on the selection of the run's method and measures the model: one value per row of each target."""
        setup = self.setup
        rows, weights = self._training_set(run)
        splits = {
            name: {"test": self.drawn(name, setup.test_rows), "dev": self.corpus.target(name, "dev")[: setup.dev_rows]}
            for name in run.targets
        }
        wanted = {name: self.drawn(name, count) for name, count in self._accuracy(run).items()}
        _check_disjoint(rows, [row for split in splits.values() for row in split["test"]])
        training = Training(
            epochs=setup.full_epochs if run.method == FULL_POOL else setup.epochs,
            learning_rate=setup.learning_rate,
            batch_size=setup.batch_size,
            optimizer=OptimizerOptions(type="adamw"),
            seed=run.seed,
            token_budget=max(2048, default_token_budget(torch.device(setup.device))),
        )
        depends_on = {
            "model": self.compute.models.folder({"kind": "registered", "name": setup.model.resolve().name}).fingerprint,
            "max_length": setup.max_length,
            "training": repr(training) if rows else None,
            "precision": setup.precision,
            "device": setup.device,
            "rows": rows,
            "weights": weights,
            "splits": splits,
            "accuracy": wanted,
            "code": [code_version(Stage.WARMUP), hashlib.sha256(Path(__file__).read_bytes()).hexdigest()],
        }
        return self._cached("runs", depends_on, lambda: self._trained(rows, weights, training, splits, wanted))

    def drawn(self, target: str, count: int) -> list[Row]:
        """The same rows of a test split for every method."""
        rows = self.corpus.target(target, "test")
        order = np.random.default_rng(self.setup.seed).permutation(len(rows))
        return [rows[i] for i in order[:count]]

    def _cached(self, kind: str, depends_on: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = content_key(kind, depends_on, ".json")
        if not self.measured.exists(key):
            if self.setup.finished:
                raise NotMeasured
            self.measured.write_json(key, make())
        return dict(self.measured.read_json(key))

    def _register(self, name: str) -> str:
        """Stores the pool or a target's dev split as an upload would, and returns its fingerprint."""
        rows = self.pool if name == "pool" else self.corpus.target(name, "dev")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.seek(0)
            content = convert(file, RowOptions(), UploadSettings(), Path(folder))
            storage.publish(self.compute.store, content)
        return content.fingerprint

    def _selected(self, job: JobInputs, target: str) -> dict[str, Any]:
        done = LocalJob(self.compute, job, Progress(disable=True)).run(len(self.pool))
        results = {stage: [unit.result for unit in units] for stage, units in done.items()}
        with self.compute.store.local(done[Stage.SELECT][0].artifact_key) as path:
            arrays = load_file(path)
        chosen = [self.pool[i] for i in arrays["selected"]]
        found = summary.of_method(results)
        return {
            "ids": [row["id"] for row in chosen],
            "weights": arrays["weight"][arrays["selected"]].tolist(),
            "sources": dict(Counter(row["source"] for row in chosen).most_common()),
            "given": [row["id"] for row in self.corpus.target(target, "dev")],
            # For a unit that an earlier job computed, this is what it cost then.
            "seconds": sum(unit["seconds"] for units in results.values() for unit in units),
            "operations": sum(unit.get("operations", 0) for units in results.values() for unit in units),
            "dtype": results[Stage.PREPARE][-1]["dtype"],
            "landmarks": found["landmark_count"],
            "refined": found["refined_count"],
            "embedding": found["embedding"]["chosen"],
            "left_out_spearman": found["fidelity"] and found["fidelity"]["mean_spearman"],
        }

    def _training_set(self, run: Run) -> tuple[list[Row], list[float]]:
        if run.method == ZERO_SHOT:
            return [], []
        if run.method == FULL_POOL:
            samples = samples_of(self.pool, self.tokenizer, self.setup.max_length)
            rows = [self.pool[i] for i in np.flatnonzero(samples.predicted())]
            return rows, [1.0] * len(rows)
        selection = self.selection(run.method, run.targets[0], self.selection_seed(run))
        by_id = {row["id"]: row for row in self.pool}
        weights = [1.0] * len(selection["ids"]) if run.method == EQUAL_WEIGHTS else selection["weights"]
        return [by_id[each] for each in selection["ids"]], weights

    def selection_seed(self, run: Run) -> int:
        return run.seed if run.method == RANDOM or self.setup.varied_selection else self.setup.seed

    def _accuracy(self, run: Run) -> dict[str, int]:
        """By target, the number of rows that the run's accuracy is measured on."""
        if run.method == ZERO_SHOT:
            return dict(self.setup.accuracy)
        if self.setup.accuracy_of == ZERO_SHOT:
            return {}
        return {name: count for name, count in self.setup.accuracy if name in run.targets}

    def _trained(
        self,
        rows: list[Row],
        weights: list[float],
        training: Training,
        splits: Mapping[str, Mapping[str, list[Row]]],
        wanted: Mapping[str, list[Row]],
    ) -> dict[str, Any]:
        setup = self.setup
        model = load_model(setup.model, torch.float32, setup.device)
        started, losses = time.process_time(), []
        if rows:
            losses = fine_tune(model, self._samples(rows), np.array(weights), training, precision=setup.precision)
        trained = time.process_time()
        measured = {
            name: {split: self._losses(model, chosen, training.token_budget) for split, chosen in parts.items()}
            for name, parts in splits.items()
        }
        accuracy = {name: ACCURACIES[name](model, self.tokenizer, chosen) for name, chosen in wanted.items()}
        return {
            "trained_on": [row["id"] for row in rows],
            "tested_on": {name: [row["id"] for row in parts["test"]] for name, parts in splits.items()},
            "training_losses": losses,
            "losses": measured,
            "accuracy": accuracy,
            "training_cpu_seconds": trained - started,
            "measuring_cpu_seconds": time.process_time() - trained,
        }

    def _losses(self, model: Any, rows: list[Row], token_budget: int) -> list[float]:
        if not rows:
            return []
        found: list[float] = sample_losses(model, self._samples(rows), token_budget=token_budget).tolist()
        return found

    def _samples(self, rows: list[Row]) -> Samples:
        return samples_of(rows, self.tokenizer, self.setup.max_length)


bench = cache(Bench)
"""One instance per setup and process."""


def _check_disjoint(trained_on: Sequence[Row], tested_on: Sequence[Row]) -> None:
    both = {row["id"] for row in trained_on} & {row["id"] for row in tested_on}
    if both:
        raise SystemExit(f"rows of a test split are in the pool: {', '.join(sorted(both)[:10])}")


def fine_tune(
    model: Any, samples: Samples, weights: np.ndarray[Any, Any], training: Training, *, precision: str
) -> list[float]:
    """Trains the whole model like the product's warm-up; returns the loss before each step.

    Weights, sums and the optimiser are float32; with `precision` bfloat16, factors of products are bfloat16.
    """
    kind = next(model.parameters()).device.type
    # No caching: the weights change within this one context.
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        _, losses = train(
            model,
            trainable(model),
            samples,
            training,
            report=lambda *_: None,
            progress=lambda *_: None,
            weights=weights,
        )
    return losses


def prompt(tokenizer: Any, row: Row) -> str:
    """The conversation up to the start of the last reply."""
    return str(tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False))


def number_after_marks(text: str) -> str | None:
    """The number after `####`, without currency signs, separators and trailing zeros."""
    found = re.search(r"####\s*\$?\s*(-?[\d,]*\.?\d+)", text)
    if found is None:
        return None
    digits = found[1].replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


@torch.no_grad()
def generated(model: Any, tokenizer: Any, rows: Sequence[Row], *, tokens: int = GENERATED_TOKENS) -> list[str]:
    """The greedy reply to each row's prompt."""
    replies: list[str] = []
    for start in range(0, len(rows), GENERATED_AT_ONCE):
        prompts = [prompt(tokenizer, row) for row in rows[start : start + GENERATED_AT_ONCE]]
        asked = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        ids = asked["input_ids"].to(model.device)
        answered = model.generate(
            input_ids=ids,
            attention_mask=asked["attention_mask"].to(model.device),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        replies += tokenizer.batch_decode(answered[:, ids.shape[1] :], skip_special_tokens=True)
    return replies


def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Whether the number after `####` equals the reference's; chance is always answering the most frequent number."""
    right = [number_after_marks(row["messages"][-1]["content"]) for row in rows]
    said = [number_after_marks(reply) for reply in generated(model, tokenizer, rows)]
    return {
        "right": sum(a == b for a, b in zip(said, right, strict=True)),
        "rows": len(rows),
        "in_form": sum(answer is not None for answer in said),
        "chance": Counter(right).most_common(1)[0][1] / len(rows),
    }


@torch.no_grad()
def right_option(model: Any, tokenizer: Any, rows: Sequence[Row], *, letters: str = "ABCD") -> dict[str, Any]:
    """Whether the reference's letter is the most likely of the letters as the first token of the reply."""
    ids = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in letters]
    right = 0
    for row in rows:
        asked = tokenizer(prompt(tokenizer, row), add_special_tokens=False, return_tensors="pt").input_ids
        logits_V = model(input_ids=asked.to(model.device), logits_to_keep=1).logits[0, -1]
        right += letters[int(logits_V[ids].argmax())] == row["messages"][-1]["content"][0]
    return {"right": right, "rows": len(rows), "in_form": len(rows), "chance": 1 / len(letters)}


ACCURACIES: Mapping[str, Callable[[Any, Any, Sequence[Row]], dict[str, Any]]] = {
    "gsm8k": exact_match,
    "mmlu": right_option,
}
