"""Prepare: the model's identity, both datasets as tokens, the landmarks, and how the work is cut into shards."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.datasets.storage import iter_ids, iter_samples
from service.jobs.state import Stage
from worker import data, models, versions
from worker.chat import ChatFormat
from worker.errors import DataError, ParameterError
from worker.influence import EmbeddingOptions, candidates, landmark_order
from worker.stages import keys
from worker.stages.context import StageContext

_MOST_COMPARED = 1024  # landmarks that candidate embeddings are compared on: enough to tell them apart


def run(context: StageContext) -> dict[str, Any]:
    """Writes the tokens of pool and target and those of the landmarks; returns what the plan needs of them.

    Raises:
        ModelError, DataError, ParameterError: the job cannot be computed; says why.
    """
    job, folder = context.job, context.models.folder(context.job.model)
    config = models.load_config(folder)
    _check_model(job.parameters, folder, int(config.num_hidden_layers))
    longest = min(job.parameters["max_length"], int(config.max_position_embeddings))

    target_key, target = _tokenise(context, folder, job.target, longest, already=0)
    pool_key, pool = _tokenise(context, folder, job.pool, longest, already=len(target.length))
    usable = np.flatnonzero(pool.predicted > 0)
    if not (target.predicted > 0).any():
        raise DataError("The target has no response tokens: no sample has a reply that fits after its prompt.")
    if len(usable) < 2:
        raise DataError("The pool has fewer than two samples with response tokens.")
    if job.budget > len(usable):
        raise ParameterError(f"budget is {job.budget}, but only {len(usable)} samples of the pool have a response.")
    dtype = models.choose_dtype(job.parameters["dtype"], context.models.device)
    return {
        "model_fingerprint": folder.fingerprint,
        "model_files": folder.files,
        "model_type": config.model_type,
        "is_adapter": folder.is_adapter,
        "tokenizer_fingerprint": folder.tokenizer_fingerprint,
        "chat_template": _template_of(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(context.models.device),
        "max_length": longest,
        "n": len(pool.length),
        "t": len(target.length),
        "usable": len(usable),
        "pool_tokens": pool_key,
        "target_tokens": target_key,
        "pool_counts": pool.summary(),
        "target_counts": target.summary(),
        "embed_shards": keys.embed_shards(pool.length),
        "target_shards": keys.gradient_shards(target.length),
        "versions": versions.installed(),
        **_landmarks(context, pool_key, pool, usable),
        **_candidates(job.parameters, config),
        **_warmup(job.parameters, len(usable)),
    }


def _check_model(parameters: Mapping[str, Any], folder: models.ModelFolder, blocks: int) -> None:
    """What can be known of the model before its weights are loaded."""
    embedding, optimizer = parameters["embedding"], parameters["optimizer"]
    if parameters["method"] == "influence_distillation" and embedding["kind"] != "rds" and embedding["blocks"] > blocks:
        raise ParameterError(f"embedding.blocks is {embedding['blocks']}; the model has {blocks}.")
    needs_state = optimizer["type"] in ("adam", "adamw") or optimizer["momentum"] > 0
    if needs_state and parameters["warmup"] is None:
        models.check_optimizer_state(folder, parameters["gradient"]["modules"], optimizer)


def _landmarks(
    context: StageContext, pool_key: str, pool: data.TokenCounts, usable: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """The order in which samples become landmarks, and the first of them as an artifact, in rising order."""
    parameters, notes = context.job.parameters, []
    if parameters["method"] not in ("influence_distillation", "exact_influence"):
        return {"landmark_count": 0, "all_exact": False, "notes": []}
    if parameters["method"] == "exact_influence":
        shards = keys.gradient_shards(pool.length)
        landmarks = {"landmarks": pool_key, "landmark_shards": shards, "landmark_count": len(usable), "all_exact": True}
        return {**landmarks, "notes": []}
    wanted, choice, seed = parameters["landmarks"]["count"], parameters["landmarks"]["choice"], parameters["seed"]
    sources = _sources(context, usable) if choice == "stratified" else None
    order = landmark_order(usable, choice=choice, seed=seed, sources=sources)
    order_key = keys.artifact_key(Stage.PREPARE, "orders", ".npy", pool=pool_key, choice=choice, seed=seed)
    if not context.store.exists(order_key):
        with context.store.writing(order_key) as path, path.open("wb") as file:
            np.save(file, order)
    rows, compared = np.sort(order[:wanted]), np.sort(order[: min(wanted, _MOST_COMPARED)])
    if wanted > len(usable):
        notes.append(f"landmarks.count is {wanted}: lowered to the {len(usable)} usable samples of the pool.")
    if len(rows) == len(usable):
        notes.append("Every usable sample is a landmark, so every influence is exact and nothing was propagated.")
    return {
        "landmarks": data.rows_artifact(context.store, pool_key, rows),
        "landmark_order": order_key,
        "landmark_count": len(rows),
        "landmark_shards": keys.gradient_shards(pool.length[rows]),
        "candidate_tokens": data.rows_artifact(context.store, pool_key, compared),
        "candidate_shards": keys.embed_shards(pool.length[compared]),
        "all_exact": len(rows) == len(usable),
        "notes": notes,
    }


def _sources(context: StageContext, usable: npt.NDArray[np.int64]) -> list[str | None]:
    """Of each usable sample."""
    sources = [source for _, batch in iter_ids(context.store, context.job.pool) for source in batch]
    return [sources[row] for row in usable]


def _candidates(parameters: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The embeddings that `auto` chooses among."""
    embedding = parameters["embedding"]
    if embedding["kind"] != "auto":
        return {}
    named = EmbeddingOptions(blocks=embedding["blocks"], tangents=embedding["tangents"], seed=parameters["seed"])
    known = candidates(named, int(config.num_hidden_layers))
    offered = [each for each in known if embedding["pooling"] in (None, each[0].pooling)]
    names = ("kind", "pooling", "blocks", "tangents")
    return {
        "candidates": [{name: getattr(options, name) for name in names} for options, _ in offered],
        "candidate_costs": [cost for _, cost in offered],
    }


def _warmup(parameters: Mapping[str, Any], usable: int) -> dict[str, Any]:
    warmup = parameters["warmup"]
    return {} if warmup is None else {"warmup_total": min(warmup["samples"], usable) * warmup["epochs"]}


def _tokenise(
    context: StageContext, folder: models.ModelFolder, dataset: str, max_length: int, *, already: int
) -> tuple[str, data.TokenCounts]:
    key = keys.tokens_key(dataset, folder.tokenizer_fingerprint, max_length, context.job.salt)
    if not context.store.exists(key):
        rows = data.tokenise(
            iter_samples(context.store, dataset),
            models.load_tokenizer(folder),
            max_length=max_length,
            report=lambda done: context.report(already + done),
        )
        data.write_tokens(context.store, key, rows)
    counts = data.read_counts(context.store, key)
    context.report(already + len(counts.length))
    return key, counts


def _template_of(folder: models.ModelFolder) -> str:
    return "default" if ChatFormat(models.load_tokenizer(folder)).is_default else "the model's own"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
