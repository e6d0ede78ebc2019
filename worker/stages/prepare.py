"""Prepare: the model's identity, both datasets as tokens, the landmarks, and how the work is cut into shards."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.datasets.storage import iter_samples
from worker import data, models, versions
from worker.chat import ChatFormat
from worker.errors import DataError, ParameterError
from worker.stages import plan
from worker.stages.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Writes the tokens of pool and target and those of the landmarks; returns what the plan needs of them.

    Raises:
        ModelError, DataError, ParameterError: the job cannot be computed; says why.
    """
    job, folder = context.job, context.models.folder(context.job.model)
    config = models.load_config(folder)
    blocks = int(config.num_hidden_layers)
    if job.parameters["embedding"]["blocks"] > blocks:
        raise ParameterError(f"embedding.blocks is {job.parameters['embedding']['blocks']}; the model has {blocks}.")
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

    wanted = job.parameters["landmarks"]["count"]
    landmarks = choose_landmarks(usable, wanted, job.parameters["seed"])
    landmarks_key = plan.landmarks_key(pool_key, wanted, job.parameters["seed"])
    if not context.store.exists(landmarks_key):
        data.copy_rows(context.store, pool_key, landmarks_key, landmarks)
    dtype = models.choose_dtype(job.parameters["dtype"], context.models.device)
    return {
        "model_fingerprint": folder.fingerprint,
        "model_files": folder.files,
        "model_type": config.model_type,
        "chat_template": _template_of(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "device": _device_name(context.models.device),
        "max_length": longest,
        "n": len(pool.length),
        "t": len(target.length),
        "pool_tokens": pool_key,
        "target_tokens": target_key,
        "landmarks": landmarks_key,
        "landmark_count": len(landmarks),
        "pool_counts": pool.summary(),
        "target_counts": target.summary(),
        "embed_shards": plan.embed_shards(pool.length),
        "landmark_shards": plan.gradient_shards(pool.length[landmarks]),
        "target_shards": plan.gradient_shards(target.length),
        "versions": versions.installed(),
    }


def _tokenise(
    context: StageContext, folder: models.ModelFolder, dataset: str, max_length: int, *, already: int
) -> tuple[str, data.TokenCounts]:
    key = plan.tokens_key(dataset, folder.tokenizer_fingerprint, max_length)
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


def choose_landmarks(usable: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """`count` of the usable samples, uniformly by the seed, in rising order; all of them where there are no more."""
    if count >= len(usable):
        return usable
    return np.sort(np.random.default_rng([seed, 0x1A4D]).choice(usable, size=count, replace=False))


def _template_of(folder: models.ModelFolder) -> str:
    return "default" if ChatFormat(models.load_tokenizer(folder)).is_default else "the model's own"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
