"""Prepare: the model's identity, both datasets as tokens, the landmarks, and how the work is cut into shards."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from service.datasets.storage import iter_ids, iter_samples, read_samples
from service.plan.artifact_keys import artifact_key, rendering, tokens_key
from service.plan.limits import COMPARED_LANDMARKS
from service.plan.shards import embed_shards, gradient_shards
from service.plan.stages import Stage
from worker.errors import DataError, ParameterError, TooManyUnusable, in_words
from worker.influence import EmbeddingOptions, embedding_candidates, landmark_order
from worker.loading import models
from worker.loading.folders import ModelFolder
from worker.loading.optimizer_state import check_optimizer_state
from worker.loading.placement import choose_dtype, device_name
from worker.stages import package_versions
from worker.stages.context import StageContext
from worker.text import tokenization
from worker.text.chat_templates import ChatFormat

_NAMED = 100  # unusable rows of each dataset that the result names
_NAMED_IN_ERROR = 10


def run(context: StageContext) -> dict[str, Any]:
    """Writes the tokens of pool and target and those of the landmarks; returns what the plan needs of them.

    Raises:
        ModelError, DataError, ParameterError: the job cannot be computed; says why. TooManyUnusable is one of them.
    """
    job, folder = context.job, context.models.folder(context.job.model)
    config = models.load_config(folder)
    _check_model(job.parameters, folder, int(config.num_hidden_layers))
    longest = min(job.parameters["max_length"], int(config.max_position_embeddings))

    target_key, target = _tokenise(context, folder, job.target, longest, already=0)
    pool_key, pool = _tokenise(context, folder, job.pool, longest, already=len(target.length))
    unusable = {
        "pool": _unusable(context, job.pool, pool_key, pool),
        "target": _unusable(context, job.target, target_key, target),
    }
    usable = np.flatnonzero(pool.usable)
    for name, counts in (("pool", pool), ("target", target)):
        _check_share(job.parameters, name, unusable[name], len(counts.length))
    if not target.usable.any():
        raise DataError(f"The target has no sample that can be used ({in_words(unusable['target']['by_reason'])}).")
    if len(usable) < 2:
        raise DataError("The pool has fewer than two samples that can be used.")
    if job.budget > len(usable):
        raise ParameterError(f"budget is {job.budget}, but only {len(usable)} samples of the pool can be used.")
    dtype = choose_dtype(job.parameters["dtype"], context.models.device)
    is_default = ChatFormat(models.load_tokenizer(folder)).is_default
    warmup = job.parameters["warmup"]
    return {
        "model_fingerprint": folder.fingerprint,
        "model_files": folder.files,
        "model_type": config.model_type,
        "is_adapter": folder.is_adapter,
        "tokenizer_fingerprint": folder.tokenizer_fingerprint,
        "chat_template": "default" if is_default else "the model's own",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(context.models.device),
        "max_length": longest,
        "n": len(pool.length),
        "t": len(target.length),
        "usable": len(usable),
        "unusable": unusable,
        "rendering": {"pool": dict(pool.notes), "target": dict(target.notes)},
        "pool_tokens": pool_key,
        "target_tokens": target_key,
        "pool_counts": pool.summary(),
        "target_counts": target.summary(),
        "embed_shards": embed_shards(pool.length),
        "target_shards": gradient_shards(target.length),
        "versions": package_versions.installed(),
        **_landmarks(context, pool_key, pool, usable),
        **_candidates(job.parameters, config),
        **({} if warmup is None else {"warmup_total": min(warmup["samples"], len(usable)) * warmup["epochs"]}),
    }


def _unusable(context: StageContext, dataset: str, tokens: str, counts: tokenization.TokenCounts) -> dict[str, Any]:
    """How many rows take no part, by reason; and the first hundred with their ids."""
    by_reason = {reason: len(rows) for reason, rows in counts.unusable.items()}
    first = tokenization.first_unusable(context.store, tokens, _NAMED) if by_reason else []
    named = read_samples(context.store, dataset, [row["index"] for row in first]) if first else []
    return {
        "count": sum(by_reason.values()),
        "by_reason": by_reason,
        "first": [{"id": sample.id, **row} for sample, row in zip(named, first, strict=True)],
    }


def _check_share(parameters: Mapping[str, Any], name: str, unusable: Mapping[str, Any], rows: int) -> None:
    allowed = parameters.get("max_unusable", 1.0)  # a job of the version before has no bound
    if unusable["count"] > allowed * rows:
        raise TooManyUnusable(name, rows, allowed, {**unusable, "first": unusable["first"][:_NAMED_IN_ERROR]})


def _check_model(parameters: Mapping[str, Any], folder: ModelFolder, blocks: int) -> None:
    """What can be known of the model before its weights are loaded."""
    embedding, optimizer = parameters["embedding"], parameters["optimizer"]
    if parameters["method"] == "influence_distillation" and embedding["kind"] != "rds" and embedding["blocks"] > blocks:
        raise ParameterError(f"embedding.blocks is {embedding['blocks']}; the model has {blocks}.")
    needs_state = optimizer["type"] in ("adam", "adamw") or optimizer["momentum"] > 0
    if needs_state and parameters["warmup"] is None:
        check_optimizer_state(folder, parameters["gradient"]["modules"], optimizer)


def _landmarks(
    context: StageContext, pool_key: str, pool: tokenization.TokenCounts, usable: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """The order in which samples become landmarks, and the first of them as an artifact, in rising order."""
    parameters, notes = context.job.parameters, []
    if parameters["method"] not in ("influence_distillation", "exact_influence"):
        return {"landmark_count": 0, "all_exact": False, "notes": []}
    if parameters["method"] == "exact_influence":
        shards = gradient_shards(pool.length)
        landmarks = {"landmarks": pool_key, "landmark_shards": shards, "landmark_count": len(usable), "all_exact": True}
        return {**landmarks, "notes": []}
    wanted, choice, seed = parameters["landmarks"]["count"], parameters["landmarks"]["choice"], parameters["seed"]
    sources = None
    if choice == "stratified":
        all_sources = [source for _, batch in iter_ids(context.store, context.job.pool) for source in batch]
        sources = [all_sources[row] for row in usable]
    order = landmark_order(usable, choice=choice, seed=seed, sources=sources)
    order_key = artifact_key(Stage.PREPARE, "orders", ".npy", pool=pool_key, choice=choice, seed=seed)
    if not context.store.is_whole(order_key):
        with context.store.writing(order_key) as path, path.open("wb") as file:
            np.save(file, order)
    rows, compared = np.sort(order[:wanted]), np.sort(order[: min(wanted, COMPARED_LANDMARKS)])
    if wanted > len(usable):
        notes.append(f"landmarks.count is {wanted}: lowered to the {len(usable)} usable samples of the pool.")
    if len(rows) == len(usable):
        notes.append("Every usable sample is a landmark, so every influence is exact and nothing was propagated.")
    return {
        "landmarks": tokenization.rows_artifact(context.store, pool_key, rows),
        "landmark_order": order_key,
        "landmark_count": len(rows),
        "landmark_shards": gradient_shards(pool.length[rows]),
        "candidate_tokens": tokenization.rows_artifact(context.store, pool_key, compared),
        "candidate_shards": embed_shards(pool.length[compared]),
        "all_exact": len(rows) == len(usable),
        "notes": notes,
    }


def _candidates(parameters: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The embeddings that `auto` chooses among."""
    embedding = parameters["embedding"]
    if embedding["kind"] != "auto":
        return {}
    named = EmbeddingOptions(blocks=embedding["blocks"], tangents=embedding["tangents"], seed=parameters["seed"])
    known = embedding_candidates(named, int(config.num_hidden_layers))
    offered = [each for each in known if embedding["pooling"] in (None, each[0].pooling)]
    names = ("kind", "pooling", "blocks", "tangents")
    return {
        "candidates": [{name: getattr(options, name) for name in names} for options, _ in offered],
        "candidate_costs": [cost for _, cost in offered],
    }


def _tokenise(
    context: StageContext, folder: ModelFolder, dataset: str, max_length: int, *, already: int
) -> tuple[str, tokenization.TokenCounts]:
    how = rendering(context.job.parameters)
    key = tokens_key(dataset, folder.tokenizer_fingerprint, max_length, context.job.salt, how)
    if not context.store.is_whole(key):
        tokenizer = models.load_tokenizer(folder)
        context.models.unchanged(context.job.model, folder.fingerprint)  # since it was hashed
        rows = tokenization.tokenise(
            iter_samples(context.store, dataset),
            tokenizer,
            max_length=max_length,
            rendered=how,
            report=lambda done: context.report(already + done),
        )
        tokenization.write_tokens(context.store, key, rows)
    counts = tokenization.read_counts(context.store, key)
    context.report(already + len(counts.length))
    return key, counts
