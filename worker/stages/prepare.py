"""Prepare: the model's identity, both datasets as tokens, the landmarks, and how the work is cut into shards."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from service.datasets.storage import iter_ids
from service.plan.artifact_keys import artifact_key
from service.plan.job_counts import JobCounts
from service.plan.landmark_count import landmark_count
from service.plan.limits import COMPARED_LANDMARKS, SCALED_ON
from service.plan.passes import affords_output
from service.plan.preparing import is_prepared, is_shard
from service.plan.refine_cap import cap_of_job, refined_samples
from service.plan.shards import embed_shards, gradient_shards
from service.plan.stages import JobInputs, Stage
from worker.duplicates import exclusions
from worker.errors import NAMED_IN_ERROR, DataError, ParameterError, TooManyUnusable, in_words, max_unusable
from worker.influence import embedding_candidates, landmark_order
from worker.loading import models
from worker.loading.folders import ModelFolder
from worker.loading.model_shape import shape_in_files
from worker.loading.optimizer_state import check_optimizer_state
from worker.loading.placement import choose_dtype, device_name
from worker.stages import duplicates, package_versions, tokenise
from worker.stages.context import StageContext
from worker.text import token_files
from worker.text.tokenization import TokenCounts

_ALL_BLOCKS_OR_NONE = ("rds", "output", "text")  # embeddings


def run(context: StageContext, artifact_key: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the tokens of pool and target and those of the landmarks; returns what the plan needs of them.

    The first unit does so where each dataset is one shard, or was tokenised before; else it asks for `shards`, each of which is a
    unit, and the last one does.

    Raises:
        ModelError, DataError, ParameterError: the job cannot be computed; says why. TooManyUnusable is one of them.
    """
    if is_shard(spec):
        return tokenise.run(context, artifact_key, spec)
    job, folder = context.job, context.models.folder(context.job.model)
    config = models.load_config(folder)
    _check_model(job.parameters, folder, int(config.num_hidden_layers))
    longest = min(job.parameters["max_length"], int(config.max_position_embeddings))
    found = {
        "model_fingerprint": folder.fingerprint,
        "tokenizer_fingerprint": folder.tokenizer_fingerprint,
        "max_length": longest,
    }
    tokens = {
        name: tokenise.DatasetTokens(
            context=context,
            dataset=dataset,
            model=folder.fingerprint,
            tokenizer=folder.tokenizer_fingerprint,
            max_length=longest,
        )
        for name, dataset in (("target", job.target), ("pool", job.pool))
    }
    # What was lost of a job that is planned is made here: nothing can be asked for then.
    may_ask = "merges" not in spec and not is_prepared(context.prepared)
    asked = {name: each.shards for name, each in tokens.items() if may_ask and each.is_too_large()}
    counts, unusable = _tokenise(context, spec, {name: each for name, each in tokens.items() if name not in asked})
    if asked:
        done = sum(len(each.length) for each in counts.values())
        parts = [key for name in counts for key in (tokens[name].key, *tokens[name].parts)]
        return {**found, "shards": asked, "samples_done": done, "parts": parts}
    pool, target = counts["pool"], counts["target"]
    if not target.usable.any():
        raise DataError(f"The target has no sample that can be used ({in_words(unusable['target']['by_reason'])}).")
    if pool.usable.sum() < 2:
        raise DataError("The pool has fewer than two samples that can be used.")
    done = 0 if "merges" in spec else len(pool.length) + len(target.length)
    repeats = duplicates.PoolRepeats(context, tokens["pool"].shards, lambda: context.report(done)).find()
    excluded = duplicates.exclude(context, tokens["pool"].key, pool.usable, repeats)
    usable = _taking_part(context, pool, excluded)
    dtype = choose_dtype(job.parameters["dtype"], context.models.device)
    warmup = job.parameters["warmup"]
    prepared = {
        **found,
        "model_files": folder.files,
        "model_type": config.model_type,
        "is_adapter": folder.is_adapter,
        "chat_template": tokens["target"].about.chat_template,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(context.models.device),
        "n": len(pool.length),
        "t": len(target.length),
        "usable": len(usable),
        "exclusions": excluded,
        "repeats": {**repeats.counts, "keys": repeats.keys},
        "signatures": repeats.signatures,
        "unusable": {name: unusable[name] for name in ("pool", "target")},
        "rendering": {"pool": dict(pool.notes), "target": dict(target.notes)},
        "pool_tokens": tokens["pool"].key,
        "target_tokens": tokens["target"].key,
        "parts": [key for each in tokens.values() for key in each.parts],
        "pool_counts": pool.summary(),
        "target_counts": target.summary(),
        "embed_shards": embed_shards(pool.length),
        "target_shards": gradient_shards(target.length),
        "versions": package_versions.installed(),
        **_landmarks(
            context, tokens["pool"].key, pool, usable, {} if excluded is None else {"exclusions": excluded["key"]}
        ),
        **({} if warmup is None else {"warmup_total": min(warmup["samples"], len(usable)) * warmup["epochs"]}),
    }
    prepared |= _candidates(job, folder, prepared, int(config.num_hidden_layers))
    return prepared | _refinement(job, folder, prepared)


def _tokenise(
    context: StageContext, spec: Mapping[str, Any], tokens: Mapping[str, tokenise.DatasetTokens]
) -> tuple[dict[str, TokenCounts], dict[str, dict[str, Any]]]:
    """The counts of the datasets, and which rows take no part. What is not there is made.

    Raises:
        TooManyUnusable: more than the job allows.
    """
    counts: dict[str, TokenCounts] = {}
    unusable = {}
    allowed, done = max_unusable(context.job.parameters), 0
    for name, each in tokens.items():

        def report(made: int, before: int = done) -> None:
            context.report(0 if "merges" in spec else before + made)  # whose samples are those of the shards

        if not each.is_there():
            each.make(report)
        counts[name] = token_files.read_counts(context.store, each.key)
        rows = len(counts[name].length)
        report(rows)
        done += rows
        unusable[name] = found = each.unusable(each.key, counts[name], token_files.NAMED)
        if found["count"] > allowed * rows:
            raise TooManyUnusable(name, rows, allowed, {**found, "first": found["first"][:NAMED_IN_ERROR]})
    return counts, unusable


def _taking_part(context: StageContext, pool: TokenCounts, excluded: Mapping[str, Any] | None) -> npt.NDArray[np.int64]:
    """The rows of the pool that can be used and are not left out by an option.

    Raises:
        ParameterError: they are fewer than the budget, or than two.
    """
    usable, numbers = pool.usable, exclusions.read(context.store, {"exclusions": excluded})
    rows = np.flatnonzero(usable if numbers is None else usable & (numbers == 0))
    if max(context.job.budget, 2) <= len(rows):
        return rows
    error = f"budget is {context.job.budget}, but only {usable.sum()} samples of the pool can be used"
    if excluded is not None:
        options = {
            "duplicate": "repeat another one (duplicates: one)",
            "overlap": "repeat the target (overlap: exclude)",
        }
        left_out = " and ".join(f"{excluded['by_reason'][reason]} {text}" for reason, text in options.items())
        error += f"; of these {left_out}, which leaves {len(rows)}. Lower the budget, or keep them"
    raise ParameterError(f"{error}.")


def _check_model(parameters: Mapping[str, Any], folder: ModelFolder, blocks: int) -> None:
    """What can be known of the model before its weights are loaded."""
    embedding, optimizer = parameters["embedding"], parameters["optimizer"]
    runs_blocks = parameters["method"] == "influence_distillation" and embedding["kind"] not in _ALL_BLOCKS_OR_NONE
    if runs_blocks and embedding["blocks"] > blocks:
        raise ParameterError(f"embedding.blocks is {embedding['blocks']}; the model has {blocks}.")
    needs_state = optimizer["type"] in ("adam", "adamw") or optimizer["momentum"] > 0
    if needs_state and parameters["warmup"] is None:
        check_optimizer_state(folder, parameters["gradient"]["modules"], optimizer)


def _landmarks(
    context: StageContext,
    pool_key: str,
    pool: TokenCounts,
    usable: npt.NDArray[np.int64],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The order in which samples become landmarks, and the first of them as an artifact, in rising order. `left_out` is what
    makes `usable` other than all that can be used."""
    parameters, notes = context.job.parameters, []
    if parameters["method"] not in ("influence_distillation", "exact_influence"):
        return {"landmark_count": 0, "all_exact": False, "notes": []}
    if parameters["method"] == "exact_influence":
        shards = gradient_shards(pool.length)
        landmarks = {"landmarks": pool_key, "landmark_shards": shards, "landmark_count": len(usable), "all_exact": True}
        return {**landmarks, "notes": []}
    named, choice, seed = parameters["landmarks"]["count"], parameters["landmarks"]["choice"], parameters["seed"]
    wanted = landmark_count(parameters, len(usable))
    order_key = artifact_key(Stage.PREPARE, "orders", ".npy", pool=pool_key, choice=choice, seed=seed, **left_out)
    if not context.store.is_whole(order_key):
        sources = None
        if choice == "stratified":
            all_sources = [source for _, batch in iter_ids(context.store, context.job.pool) for source in batch]
            sources = [all_sources[row] for row in usable]
        with context.store.writing(order_key) as path, path.open("wb") as file:
            np.save(file, landmark_order(usable, choice=choice, seed=seed, sources=sources))
    with context.store.local(order_key) as path:
        order = np.load(path, mmap_mode="r")[: max(wanted, SCALED_ON)].copy()
    rows, compared = np.sort(order[:wanted]), np.sort(order[: min(wanted, COMPARED_LANDMARKS)])
    if named is not None and named > len(usable):
        notes.append(f"landmarks.count is {named}: lowered to the {len(usable)} usable samples of the pool.")
    if len(rows) == len(usable):
        notes.append("Every usable sample is a landmark, so every influence is exact and nothing was propagated.")
    return {
        "landmarks": token_files.rows_artifact(context.store, pool_key, rows),
        "landmark_order": order_key,
        "landmark_count": len(rows),
        "landmark_shards": gradient_shards(pool.length[rows]),
        "scaled_on": token_files.rows_artifact(context.store, pool_key, np.sort(order[:SCALED_ON])),
        "candidate_tokens": token_files.rows_artifact(context.store, pool_key, compared),
        "candidate_shards": embed_shards(pool.length[compared]),
        "all_exact": len(rows) == len(usable),
        "notes": notes,
    }


def _refinement(job: JobInputs, folder: ModelFolder, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """How many samples may be refined, of `auto` with each candidate; and where that does not follow from `max_cost`, why."""
    if job.parameters["method"] != "influence_distillation" or prepared["all_exact"]:
        return {}
    shape, counts = shape_in_files(folder), JobCounts.of_prepared(prepared, job.budget)
    cap = cap_of_job(shape, job.parameters, counts)
    notes = [] if cap is None or cap.note is None else [cap.note]
    found = {
        "samples": refined_samples(shape, job.parameters, counts),
        "with": {c["kind"]: refined_samples(shape, job.parameters, counts, c) for c in counts.candidates or ()},
    }
    return {"refine_cap": found, "notes": [*prepared["notes"], *notes]}


def _candidates(job: JobInputs, folder: ModelFolder, prepared: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """The embeddings that `auto` chooses among."""
    embedding = job.parameters["embedding"]
    if embedding["kind"] != "auto":
        return {}
    counts = JobCounts.of_prepared(prepared, job.budget)
    with_output = affords_output(shape_in_files(folder), job.parameters, counts)
    offered = embedding_candidates(embedding["blocks"], blocks, with_output=with_output)
    return {
        "candidates": [{**options, "tangents": embedding["tangents"]} for options, _ in offered],
        "candidate_costs": [cost for _, cost in offered],
    }
